"""`fit` is the loop one writes by hand: the same state, the same metrics, and a way out that loses nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import funcfreeze as ff
from funcfreeze.fitting import CSV, JSONLines, TensorBoard, numbers
from funcfreeze.fitting.progress import Progress


def losses(model, x):
    h = model["trunk"](x).tanh()
    return {"a": model["a"](h).square().mean(), "b": model["b"](h).sin().mean()}, {"seen": x.sum(), "note": "text"}


def network():
    torch.manual_seed(1)
    return nn.ModuleDict({"trunk": nn.Linear(3, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})


def step_of(model=None):
    return ff.Step(
        model or network(), lambda m, x: losses(m, x), {"a": "*", "b": "trunk"}, optimizer=ff.optim.adam(0.01)
    )


def batches(count=7):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(5, 3, generator=generator) for _ in range(count)]


def by_hand(steps, data):
    step = step_of()
    state, history = step.init(), []
    for index in range(steps):
        state, metrics = step(state, data[index % len(data)])
        history.append({name: float(metrics[name]) for name in ("a", "b", "seen")})
    return state, history


class Noting:
    def __init__(self):
        self.rows = []

    def log(self, step, metrics):
        self.rows.append((step, dict(metrics)))


def assert_same(one, other):
    assert all(torch.equal(one.params[path], tensor) for path, tensor in other.params.items())


@pytest.mark.parametrize("kind", ["list", "loader", "stream", "batches"])
def test_it_is_the_loop_by_hand(kind):
    data = batches()
    given = {
        "list": data,
        "loader": torch.utils.data.DataLoader(data, batch_size=None),
        "stream": (data[index % 7] for index in range(1_000)),
        "batches": ff.checkpoint.Batches(data, 1, shuffle=False, collate_fn=lambda items: items[0]),
    }[kind]
    wanted, history = by_hand(17, data)
    noting, step = Noting(), step_of()
    state, fitted = ff.fit(step, step.init(), given, steps=17, log=noting, show_every=1, show=False)
    assert_same(state, wanted)
    assert noting.rows == [(index + 1, row) for index, row in enumerate(history)]
    assert fitted == ("steps", None, None)


def test_epochs_and_data_that_ends():
    step = step_of()
    state, fitted = ff.fit(step, step.init(), batches(), epochs=3, show=False)
    assert (int(state.step), fitted.reason) == (21, "epochs")
    state, fitted = ff.fit(step, state, iter(batches()), steps=100, show=False)
    assert (int(state.step), fitted.reason) == (28, "data")
    state, fitted = ff.fit(step, state, batches(), steps=20, show=False)
    assert (int(state.step), fitted.reason) == (28, "steps")
    kept = ff.checkpoint.Batches(batches(), 2)
    state, _ = ff.fit(step_of(), step_of().init(), kept, epochs=2, show=False)
    assert (int(state.step), kept.epoch) == (8, 2)


class Reading(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self):
        super().__init__()
        self.read = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.read += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stop", [6, 7, 8, 14])
def test_stopped_where_an_epoch_ends(stop):
    wanted, _ = by_hand(20, batches())
    step, data = step_of(), ff.checkpoint.Batches(batches(), 1, shuffle=False, collate_fn=lambda items: items[0])
    state, _ = ff.fit(step, step.init(), data, steps=stop, show=False)
    again = ff.checkpoint.Batches(batches(), 1, shuffle=False, collate_fn=lambda items: items[0])
    again.load_state_dict(data.state_dict())
    state, fitted = ff.fit(step, state, again, steps=20, show=False)
    assert fitted.reason == "steps"
    assert_same(state, wanted)
    assert ff.fit(step, state, iter([]), steps=30, show=False)[1].reason == "data"


def test_nothing_waits_but_what_is_shown(monkeypatch):
    step, noting, fetched = step_of(), Noting(), []
    state = step.init()
    ours = numbers._fetched
    monkeypatch.setattr(numbers, "_fetched", lambda tensors: fetched.append(len(tensors)) or ours(tensors))
    with Reading() as reading:
        state, _ = ff.fit(step, state, batches(9), steps=9, log=noting, show_every=5, show=False)
    assert [step for step, _ in noting.rows] == [5, 9]
    assert fetched == [3, 3]
    assert reading.read <= 1, "the count of steps, once"


def test_evaluation_best_and_patience(tmp_path):
    values = iter([0.5, 0.7, float("nan"), 0.6, 0.65, 0.1])
    step, noting = step_of(), Noting()
    seen = []

    def evaluate(model):
        seen.append(model)
        return {"accuracy": torch.tensor(next(values)), "other": 3}

    state, fitted = ff.fit(
        step,
        step.init(),
        ff.checkpoint.Batches(batches(), 1, collate_fn=lambda items: items[0]),
        steps=100,
        evaluate=evaluate,
        evaluate_every=2,
        best="max",
        patience=3,
        folder=tmp_path,
        log=noting,
        show_every=1,
        show=False,
    )
    assert fitted == ("patience", pytest.approx(0.7), 4)
    assert int(state.step) == 10
    assert noting.rows[-1][1]["eval/accuracy"] == pytest.approx(0.65)
    assert all(model is step.module for model in seen)
    best, extra = ff.checkpoint.load(tmp_path / "best" / "step-0000000004", step)
    assert int(best.step) == 4
    assert extra["fit"]["evaluations"]["best"] == pytest.approx(0.7)
    _, extra = ff.checkpoint.resume(tmp_path, step, data=ff.checkpoint.Batches(batches(), 1))
    kept = {"aim": "max", "name": "accuracy", "best": pytest.approx(0.7), "step": 4, "since": 3}
    assert extra["fit"] == {
        "evaluations": kept,
        "metrics": {name: noting.rows[-1][1][name] for name in ["a", "b", "seen"]},
    }


def test_alternations_have_metrics_by_member():
    members = {
        "one": ff.Step(
            model := network(), lambda m, x: {"l": losses(m, x)[0]["a"]}, {"l": "*"}, optimizer=ff.optim.sgd(0.1)
        ),
        "two": ff.Step(model, lambda m, x: {"l": losses(m, x)[0]["b"]}, {"l": "b"}, optimizer=ff.optim.sgd(0.1)),
    }
    both, noting = ff.alternate(members, every={"two": 2}), Noting()
    ff.fit(both, both.init(), batches(), steps=2, log=noting, show_every=1, show=False)
    assert [sorted(row) for _, row in noting.rows] == [["one.l", "two.l"], ["one.l"]]


def test_loggers(tmp_path):
    step = step_of()
    both = [JSONLines(tmp_path / "deep" / "log.jsonl"), CSV(tmp_path / "log.csv")]
    ff.fit(step, step.init(), batches(), steps=4, log=both, show_every=2, show=False)
    rows = [json.loads(line) for line in (tmp_path / "deep" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0].keys() == {"step", "a", "b", "seen"}
    with (tmp_path / "log.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["step"], row["name"]) for row in table[:3]] == [("2", "a"), ("2", "b"), ("2", "seen")]
    assert float(table[0]["value"]) == rows[0]["a"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf's and NumPy's, inside of tensorboard
def test_tensorboard_reads_it_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step, noting = step_of(), Noting()
    both = [TensorBoard(tmp_path), noting]
    ff.fit(step, step.init(), batches(), steps=4, log=both, show_every=2, show=False)
    read = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(read.Tags()["scalars"]) == ["a", "b", "seen"]
    for name in ("a", "b", "seen"):
        found = [(event.step, event.value) for event in read.Scalars(name)]
        assert found == [(at, pytest.approx(row[name], rel=1e-6)) for at, row in noting.rows]


def test_tensorboard_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard("nowhere")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_is_shown():
    plain, terminal = io.StringIO(), Terminal()
    for out in (plain, terminal):
        progress = Progress(1_000, 0, out)
        progress.show(50, {"cls": 0.123456, "ff/grad_norm": 1.0})
        progress.show(100, {"cls": 0.1})
        progress.tell("a line that stays")
        progress.end()
    lines = plain.getvalue().splitlines()
    assert lines[0].startswith("step 50/1,000  cls 0.1235  ")
    assert lines[0].endswith(" left")
    assert lines[2] == "a line that stays"
    assert terminal.getvalue().count("\r") == 4
    narrow = Terminal()
    Progress(1_000, 0, narrow).show(50, {f"loss_{index}": 0.5 for index in range(20)})
    assert max(map(len, narrow.getvalue().split("\r"))) < shutil.get_terminal_size().columns
    assert "\n" not in terminal.getvalue()[:-20]


def test_options_that_are_no_good():
    step = step_of()
    state = step.init()
    with pytest.raises(ValueError, match="fit: one of steps= and epochs=") as error:
        ff.fit(step, state, 3, steps=1, epochs=1, best="least", show_every=0, log=[print])
    for told in (
        "got steps=1 and epochs=1",
        "best is 'min' or 'max', got 'least'",
        "got int",
        "show_every is a whole number, at least 1, got 0",
        "a logger has a method",
    ):
        assert told in str(error.value)
    with pytest.raises(TypeError, match="evaluate returns a number"):
        ff.fit(step, state, batches(), steps=1, evaluate=lambda model: {}, evaluate_every=1, show=False)


def test_a_loader_that_cannot_say_where_it_is(tmp_path):
    step = step_of()
    with pytest.warns(
        UserWarning, match="list cannot say where it is: a run that is stopped will go on at the beginning"
    ):
        ff.fit(step, step.init(), batches(), steps=2, folder=tmp_path, show=False)


def test_in_another_thread_signals_are_left_alone():
    found = []
    step = step_of()
    thread = threading.Thread(target=lambda: found.append(ff.fit(step, step.init(), batches(), steps=3, show=False)))
    thread.start()
    thread.join()
    assert found[0][1].reason == "steps"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_returns(number, tmp_path, capsys):
    step = step_of()
    before = signal.getsignal(number)

    def data():
        for index, x in enumerate(batches(50)):
            if index == 5:
                os.kill(os.getpid(), number)
            yield x

    with pytest.warns(UserWarning, match="cannot say where it is"):
        state, fitted = ff.fit(step, step.init(), data(), steps=50, folder=tmp_path)
    assert fitted.reason == signal.Signals(number).name
    assert int(state.step) == 6
    assert signal.getsignal(number) is before
    assert int(ff.checkpoint.resume(tmp_path, step)[0].step) == 6
    told = capsys.readouterr().out
    assert f"stopped by {fitted.reason} after step 6; saved as {tmp_path / 'step-0000000006'}. The command was" in told


SCRIPT = """
import sys, torch, funcfreeze as ff
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))
step = ff.Step(model, lambda m, x: {"l": m(x[0]).square().mean()}, {"l": "*"}, optimizer=ff.optim.adam(0.01))
data = ff.checkpoint.Batches(torch.utils.data.TensorDataset(torch.arange(300.0).reshape(100, 3).sin()), 8, seed=1)
folder, steps = sys.argv[1], int(sys.argv[2])
state, extra = ff.checkpoint.resume(folder, step, data=data)
state, fitted = ff.fit(step, state, data, steps=steps, folder=folder, extra=extra, save_every=20, show_every=10)
print(fitted.reason, float(sum(p.double().sum() for p in state.params.values())))
"""


@pytest.mark.slow
def test_a_script_that_is_stopped_and_started_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def run(folder, stop_after=None):
        out = []
        command = [sys.executable, str(script), str(tmp_path / folder), "3000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                out.append(line)
                step = int(line.split()[1].split("/")[0].replace(",", "")) if line.startswith("step ") else 0
                if stop_after is not None and step > stop_after:
                    process.send_signal(signal.SIGTERM)
                    stop_after = None
        assert process.returncode == 0
        return "".join(out)

    wanted = run("whole").splitlines()[-1]
    first = run("parts", stop_after=200)
    assert "SIGTERM" in first.splitlines()[-1], first
    assert f"{script} {tmp_path / 'parts'} 3000" in first
    assert run("parts").splitlines()[-1] == wanted
