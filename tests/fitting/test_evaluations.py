"""Evaluations judge a run and leave it alone; what they came to goes on with it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import funcfreeze as ff
from funcfreeze.checkpoint.folder import checkpoints_in


def step_of():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    return ff.Step(model, noisy, {"l": "*"}, optimizer=ff.optim.adam(0.1))


def noisy(model, x):
    return {"l": model(x + random.random() + float(np.random.rand())).square().mean()}


def batches(count=28):
    generator = torch.Generator().manual_seed(3)
    return ff.checkpoint.Batches(torch.randn(count, 3, generator=generator), 4, seed=3)


def drawing(model):
    """Over a shuffled loader, with dropout, and noise of Python's and NumPy's."""
    loader = DataLoader(TensorDataset(torch.ones(6, 3)), 2, shuffle=True)
    return sum(float(model(x).mean()) for (x,) in loader) + random.random() + np.random.rand()


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def assert_same(one, other):
    assert all(torch.equal(one.params[path], tensor) for path, tensor in other.params.items())


@pytest.mark.parametrize("every", [1, 3, 100])
def test_what_they_draw_changes_nothing(every):
    ends = []
    for options in ({}, {"evaluate": drawing, "evaluate_every": every}):
        step = step_of()
        seed_all(9)
        state, _ = ff.fit(step, step.init(), batches(), steps=16, show=False, **options)
        ends.append((state, torch.rand(2), random.random(), np.random.rand()))
    assert_same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2:] == ends[1][2:]


def test_ten_steps_and_then_six_are_sixteen(tmp_path):
    options = {"evaluate": drawing, "evaluate_every": 4, "show": False}
    step = step_of()
    seed_all(9)
    wanted, _ = ff.fit(step, step.init(), batches(), steps=16, **options)
    seed_all(9)
    for steps in (10, 16):
        data = batches()
        state, _ = ff.checkpoint.resume(tmp_path, step, data=data)
        state, _ = ff.fit(step, state, data, steps=steps, folder=tmp_path, **options)
        seed_all(steps)  # another process
    assert_same(state, wanted)


def test_the_best_can_be_gone_on_with(tmp_path):
    """From the best, on other ground: as the run that went by there."""
    values = iter([3.0, 1.0, 2.0, 2.0])
    options = {"evaluate": lambda model: next(values), "evaluate_every": 4, "show": False}
    step, data = step_of(), batches()
    seed_all(9)
    wanted, fitted = ff.fit(step, step.init(), data, steps=16, folder=tmp_path / "first", **options)
    assert fitted.best_step == 8
    data = batches()
    state, extra = ff.checkpoint.resume(tmp_path / "first" / "best", step, data=data)
    assert int(state.step) == 8
    state, _ = ff.fit(step, state, data, steps=16, folder=tmp_path / "second", extra=extra, show=False)
    assert_same(state, wanted)


def test_what_they_came_to_is_known_without_extra(tmp_path):
    step, values = step_of(), iter([1.0, 2.0, 3.0])
    options = {"evaluate": lambda model: next(values), "evaluate_every": 4, "folder": tmp_path, "show": False}
    ff.fit(step, step.init(), batches(), steps=4, **options)
    data = batches()
    state, _ = ff.checkpoint.resume(tmp_path, step, data=data)
    _, fitted = ff.fit(step, state, data, steps=12, extra={"mine": 3}, **options)
    assert (fitted.best, fitted.best_step) == (1.0, 4)
    assert [path.name for path in checkpoints_in(tmp_path / "best")] == ["step-0000000004"]
    assert ff.checkpoint.resume(tmp_path, step, data=data)[1]["mine"] == 3


def test_what_is_best_stays_what_it_was(tmp_path):
    step, data = step_of(), batches()
    options = {"evaluate": lambda model: {"loss": 1.0}, "evaluate_every": 2, "folder": tmp_path, "show": False}
    state, _ = ff.fit(step, step.init(), data, steps=4, **options)
    told = r"best is 'max', and the evaluations so far were judged by 'min' \(loss 1.0 at step 2\)"
    with pytest.raises(ValueError, match=told):
        ff.fit(step, state, data, steps=8, best="max", **options)
    assert int(state.step) == 4
    other = {**options, "evaluate": lambda model: {"accuracy": 0.5, "loss": 1.0}}
    with pytest.raises(ValueError, match="judged by 'loss', .* and now that is 'accuracy'; keep the order") as error:
        ff.fit(step, state, data, steps=8, **other)
    assert "step-0000000006" in "".join(error.value.__notes__)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ([], "list"),
        (DataLoader([torch.ones(3)], 4, drop_last=True), "DataLoader"),
    ],
    ids=["list", "loader"],
)
@pytest.mark.parametrize("end", ["steps", "epochs"])
@pytest.mark.filterwarnings("ignore:.*cannot say where it is")
def test_data_without_a_batch(data, kind, end, tmp_path):
    step = step_of()
    state = step.init()
    with pytest.raises(ValueError, match=f"data gave no batch: {kind} is empty") as error:
        ff.fit(step, state, data, **{end: 3}, folder=tmp_path, show=False)
    assert "not saved, since no step was taken" in "".join(error.value.__notes__)
    assert [*tmp_path.iterdir()] == []
    assert int(state.step) == 0


def test_a_run_that_is_over_is_left_alone(tmp_path):
    step, data = step_of(), batches()
    ff.fit(step, step.init(), data, epochs=2, folder=tmp_path, show=False)
    before = (tmp_path / "step-0000000014").stat().st_mtime_ns
    state, _ = ff.checkpoint.resume(tmp_path, step, data=data)
    with pytest.warns(UserWarning, match="nothing to do: these Batches have been gone through 2 times, and epochs=2"):
        state, fitted = ff.fit(step, state, data, epochs=2, folder=tmp_path, show=False)
    assert (int(state.step), fitted.reason) == (14, "epochs")
    assert (tmp_path / "step-0000000014").stat().st_mtime_ns == before
