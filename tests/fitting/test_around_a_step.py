"""What happens to a run from outside: signals to all of its processes, other runs, other programs' handlers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.checkpoint.folder import checkpoints_in, held
from funcfreeze.fitting import CSV, options, running


def step_of():
    torch.manual_seed(1)
    return ff.Step(nn.Linear(3, 1), lambda m, x: {"l": m(x).square().mean()}, {"l": "*"}, optimizer=ff.optim.adam(0.1))


def batches(count=28):
    return ff.checkpoint.Batches([torch.randn(3) for _ in range(count)], 4, seed=3)


@pytest.mark.parametrize("is_saved", [True, False], ids=["saved before", "not yet"])
def test_an_evaluation_that_writes_to_parameters_saves_nothing(is_saved, tmp_path):
    step, data = step_of(), batches()

    def evaluate(model):
        with torch.no_grad():
            model.weight.zero_()
        return 1.0

    options = {"evaluate": evaluate, "evaluate_every": 5, "save_every": 4 if is_saved else None, "show": False}
    with pytest.raises(RuntimeError) as error:
        ff.fit(step, step.init(), data, steps=12, folder=tmp_path, **options)
    (note,) = [note for note in error.value.__notes__ if "ff.fit" in note]
    before = "; the checkpoint before is of step 4" if is_saved else ""
    assert note.endswith(f"step 5, not saved, since evaluate had written to its parameters{before}")
    assert len(checkpoints_in(tmp_path)) == is_saved


def test_an_alternation_that_raises_between_members_saves_nothing(tmp_path):
    model, calls = nn.ModuleDict({"g": nn.Linear(3, 3), "d": nn.Linear(3, 1)}), []

    def failing(m, x):
        calls.append(x)
        if len(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"fool": -m["d"](m["g"](x)).mean()}

    both = ff.alternate(
        {
            "d": ff.Step(model, lambda m, x: {"s": m["d"](x).mean()}, {"s": "d"}, optimizer=ff.optim.sgd(0.1)),
            "g": ff.Step(model, failing, {"fool": "g"}, optimizer=ff.optim.sgd(0.1)),
        }
    )
    data = batches()
    with pytest.raises(torch.OutOfMemoryError):
        ff.fit(both, both.init(), data, steps=12, folder=tmp_path, save_every=5, show=False)
    state, _ = ff.checkpoint.resume(tmp_path, both, data=data)
    assert (int(state.step), data.position) == (5, 5)


def test_metrics_by_integers(tmp_path):
    def losses(m, x):
        return {"l": m(x).square().mean()}, {"of_class": {0: torch.tensor(0.5), "b": 1.0}}

    step = ff.Step(nn.Linear(3, 1), losses, {"l": "*"}, optimizer=ff.optim.sgd(0.1))
    ff.fit(step, step.init(), batches(), steps=4, folder=tmp_path, log=(CSV(tmp_path / "log.csv")), show=False)
    assert "4,of_class.0,0.5" in (tmp_path / "log.csv").read_text()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-0000000004"]


@pytest.mark.parametrize("stop", [5, 10, 15])
def test_two_fits_in_one_program(stop, tmp_path):
    """The second is judged by what the first came to, also where the program was started again in between."""
    scores = {5: 1.0, 10: 9.0, 15: 5.0, 20: 6.0}

    def program(folder, last):
        step, data = step_of(), batches()
        state, extra = ff.checkpoint.resume(folder, step, data=data)
        evaluated = iter([scores[at] for at in scores if at > int(state.step)])
        options = {"evaluate": lambda m: next(evaluated), "evaluate_every": 5, "best": "max", "show": False}
        for steps in (10, 20):
            state, fitted = ff.fit(step, state, data, steps=min(steps, last), folder=folder, extra=extra, **options)
        return fitted

    program(tmp_path, stop)
    assert program(tmp_path, 20)[1:] == (9.0, 10)
    assert [path.name for path in checkpoints_in(tmp_path / "best")] == ["step-0000000010"]


def test_extra_that_would_be_lost_is_told(tmp_path):
    step, data = step_of(), batches()
    state, _ = ff.fit(step, step.init(), data, steps=3, folder=tmp_path, extra={"vocabulary": ["a"]}, show=False)
    with pytest.warns(UserWarning, match="holds 'vocabulary' in `extra` of step 3, and what this run saves will not"):
        ff.fit(step, state, data, steps=5, folder=tmp_path, show=False)


def test_another_run_in_the_same_folder_is_told(tmp_path, monkeypatch):
    step = step_of()
    told = "another run holds .*: two that save into it .*; give each a folder of its own"
    monkeypatch.setattr(options, "_PATIENCE", 0.2)
    with held(tmp_path), pytest.warns(UserWarning, match=told):
        ff.fit(step, step.init(), batches(), steps=3, folder=tmp_path, show=False)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork", "ignore:.*fork.*:DeprecationWarning")
def test_one_run_after_another_is_none(tmp_path):
    """Also where workers of the first, which have copies of its handles, live on."""
    step = step_of()
    data = ff.checkpoint.Batches([torch.randn(3) for _ in range(28)], 4, num_workers=1, persistent_workers=True)
    state = step.init()
    for steps in (2, 4):
        state, _ = ff.fit(step, state, data, steps=steps, folder=tmp_path, show=False)
    assert int(state.step) == 4


def sleeping(ready):
    ready.set()  # a signal that comes before Python has looked after a fork is lost with any handler of Python's
    time.sleep(60)  # until its parent ends it, or the test has failed


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_children_can_be_ended():
    """They have the handlers of their parent, which stops between steps; they do not."""
    step, ends = step_of(), []

    def evaluate(model):
        context = multiprocessing.get_context("fork")
        ready = context.Event()
        child = context.Process(target=sleeping, args=(ready,))
        child.start()
        assert ready.wait(20)
        child.terminate()
        child.join(20)
        ends.append(child.exitcode)
        return 1.0

    ff.fit(step, step.init(), batches(), steps=1, evaluate=evaluate, show=False)
    assert ends == [-signal.SIGTERM]


def test_epochs_of_a_loader_that_cannot_say_where_it_is(tmp_path):
    step = step_of()
    with pytest.warns(
        UserWarning, match=r"at the beginning of its data, and count its epochs from there \(steps= counts"
    ):
        ff.fit(step, step.init(), [torch.ones(1, 3)], epochs=1, folder=tmp_path, show=False)


def test_a_run_that_has_nothing_to_do_says_so(capsys):
    step = step_of()
    ff.fit(step, step.init(), batches(), steps=0)
    assert capsys.readouterr().out == "at step 0, and nothing to do: steps\n"


def test_what_is_no_logger(tmp_path):
    step = step_of()
    with pytest.raises(ValueError, match=r"a logger has a method log\(step, metrics\), 'x.csv' has none"):
        ff.fit(step, step.init(), batches(), steps=3, log="x.csv")
    with pytest.raises(IsADirectoryError, match="this logger writes a file, and .* is a folder"):
        CSV(tmp_path)


def stopped_by(number, handler):
    """A run that gets a signal at its third step, while a program's handler is there."""
    seen = []

    def losses(m, x):
        seen.append(x)
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return {"l": m(x).square().mean()}

    step = ff.Step(nn.Linear(3, 1), losses, {"l": "*"}, optimizer=ff.optim.sgd(0.1))
    before = signal.signal(number, handler)
    try:
        return ff.fit(step, step.init(), batches(), steps=6, show=False)
    finally:
        assert signal.getsignal(number) is handler
        signal.signal(number, before)


def test_a_handler_of_the_programs_own_is_called_afterwards():
    called = []
    state, fitted = stopped_by(signal.SIGTERM, lambda number, frame: called.append(number))
    assert (int(state.step), fitted.reason, called) == (3, "SIGTERM", [signal.SIGTERM])


def test_a_signal_and_then_an_error():
    """The handler is called, the error is raised and tells of the signal."""
    called = []

    def evaluate(model):
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError

    step = step_of()
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        with pytest.raises(ZeroDivisionError) as error:
            ff.fit(step, step.init(), batches(), steps=3, evaluate=evaluate, evaluate_every=2, show=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [signal.SIGTERM]
    assert "in a run of ff.fit, and SIGTERM had come; what was reached is" in error.value.__notes__[0]


class DeadWorkerError(RuntimeError):
    pass


def child_died(number, frame):
    raise DeadWorkerError


@pytest.fixture
def told_of_children():
    before = signal.signal(signal.SIGCHLD, child_died)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("told_of_children")
@pytest.mark.parametrize("is_stopping", [False, True])
@pytest.mark.parametrize("where", ["step", "save"])
def test_a_worker_that_dies_is_told_between_steps(where, is_stopping, tmp_path, monkeypatch):
    ours = running.saving

    def die():
        if is_stopping:
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGCHLD)

    def losses(m, x):
        if where == "step" and len(seen) == 2:
            die()
        seen.append(x)
        return {"l": m(x).square().mean()}

    def saving(*args, **options):
        if where == "save" and not options["background"]:
            die()
        return ours(*args, **options)

    seen, data = [], batches()
    monkeypatch.setattr(running, "saving", saving)
    step = ff.Step(nn.Linear(3, 1), losses, {"l": "*"}, optimizer=ff.optim.sgd(0.1))

    def run():
        return ff.fit(step, step.init(), data, steps=6, folder=tmp_path, show=False)

    if where == "step" and not is_stopping:
        with pytest.raises(DeadWorkerError):
            run()
    else:
        assert run()[1].reason == ("SIGTERM" if is_stopping else "steps")
    assert signal.getsignal(signal.SIGCHLD) is child_died
    state, _ = ff.checkpoint.resume(tmp_path, step, data=data)
    assert (int(state.step), data.position) == ((3, 3) if where == "step" else (6, 6))


@pytest.mark.usefixtures("told_of_children")
def test_a_handler_that_was_installed_meanwhile_stays():
    step, installed = step_of(), lambda number, frame: None
    ff.fit(step, step.init(), batches(), steps=1, evaluate=lambda m: bool(signal.signal(signal.SIGCHLD, installed)))
    assert signal.getsignal(signal.SIGCHLD) is installed


def test_a_signal_that_a_program_ignores_is_ignored():
    state, fitted = stopped_by(signal.SIGINT, signal.SIG_IGN)
    assert (int(state.step), fitted.reason) == (6, "steps")


GROUP = """
import sys, time, torch, funcfreeze as ff

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.full((3,), float(index)) / 40

LOADER, LENGTH = sys.argv[2], 0.05 if sys.argv[2] != "persistent" else 0.005

def losses(model, x):
    out, start = model(x), time.monotonic()
    while time.monotonic() - start < LENGTH:
        torch.ones(3) + 1
    return {"fit": out.square().mean()}

if LOADER == "persistent":  # steps are short, and a save takes its time
    from funcfreeze.checkpoint import saving
    write_tensors = saving.write_tensors
    saving.write_tensors = lambda *args: time.sleep(0.4) or write_tensors(*args)

if __name__ == "__main__":
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    step = ff.Step(model, losses, {"fit": "*"}, optimizer=ff.optim.adam(0.01))
    if LOADER != "torchdata":
        data = ff.checkpoint.Batches(Items(), 4, seed=1, num_workers=2, persistent_workers=LOADER == "persistent")
    else:
        from torchdata.stateful_dataloader import StatefulDataLoader
        data = StatefulDataLoader(Items(), 4, num_workers=2)
    state, extra = ff.checkpoint.resume(sys.argv[1], step, data=data)
    steps = 12 if LENGTH > 0.01 else 300
    state, fitted = ff.fit(step, state, data, steps=steps, folder=sys.argv[1], extra=extra, show_every=1)
    torch.save({**state.params, "reason": fitted.reason}, sys.argv[1] + "/end")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize(
    ("loader", "number"),
    [
        ("ours", signal.SIGTERM),
        ("ours", signal.SIGINT),
        ("persistent", signal.SIGTERM),
        ("torchdata", signal.SIGTERM),
    ],
)
def test_a_signal_to_all_processes_of_a_run(loader, number, tmp_path):
    """Its loader's workers die of it; the run ends its step, saves, and goes on bit for bit."""
    script = tmp_path / "script.py"
    source = (
        GROUP if loader != "torchdata" else GROUP.replace("torch.nn.Dropout(0.5)", "torch.nn.Tanh()")
    )  # it draws, too
    script.write_text(textwrap.dedent(source))

    def run(folder, delay=None):
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, str(script), str(tmp_path / folder), loader]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes, start_new_session=True) as process:
            if delay is not None:
                while not process.stdout.readline().startswith("step 4/"):
                    pass
                time.sleep(delay)  # at another moment of a step
                os.killpg(process.pid, number)
            out, errors = process.communicate()
        assert process.returncode == 0, errors
        return out, errors, torch.load(tmp_path / folder / "end")

    wanted = run("whole")[2]
    for attempt, delay in enumerate([0.0, 0.03]):
        out, errors, stopped = run(str(attempt), delay)
        assert stopped["reason"] == number.name
        assert f"stopped by {number.name} after step" in out
        assert errors.count("stopping after this step") == 1, errors
        end = run(str(attempt))[2]
        assert all(torch.equal(end[path], tensor) for path, tensor in wanted.items() if path != "reason")
