"""What a checkpoint is loaded into: the same step, another one, other data, other versions, another folder."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from full_runs import lone, network, train
from torch import nn

import funcfreeze as ff
from funcfreeze.checkpoint import folder, versions


def small(buffer=None):
    model = nn.Linear(2, 1)
    model.register_buffer("seen", torch.zeros(2) if buffer is None else buffer)
    return ff.Step(model, lambda m, x: {"l": m(x).square().mean()}, {"l": "*"}, optimizer=ff.optim.adam(0.1))


@pytest.mark.parametrize("other", [torch.zeros(5), torch.zeros(2, dtype=torch.int32)], ids=["shape", "dtype"])
def test_buffers_that_begin_otherwise(other, tmp_path):
    step = small()
    ff.checkpoint.save(tmp_path, step, step.init())
    with pytest.raises(
        ValueError, match=r"buffer seen: it begins as \(2,\) float64 in the checkpoint, as .* in this step"
    ):
        ff.checkpoint.resume(tmp_path, small(other))


def test_buffers_whose_shape_a_forward_changes(tmp_path):
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("seen", torch.zeros(0, 3))

        def forward(self, x):
            self.seen = torch.cat([self.seen, x.detach()])
            return (self.weight * self.seen.mean(0)).sum()

    def step_of():
        return ff.Step(Growing(), lambda m, x: {"l": m(x)}, {"l": "*"}, optimizer=ff.optim.sgd(0.1))

    step = step_of()
    state = train_small(step, step.init(), torch.randn(3, 2, 3))
    ff.checkpoint.save(tmp_path, step, state)
    found, _ = ff.checkpoint.resume(tmp_path, step_of())
    assert torch.equal(found.buffers["seen"], state.buffers["seen"])


def train_small(step, state, data):
    for x in data:
        state, _ = step(state, x)
    return state


def test_other_versions_are_told(tmp_path, monkeypatch):
    step = small()
    ff.checkpoint.save(tmp_path, step, step.init())
    present = versions.versions()
    monkeypatch.setattr(versions, "versions", lambda: {**present, "torch": "9.9"})
    told = f"saved with torch {torch.__version__}, here is 9.9: the run may not go on bit for bit"
    with pytest.warns(UserWarning, match=re.escape(told)):
        ff.checkpoint.resume(tmp_path, step)


def test_a_folder_stands_for_its_newest(tmp_path):
    step = small()
    state = step.init()
    with pytest.raises(ValueError, match="is no checkpoint: no manifest.json is in it"):
        ff.checkpoint.load(tmp_path, step)
    for x in torch.randn(3, 4, 2):
        state, _ = step(state, x)
        at = ff.checkpoint.save(tmp_path, step, state, extra={"mine": int(state.step)})
    found, extra = ff.checkpoint.load(tmp_path, step)
    assert (int(found.step), extra) == (3, {"mine": 3})
    plain = ff.checkpoint.load_into(small().model, tmp_path)
    assert torch.equal(plain.weight, state.params["weight"])
    plain = ff.checkpoint.load_into(small().model, at / "tensors.safetensors")
    assert torch.equal(plain.weight, state.params["weight"])
    (at / "manifest.json").write_text("damaged")
    with pytest.warns(UserWarning, match="step-0000000002 is the newest that is whole; newer ones are damaged"):
        assert int(ff.checkpoint.load(tmp_path, step)[0].step) == 2


def test_a_name_that_is_not_of_its_step(tmp_path):
    step = small()
    at = ff.checkpoint.save(tmp_path, step, step.init())
    shutil.copytree(at, tmp_path / "step-0000000007")
    assert ff.checkpoint.check(tmp_path) == [f"{tmp_path / 'step-0000000007'}: it is of step 0, and its name says 7"]


def test_going_on_with_other_routes(tmp_path):
    data = ff.checkpoint.Batches(torch.randn(40, 2), 4)
    step = small()
    state = step.init()
    for _, x in zip(range(5), data, strict=False):
        state, _ = step(state, x)
    ff.checkpoint.save(tmp_path, step, state, data=data, extra={"mine": 1})
    drawn = torch.rand(2)
    torch.manual_seed(5)
    other = ff.Step(step.model, step.losses, {"l": {"weight": 0.5}}, optimizer=ff.optim.adam(0.1))
    again = ff.checkpoint.Batches(torch.randn(40, 2), 4)
    with pytest.raises(ValueError, match="plan: weight is routed"):
        ff.checkpoint.resume(tmp_path, other, data=again)
    assert again.position == 0
    with pytest.warns(UserWarning, match="bias"):
        found, extra = ff.checkpoint.resume(tmp_path, other, data=again, strict=False)
    assert (int(found.step), again.position, extra) == (5, 5, {"mine": 1})
    assert torch.equal(torch.rand(2), drawn)
    assert torch.equal(found.params["weight"], state.params["weight"])


class Loader:
    """As torchdata's: it says what it is like beside its position."""

    def __init__(self, batch_size, num_workers=0, length=10):
        self.batch_size, self.num_workers, self.length, self.at = batch_size, num_workers, length, 0

    def __len__(self):
        return self.length

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_other_data_is_told_and_nothing_moves(tmp_path):
    step, loader = small(), Loader(2)
    loader.at = 3
    ff.checkpoint.save(tmp_path, step, step.init(), data=loader)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    torch.rand(3)
    drawn = torch.get_rng_state()
    other = Loader(5, num_workers=1, length=4)
    told = "the position is that of other data: batch_size was 2, is 5; len was 10, is 4. Make it so again"
    with pytest.raises(ValueError, match=told):
        ff.checkpoint.resume(tmp_path, step, data=other)
    assert other.at == 0
    assert torch.equal(torch.get_rng_state(), drawn)
    same = Loader(2, num_workers=3)  # which is its own affair
    ff.checkpoint.resume(tmp_path, step, data=same)
    assert same.at == 3
    assert torch.equal(torch.get_rng_state(), before[0])


def test_a_model_is_no_data(tmp_path):
    step = small()
    with pytest.raises(TypeError, match="Linear cannot say where it is"):
        ff.checkpoint.save(tmp_path, step, step.init(), data=step.model)


def test_another_numpy_generator_is_told_before_anything_moves(tmp_path):
    step, data = small(), ff.checkpoint.Batches(range(10), 2)
    at = ff.checkpoint.save(tmp_path, step, step.init(), data=data)
    manifest = at / "manifest.json"
    lines = manifest.read_text().split("\n", 1)
    changed = lines[1].replace('"MT19937"', '"PCG64"')

    manifest.write_text(f'{{"sha256": "{hashlib.sha256(changed.encode()).hexdigest()}",\n{changed}')
    assert json.loads(manifest.read_text())["step"] == 0
    next(iter(data))
    with pytest.raises(ValueError, match="NumPy's global generator is MT19937, that of the checkpoint PCG64"):
        ff.checkpoint.resume(tmp_path, step, data=data)
    assert data.position == 1


def test_folders_in_which_a_run_would_silently_begin(tmp_path):
    step = small()
    ff.checkpoint.save(tmp_path / "run", step, step.init())
    with pytest.warns(UserWarning, match=r"holds no checkpoint, so that the run begins; there are some in .*run$"):
        ff.checkpoint.resume(tmp_path, step)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"link is a link to .*gone, which is not there"):
        ff.checkpoint.resume(tmp_path / "link", step)


def test_a_file_by_the_name_of_a_checkpoint_is_none(tmp_path):
    step = small()
    ff.checkpoint.save(tmp_path, step, step.init())
    (tmp_path / "step-0000000009").write_text("")
    assert int(ff.checkpoint.resume(tmp_path, step)[0].step) == 0
    assert ff.checkpoint.check(tmp_path) == []


class TwoAtOnce:
    """Two loaders side by side, as in domain adaptation, of different lengths."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.loaders = [
            ff.checkpoint.Batches(torch.randn(items, 2, generator=generator), 4, seed=seed)
            for seed, items in enumerate((22, 13))
        ]

    def __iter__(self):
        return zip(*self.loaders, strict=False)

    def state_dict(self):
        return {"loaders": [loader.state_dict() for loader in self.loaders]}

    def load_state_dict(self, state):
        for loader, one in zip(self.loaders, state["loaders"], strict=True):
            loader.load_state_dict(one)


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 9])
def test_two_loaders_at_once(stop, tmp_path):
    def program(folder, steps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))

        def losses(m, pair):
            return {"l": m(pair[0]).square().mean() - m(pair[1]).sin().mean()}

        step, data = ff.Step(model, losses, {"l": "*"}, optimizer=ff.optim.adam(0.1)), TwoAtOnce()
        state, extra = ff.checkpoint.resume(folder, step, data=data)
        return ff.fit(step, state, data, steps=steps, folder=folder, extra=extra, show=False)[0]

    wanted = program(tmp_path / "whole", 12)
    program(tmp_path / "parts", stop)
    found = program(tmp_path / "parts", 12)
    assert all(torch.equal(found.params[path], tensor) for path, tensor in wanted.params.items())


def test_a_folder_in_it_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    iterdir = Path.iterdir

    def refused(path):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    step = small()
    assert int(ff.checkpoint.resume(tmp_path, step)[0].step) == 0


@pytest.mark.parametrize("when", ["before it is checked", "before it is read"])
def test_one_that_another_process_exchanges_meanwhile(when, tmp_path, monkeypatch):
    step = small()
    state = step.init()
    first = ff.checkpoint.save(tmp_path, step, state, keep=1)
    state, _ = step(state, torch.ones(1, 2))
    ours, calls = folder.good, []

    def good(path):
        calls.append(path)
        if len(calls) > 1:
            return ours(path)
        manifest = ours(path) if when == "before it is read" else None
        ff.checkpoint.save(tmp_path, step, state, keep=1)
        assert not first.exists()
        return manifest or ours(path)

    monkeypatch.setattr(folder, "good", good)
    assert int(ff.checkpoint.load(tmp_path, step)[0].step) == 1


def test_after_a_damaged_newest_one_nothing_is_warned_of_twice(tmp_path):
    step, data = small(), ff.checkpoint.Batches(torch.randn(40, 2), 4)
    ff.fit(step, step.init(), data, steps=4, folder=tmp_path, save_every=2, show=False)
    (tmp_path / "step-0000000004" / "manifest.json").write_text("damaged")
    with pytest.warns(UserWarning, match="step-0000000002 is the newest that is whole") as caught:
        state, _ = ff.checkpoint.resume(tmp_path, step, data=data)
    assert caught[0].filename == __file__
    state, _ = ff.fit(step, state, data, steps=4, folder=tmp_path, show=False)
    assert ff.checkpoint.check(tmp_path) == []


def test_arguments_that_are_exchanged(tmp_path):
    step = small()
    state = step.init()
    with pytest.raises(TypeError, match="step is a Step or an alternation, got State"):
        ff.checkpoint.save(tmp_path, state, step)
    with pytest.raises(TypeError, match="state is a State, such as step.init\\(\\) gives, got NoneType"):
        ff.fit(step, None, [torch.ones(1, 2)], steps=1)
    with pytest.raises(TypeError, match="generators"):
        ff.checkpoint.resume(tmp_path, step, generators={"mine": 3})


def test_a_loaded_state_is_the_steps_own(tmp_path):
    """Nothing has to be copied before it is overwritten, and the model's own tensors are not in it."""
    step = lone(network())
    state = train(step, step.init(), 2)
    at = ff.checkpoint.save(tmp_path, step, state)
    found, _ = ff.checkpoint.load(at, step)
    places = {path: tensor.data_ptr() for path, tensor in found.params.items()}
    own = {parameter.data_ptr() for parameter in step.module.parameters()}
    assert not own & set(places.values())
    found, _ = step(found, torch.randn(6, 4))
    assert {path: tensor.data_ptr() for path, tensor in found.params.items()} == places
