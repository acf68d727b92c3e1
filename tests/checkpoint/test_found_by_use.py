"""Ways to lose a checkpoint, or to be misled by one, that were found by trying."""

from __future__ import annotations

import contextlib
import os
import random

import numpy as np
import pytest
import torch
from full_runs import lone, network, train
from torch import nn

import funcfreeze as ff
from funcfreeze.checkpoint import Batches
from funcfreeze.checkpoint.folder import checkpoints_in


@pytest.mark.parametrize("at", range(1, 5))
def test_killed_while_the_same_step_is_saved_again(at, tmp_path, monkeypatch):
    """Whichever rename is the last: one whole checkpoint of the step is found, and goes on."""
    step = lone(network())
    state = train(step, step.init(), 1)
    ff.checkpoint.save(tmp_path, step, state, keep=1, extra={"which": "first"})
    ours, renamed = os.rename, []

    def rename(one, other):
        renamed.append(one)
        if len(renamed) == at:
            raise KeyboardInterrupt  # as if the process were gone: nothing after it happens
        ours(one, other)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr("funcfreeze.checkpoint.folder.shutil.rmtree", lambda *args, **options: None)
    with contextlib.suppress(KeyboardInterrupt):
        ff.checkpoint.save(tmp_path, step, state, keep=1, extra={"which": "second"})
    monkeypatch.undo()
    found, extra = ff.checkpoint.resume(tmp_path, step)
    assert int(found.step) == 1
    assert extra["which"] in ("first", "second")
    ff.checkpoint.save(tmp_path, step, found, keep=1, extra={"which": "third"})
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-0000000001"]
    assert ff.checkpoint.resume(tmp_path, step)[1] == {"which": "third"}


def masked(items):
    rows = torch.stack(items)
    return rows * (torch.rand(rows.shape) > 0.3) + random.random() + np.random.rand()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork", "ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_collates_draws_by_the_batch_too(workers):
    data = [torch.arange(3.0) + index for index in range(12)]
    wanted = list(Batches(data, 4, seed=1, collate_fn=masked))
    torch.rand(5)
    found = Batches(data, 4, seed=1, collate_fn=masked, num_workers=workers)
    first = next(iter(found))
    again = Batches(data, 4, seed=1, collate_fn=masked, num_workers=workers)
    again.load_state_dict({**found.state_dict(), "position": 1})
    assert all(map(torch.equal, [first, *again], wanted))


def test_a_resume_that_fails_leaves_all_generators_alone(tmp_path):
    step = lone(network())
    own = {"g": torch.Generator(), "h": random.Random(1)}
    ff.checkpoint.save(tmp_path, step, step.init(), data=Batches(range(8), 4), generators=own)
    before = torch.get_rng_state(), random.getstate(), own["g"].get_state()
    torch.rand(3), random.random(), torch.rand(1, generator=own["g"])
    now = torch.get_rng_state(), random.getstate(), own["g"].get_state()
    for options, told in [
        ({"data": Batches(range(8), 2), "generators": own}, "batch_size was 4, is 2"),
        (
            {"data": Batches(range(8), 4), "generators": {**own, "h": np.random.default_rng(1)}},
            "'h' are of another kind",
        ),
        (
            {"data": Batches(range(8), 4), "generators": {"g": random.Random(1), "h": own["h"]}},
            "'g' are of another kind",
        ),
    ]:
        with pytest.raises(ValueError, match=told):
            ff.checkpoint.resume(tmp_path, step, **options)
        assert torch.equal(torch.get_rng_state(), now[0])
        assert random.getstate() == now[1]
        assert torch.equal(own["g"].get_state(), now[2])
    ff.checkpoint.resume(tmp_path, step, data=Batches(range(8), 4), generators=own)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(own["g"].get_state(), before[2])


def test_the_program_goes_elsewhere_while_a_thread_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = lone(network())
    ff.checkpoint.save("run", step, step.init(), background=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found, _ = ff.checkpoint.resume(tmp_path / "run", step)
    assert int(found.step) == 0
    assert len(checkpoints_in(tmp_path / "run")) == 1


def test_what_is_no_folder_of_checkpoints(tmp_path):
    step = lone(network())
    at = ff.checkpoint.save(tmp_path, step, step.init())
    with pytest.raises(ValueError, match="step-0000000000 is a checkpoint; `load` takes one"):
        ff.checkpoint.resume(at, step)
    with pytest.raises(ValueError, match="manifest.json is a file"):
        ff.checkpoint.resume(at / "manifest.json", step)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight


def test_into_a_tied_module(tmp_path):
    import safetensors.torch

    for names in (("one.weight",), ("other.weight",), ("one.weight", "other.weight")):
        weight = torch.randn(3, 3)
        tensors = {name: weight.clone() for name in names} | {
            f"{part}.bias": torch.zeros(3) for part in ("one", "other")
        }
        safetensors.torch.save_file(tensors, tmp_path / "file.safetensors")
        model = ff.checkpoint.load_into(Tied(), tmp_path / "file.safetensors")
        assert torch.equal(model.one.weight, weight)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "file.safetensors").read_bytes()[:40])
    with pytest.raises(ValueError, match="cut.safetensors is no safetensors file"):
        ff.checkpoint.load_into(Tied(), tmp_path / "cut.safetensors")


def test_another_algorithm_of_the_same_form_is_told(tmp_path):
    def step_with(optimizer):
        return ff.Step(nn.Linear(2, 1), lambda m, x: {"l": m(x).mean()}, {"l": "*"}, optimizer=optimizer)

    step = step_with(ff.optim.adam(0.1))
    ff.checkpoint.save(tmp_path, step, step.init())
    for other in (ff.optim.adam(0.5), ff.optim.adam(ff.schedules.cosine(0.1, 0.0, 9))):
        ff.checkpoint.resume(tmp_path, step_with(other))
    for other, name in ((ff.optim.adamw(0.1), "AdamW"), (ff.optim.sgd(0.1), "SGD")):
        with pytest.raises(
            ValueError, match=f"optimizer: weight is updated by Adam in the checkpoint, by {name} in this"
        ):
            ff.checkpoint.resume(tmp_path, step_with(other))


def test_members_that_are_declared_otherwise_are_named(tmp_path):
    def both(weight, every, rate=ff.optim.adam):
        model = nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 1)})
        losses = {"g": lambda m, x: {"l": -m["d"](m["g"](x)).mean()}, "d": lambda m, x: {"l": m["d"](x).mean()}}
        members = {
            name: ff.Step(
                model, losses[name], {"l": {name: weight}}, optimizer=rate(0.1) if name == "g" else ff.optim.sgd(0.1)
            )
            for name in "gd"
        }
        return ff.alternate(members, every={"g": every})

    step = both(1.0, 2)
    ff.checkpoint.save(tmp_path, step, step.init())
    for other, told in [
        (
            both(0.5, 2),
            r"plan of g: g.weight and 1 more are routed \{\"l\": \[1.0\]\} in the checkpoint, \{\"l\": \[0.5\]\} in",
        ),
        (both(1.0, 3), "plan of g: turns .* in the checkpoint, .* in this step"),
        (
            both(1.0, 2, ff.optim.adamw),
            "optimizer of g: g.weight is updated by Adam in the checkpoint, by AdamW in this",
        ),
    ]:
        with pytest.raises(ValueError, match=told):
            ff.checkpoint.resume(tmp_path, other)


def test_batches_that_somebody_else_iterates_say_so():
    """An evaluation over the training batches would take them away from the training."""
    batches = Batches(range(20), 2)
    walk = iter(batches)
    next(walk)
    assert len(list(batches)) == 9
    with pytest.raises(
        RuntimeError, match="moved from batch 1 of epoch 0 to batch 0 of epoch 1 while they were iterated"
    ):
        next(walk)
    assert len(list(batches)) == 10
