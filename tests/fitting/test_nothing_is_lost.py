"""What goes wrong around a step loses nothing that was reached; what cannot work is said before the first step."""

from __future__ import annotations

import io
import os
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.checkpoint import saving as saving_module
from funcfreeze.checkpoint.folder import checkpoints_in
from funcfreeze.fitting import running


def step_of():
    torch.manual_seed(1)
    return ff.Step(nn.Linear(3, 1), lambda m, x: {"l": m(x).square().mean()}, {"l": "*"}, optimizer=ff.optim.adam(0.1))


def batches(count=28):
    return ff.checkpoint.Batches([torch.randn(3) for _ in range(count)], 4, seed=3)


class Noting:
    def __init__(self):
        self.rows = []

    def log(self, step, metrics):
        self.rows.append((step, dict(metrics)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"extra": {"classes": {"a", "b"}}}, r"not extra.classes \(set\)"),
        ({"keep": 0}, "keep is the number of checkpoints"),
        ({"save_every": 0}, "save_every is a whole number, at least 1, got 0"),
        ({"patience": 2}, "give evaluate=, too"),
        ({"extra": {"fit": "linear"}}, r"extra\['fit'\] is where fit keeps"),
        ({"extra": {"fit": {"evaluations": 3}}}, r"extra\['fit'\] is where fit keeps"),
        ({"extra": [1]}, r"extra= is a dict by names, got \[1\]"),
        ({"generators": {"x": np.random.RandomState(1)}}, r"generators\['x'\] is a torch.Generator"),
        ({"steps": 2.5}, "steps is a whole number, at least 0, got 2.5"),
        ({"save_minutes": "ten"}, "save_minutes is a number of minutes, or None, got 'ten'"),
        ({"show_every": None}, "show_every is a whole number, at least 1, got None"),
        ({"evaluate_every": None}, "evaluate_every is a whole number, at least 1, got None"),
        ({"evaluate": 3}, "evaluate is called with the model, got 3"),
        ({"targets": "teacher"}, "targets= names averaged twins, of which the step has none; got 'teacher'"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_said_before_the_first_step(options, told, tmp_path):
    step = step_of()
    state = step.init()
    with pytest.raises((TypeError, ValueError), match=told):
        ff.fit(step, state, batches(), **{"steps": 3, "folder": tmp_path, "show": False, **options})
    assert int(state.step) == 0


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    step = step_of()
    state = step.init()
    with pytest.raises(OSError, match="taken"):
        ff.fit(step, state, batches(), steps=3, folder=tmp_path / "taken", show=False)
    assert int(state.step) == 0


@pytest.mark.parametrize("where", ["evaluate", "logger", "data"])
def test_what_raises_around_a_step(where, tmp_path):
    step, data = step_of(), batches()

    def fail(*args):
        raise OSError("it is down")

    class Failing:
        log = staticmethod(fail)

    class Ending(ff.checkpoint.Batches):
        def __iter__(self):
            yield from (batch for batch, _ in zip(super().__iter__(), range(5), strict=False))
            fail()

    given = Ending([torch.randn(3) for _ in range(28)], 4, seed=3) if where == "data" else data
    options = {
        "evaluate": {"evaluate": fail, "evaluate_every": 5},
        "logger": {"log": Failing(), "show_every": 5},
        "data": {},
    }
    with pytest.raises(OSError, match="it is down") as error:
        ff.fit(step, step.init(), given, steps=20, folder=tmp_path, show=False, **options[where])
    assert error.value.__notes__[0].endswith("what was reached is saved as " + str(tmp_path / "step-0000000005"))
    state, _ = ff.checkpoint.resume(tmp_path, step, data=batches())
    assert int(state.step) == 5


def test_more_signals_while_it_saves_change_nothing(tmp_path, monkeypatch):
    step = step_of()
    ours = running.saving

    def saving(*args, **options):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return ours(*args, **options)

    monkeypatch.setattr(running, "saving", saving)
    state, fitted = ff.fit(step, step.init(), batches(), steps=5, folder=tmp_path, show=False)
    assert (int(state.step), fitted.reason) == (5, "SIGINT"), "who wants it to stop is told, however late"
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-0000000005"]


def test_a_step_that_raises_saves_no_mixture(tmp_path):
    """Its batch was taken: data and state are not of one step any more."""
    step, data, seen = step_of(), batches(), []

    def failing(model, x):
        seen.append(x)
        if len(seen) == 6:
            raise ZeroDivisionError("of the user's")
        return {"l": model(x).square().mean()}

    failing_step = ff.Step(step.model, failing, {"l": "*"}, optimizer=ff.optim.adam(0.1))
    with pytest.raises(ZeroDivisionError) as error:
        ff.fit(failing_step, failing_step.init(), data, steps=20, folder=tmp_path, save_every=4, show=False)
    (note,) = error.value.__notes__
    assert note.endswith(
        "step 5, not saved, since the step after it had taken its batch; the checkpoint before is of step 4"
    )
    state, _ = ff.checkpoint.resume(tmp_path, step, data=data)
    assert (int(state.step), data.position) == (4, 4)


def test_leaving_from_an_evaluation_saves(tmp_path):
    step, data = step_of(), batches()

    def leave(model):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        ff.fit(step, step.init(), data, steps=20, folder=tmp_path, evaluate=leave, evaluate_every=5, show=False)
    state, _ = ff.checkpoint.resume(tmp_path, step, data=data)
    assert (int(state.step), data.position) == (5, 5)


@pytest.mark.filterwarnings("error")
def test_a_save_that_fails_where_warnings_are_errors(tmp_path, monkeypatch):
    """The thread raises; who waits for the outcome does not wait for ever."""
    step = step_of()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving_module, "write_tensors", full)
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    with pytest.raises(UserWarning, match="No space left on device"):
        ff.fit(step, step.init(), batches(), steps=4, folder=tmp_path, save_every=4, show=False)
    assert [type(one.exc_value) for one in raised] == [UserWarning]


def test_an_outcome_of_every_exception(tmp_path, monkeypatch):
    step = step_of()

    def leave(*args):
        raise SystemExit(1)

    monkeypatch.setattr(saving_module, "write_tensors", leave)
    given = {"data": None, "extra": None, "generators": None, "keep": 3, "background": True}
    with pytest.warns(UserWarning, match="no checkpoint was saved: SystemExit: 1"):
        assert not saving_module.saving(tmp_path, step, step.init(), **given).is_there()
    saving_module.wait_for(tmp_path)


def test_an_evaluation_that_writes_to_a_twin_saves_nothing(tmp_path):
    step = step_of().remade(targets={"average": ff.ema("*", 0.5, buffers="copied")})

    def evaluate(model):
        with torch.no_grad():
            model.weight.zero_()
        return 1.0

    options = {"evaluate": evaluate, "evaluate_every": 3, "targets": "average", "show": False}
    with pytest.raises(RuntimeError) as error:
        ff.fit(step, step.init(), batches(), steps=6, folder=tmp_path, **options)
    assert any("not saved, since evaluate had written to its parameters" in note for note in error.value.__notes__)
    assert checkpoints_in(tmp_path) == []


class Counting:
    """Counts before it makes a batch, as torchdata's loader does without workers."""

    batch_size = 4

    def __init__(self, fails_at):
        self.at, self.fails_at = 0, fails_at

    def __iter__(self):
        while self.at < 10:
            self.at += 1
            if self.at == self.fails_at:
                raise OSError("the network is down")
            yield torch.full((4, 3), float(self.at))

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("is_stopping", [False, True])
def test_data_that_counted_a_batch_that_it_did_not_give(is_stopping, tmp_path):
    step = step_of()

    class Failing(Counting):
        def __iter__(self):
            try:
                yield from super().__iter__()
            except OSError:
                if is_stopping:
                    os.kill(os.getpid(), signal.SIGTERM)
                raise

    data = Failing(fails_at=5)
    options = {"folder": tmp_path, "save_every": 3, "show": False}
    if is_stopping:
        state, fitted = ff.fit(step, step.init(), data, steps=9, **options)
        assert (int(state.step), fitted.reason) == (4, "SIGTERM")
    else:
        with pytest.raises(OSError, match="network") as error:
            ff.fit(step, step.init(), data, steps=9, **options)
        (note,) = error.value.__notes__
        assert note.endswith("not saved, since the data had begun its next batch; the checkpoint before is of step 3")
    again = Counting(fails_at=0)
    state, _ = ff.checkpoint.resume(tmp_path, step, data=again)
    assert (int(state.step), again.at) == (3, 3)


class Broken(io.TextIOBase):
    """A pipe that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_nobody_reads_what_is_shown(tmp_path, monkeypatch):
    step = step_of()
    monkeypatch.setattr("sys.stdout", Broken())
    state, fitted = ff.fit(step, step.init(), batches(), steps=6, folder=tmp_path, show_every=1)
    assert (int(state.step), fitted.reason) == (6, "steps")


class Tee:
    """As programs write them, with no more than they need."""

    def __init__(self):
        self.told = []

    def write(self, text):
        self.told.append(text)

    def flush(self):
        pass


def test_what_a_program_puts_in_the_place_of_stdout(monkeypatch):
    monkeypatch.setattr("sys.stdout", tee := Tee())
    step = step_of()
    ff.fit(step, step.init(), batches(), steps=2, show_every=1)
    assert [line.split()[1] for line in tee.told] == ["1/2", "2/2"]


@pytest.mark.parametrize("out", ["closed", None, "ascii"])
def test_where_nothing_can_be_shown(out, monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    if out == "closed":
        stream.close()
    monkeypatch.setattr("sys.stdout", None if out is None else stream)
    step = ff.Step(nn.Linear(3, 1), lambda m, x: {"größe": m(x).mean()}, {"größe": "*"}, optimizer=ff.optim.sgd(0.1))
    state, fitted = ff.fit(step, step.init(), batches(), steps=2, show_every=1)
    assert (int(state.step), fitted.reason) == (2, "steps")
    if out == "ascii":
        assert rb"gr\xf6\xdfe" in raw.getvalue()


def test_nobody_reads_that_it_stops(tmp_path, monkeypatch):
    step = step_of()

    def broken(*args):
        raise BrokenPipeError(32, "Broken pipe")

    def losses(model, x):
        os.kill(os.getpid(), signal.SIGINT)
        return {"l": model(x).square().mean()}

    step = ff.Step(step.model, losses, {"l": "*"}, optimizer=ff.optim.adam(0.1))
    monkeypatch.setattr("funcfreeze.fitting.stopping.os.write", broken)
    state, fitted = ff.fit(step, step.init(), batches(), steps=6, folder=tmp_path, show=False)
    assert (int(state.step), fitted.reason) == (1, "SIGINT")


def test_a_handler_that_is_not_of_python_is_left_alone(monkeypatch):
    step, put = step_of(), []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: put.append(number))
    state, _ = ff.fit(step, step.init(), batches(), steps=2, show=False)
    assert (int(state.step), put) == (2, [])


def test_what_was_not_saved_is_not_said_to_be(tmp_path, monkeypatch, capsys):
    """Another run's checkpoint of that step is there, and the one of now could not be written."""
    step, data = step_of(), batches()
    ff.fit(step, step.init(), batches(), steps=6, folder=tmp_path, show=False)
    old = (tmp_path / "step-0000000006" / "tensors.safetensors").read_bytes()
    ours, tries = saving_module.write_tensors, []

    def full_at_first(*args):
        tries.append(args)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        return ours(*args)

    monkeypatch.setattr(saving_module, "write_tensors", full_at_first)

    def run():
        return ff.fit(step, step.init(), data, steps=6, folder=tmp_path, save_every=6, show=False)

    with (
        pytest.warns(UserWarning, match="holds a checkpoint of step 6, and this run begins at 0"),
        pytest.warns(UserWarning, match="no checkpoint was saved: OSError: .*No space left"),
    ):
        run()
    assert len(tries) == 2
    assert (tmp_path / "step-0000000006" / "tensors.safetensors").read_bytes() != old


def test_evaluations_are_logged_where_they_were_made():
    step, noting, values = step_of(), Noting(), iter(range(100))
    ff.fit(
        step, step.init(), batches(), epochs=2, evaluate=lambda model: np.float32(next(values)), evaluate_every=3,
        show_every=4, log=noting, show=False,
    )  # fmt: skip
    rows = [(at, row.get("eval/value"), "l" in row) for at, row in noting.rows]
    assert rows == [
        (3, 0, False),
        (4, None, True),
        (6, 1, False),
        (8, None, True),
        (9, 2, False),
        (12, 3, True),
        (14, 4, True),
    ]


def test_patience_that_is_over_is_over(tmp_path):
    step, data = step_of(), batches()
    options = {"evaluate": lambda model: 1.0, "evaluate_every": 1, "patience": 2, "folder": tmp_path, "show": False}
    state, fitted = ff.fit(step, step.init(), data, steps=50, **options)
    assert (int(state.step), fitted.reason) == (3, "patience")
    state, extra = ff.checkpoint.resume(tmp_path, step, data=data)
    state, fitted = ff.fit(step, state, data, steps=50, extra=extra, **options)
    assert (int(state.step), fitted.reason) == (3, "patience")


def test_generators_and_twins(tmp_path):
    noise = torch.Generator().manual_seed(5)
    step = step_of().remade(targets={"average": ff.ema("*", 0.5, buffers="copied")})
    seen = []

    def evaluate(model):
        seen.append(next(model.parameters()).clone())
        return 0.0

    options = {
        "folder": tmp_path,
        "generators": {"noise": noise},
        "targets": "average",
        "evaluate": evaluate,
        "show": False,
    }
    state, _ = ff.fit(step, step.init(), batches(), steps=3, **options)
    assert torch.equal(seen[-1], state.targets["average"]["weight"])
    drawn = torch.rand(3, generator=noise)
    ff.checkpoint.resume(tmp_path, step, data=batches(), generators={"noise": noise})
    assert torch.equal(torch.rand(3, generator=noise), drawn)


def test_a_disk_that_is_full_at_the_end_is_a_warning(tmp_path, monkeypatch):
    step = step_of()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("funcfreeze.checkpoint.saving.write_tensors", full)
    with pytest.warns(UserWarning, match="no checkpoint was saved: OSError: .*No space left on device"):
        state, fitted = ff.fit(step, step.init(), batches(), steps=5, folder=tmp_path, show=False)
    assert (int(state.step), fitted.reason) == (5, "steps")


def test_a_fresh_run_in_an_old_folder_is_told(tmp_path):
    step = step_of()
    ff.fit(step, step.init(), batches(), steps=8, folder=tmp_path, show=False)
    with pytest.warns(
        UserWarning, match="holds a checkpoint of step 8, and this run begins at 0: .* Begin with resume"
    ):
        ff.fit(step, step.init(), batches(), steps=3, folder=tmp_path, show=False)


def test_an_evaluation_over_the_training_batches_is_an_error():
    step, data = step_of(), batches()
    with pytest.raises(RuntimeError, match="for an evaluation on the same data make a loader of its own"):
        ff.fit(step, step.init(), data, epochs=2, evaluate=lambda m: len(list(data)), evaluate_every=3, show=False)


def test_the_last_step_is_shown_and_saved_once(tmp_path, monkeypatch):
    step, noting, saved = step_of(), Noting(), []
    ours = running.saving
    monkeypatch.setattr(
        running, "saving", lambda *args, **options: saved.append(args[0].name) or ours(*args, **options)
    )
    ff.fit(step, step.init(), batches(), epochs=2, folder=tmp_path, save_every=7, log=noting, show_every=5, show=False)
    assert [at for at, _ in noting.rows] == [5, 10, 14]
    assert len(saved) == 2
    options = {"evaluate": lambda model: 1.0, "evaluate_every": 7, "log": noting, "show_every": 5, "show": False}
    ff.fit(step, step.init(), batches(), epochs=1, **options)
    assert [(at, "l" in row, "eval/value" in row) for at, row in noting.rows[3:]] == [
        (5, True, False),
        (7, False, True),
        (7, True, False),
    ]
