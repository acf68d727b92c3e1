"""2n steps are n steps, a stop, and n steps more: bit for bit, and of everything."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict, deque
from typing import NamedTuple

import numpy as np
import optree
import pytest
import safetensors
import torch
from full_runs import by_turns, lone, network, train
from torch import nn

import funcfreeze as ff

KINDS = {"lone": lone, "by turns": by_turns}


def seed_all():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def assert_same(one, other):
    mine, theirs = (optree.tree_flatten_with_path(state) for state in (one, other))
    assert mine[0] == theirs[0]
    for path, x, y in zip(mine[0], mine[1], theirs[1], strict=True):
        assert (x.dtype, x.stride()) == (y.dtype, y.stride()), path
        assert torch.equal(x.isnan(), y.isnan()), path
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "compile", [False, pytest.param({"backend": "aot_eager"}, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("background", [False, True], ids=["", "in the background"])
def test_a_run_that_is_stopped_goes_on_as_it_would_have(kind, compile, background, tmp_path):
    model = network()
    whole, log = KINDS[kind](copy.deepcopy(model), compile=compile), []
    seed_all()
    wanted = train(whole, whole.init(), 8, log)

    seed_all()
    step = KINDS[kind](copy.deepcopy(model), compile=compile)
    state = train(step, step.init(), 4)
    at = ff.checkpoint.save(tmp_path, step, state, extra={"best": (0.5, float("inf"))}, background=background)
    assert at == tmp_path / "step-0000000004"
    train(step, state, 2)  # overwrites the state, and is lost
    seed_all()
    again = KINDS[kind](network(), compile=compile)
    own = []
    state, extra = ff.checkpoint.resume(tmp_path, again)
    assert extra == {"best": (0.5, float("inf"))}
    found = train(again, state, 4, own)
    assert_same(found, wanted)
    for seen, expected in zip(own, log[4:], strict=True):
        assert seen.keys() == expected.keys()
        assert all(torch.equal(seen[name].nan_to_num(9.0), expected[name].nan_to_num(9.0)) for name in seen)
    assert ff.checkpoint.check(tmp_path) == []


def test_an_empty_folder_starts(tmp_path):
    step = lone(network())
    state, extra = ff.checkpoint.resume(tmp_path / "none", step)
    assert (int(state.step), extra) == (0, {})
    assert not (tmp_path / "none").exists()


def test_generators_of_the_users_own_and_what_data_says(tmp_path):
    class Stream:
        def __init__(self):
            self.at = 0

        def state_dict(self):
            return {"at": self.at, 3: [b"bytes", torch.arange(2)]}

        def load_state_dict(self, state):
            assert state[3][0] == b"bytes"
            assert torch.equal(state[3][1], torch.arange(2))
            self.at = state["at"]

    own = {"torch": torch.Generator().manual_seed(5), "python": random.Random(6), "numpy": np.random.default_rng(7)}
    step, stream = lone(network()), Stream()
    stream.at = 17
    ff.checkpoint.save(tmp_path, step, step.init(), data=stream, generators=own)
    drawn = torch.rand(3, generator=own["torch"]), own["python"].random(), own["numpy"].random()
    other = Stream()
    ff.checkpoint.resume(tmp_path, step, data=other, generators=own)
    assert other.at == 17
    assert torch.equal(torch.rand(3, generator=own["torch"]), drawn[0])
    assert (own["python"].random(), own["numpy"].random()) == drawn[1:]
    with pytest.raises(ValueError, match="where the data was cannot be restored, since data= was not given"):
        ff.checkpoint.resume(tmp_path, step, generators=own)
    with pytest.raises(ValueError, match="the checkpoint holds generators 'torch', 'python', 'numpy', given were none"):
        ff.checkpoint.resume(tmp_path, step, data=other)


def test_memory_formats_and_kinds_of_numbers(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.by_point = nn.Conv2d(4, 4, 1).to(memory_format=torch.channels_last)  # contiguous in two ways at once
            self.turned = nn.Parameter(torch.randn(3, 5).T.clone(memory_format=torch.preserve_format))
            self.wave = nn.Parameter(torch.randn(3, dtype=torch.complex128))
            self.short = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
            self.register_buffer("seen", torch.tensor([True, False]))

    def all_of_it(model, x):
        rest = model.turned.sum() + model.wave.abs().sum() + model.short.double().sum()
        return {"l": model.by_point(model.conv(x)).sin().mean() + 0.1 * rest}

    model = Odd()
    step = ff.Step(model, all_of_it, {"l": "*"}, optimizer=ff.optim.adam(0.1))
    state, _ = step(step.init(), torch.randn(2, 3, 8, 8))
    at = ff.checkpoint.save(tmp_path, step, state)
    found, _ = ff.checkpoint.load(at, step)
    assert_same(found, state)
    assert state.params["by_point.weight"].stride() == (4, 1, 4, 4)
    with safetensors.safe_open(at / "tensors.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("params/conv.weight"), state.params["conv.weight"].contiguous())
    plain = ff.checkpoint.load_into(Odd(), at)
    assert all(torch.equal(p, state.params[path]) for path, p in plain.named_parameters())


class Kept(NamedTuple):
    history: deque
    by_path: OrderedDict


def windowed(rate, length=3):
    """A user's own: the mean of the last gradients, in containers of every kind."""

    def init(params):
        zeros = OrderedDict((path, torch.zeros_like(p)) for path, p in reversed(params.items()))
        return defaultdict(list, kept=Kept(deque([zeros], maxlen=length), OrderedDict(zeros)), seen=[0, (1, None)])

    def update(grads, state, params, *, step=None):
        assert type(state) is defaultdict
        assert state.default_factory is list
        kept = state["kept"]
        assert [type(part) for part in (kept, *kept)] == [Kept, deque, OrderedDict]
        assert kept.history.maxlen == length
        history = deque(kept.history, maxlen=length)
        history.append(OrderedDict((path, grads[path]) for path in kept.by_path))
        moved = {path: -rate * sum(old[path] for old in history) / len(history) for path in grads}
        state = defaultdict(list, kept=Kept(history, kept.by_path), seen=[state["seen"][0] + 1, (1, None)])
        return moved, state

    return ff.optim.Transform(init, update)


def test_containers_of_every_kind_in_an_optimizers_state(tmp_path):
    step = ff.Step(nn.Linear(3, 2), lambda m, x: {"l": m(x).sin().mean()}, {"l": "*"}, optimizer=windowed(0.3))
    data = torch.randn(9, 4, 3)
    wanted, state = step.init(), step.init()
    for x in data:
        wanted, _ = step(wanted, x)
        state, _ = step(state, x)
        ff.checkpoint.save(tmp_path, step, state, keep=1)
        state, _ = ff.checkpoint.resume(tmp_path, step)
    assert all(torch.equal(state.params[path], p) for path, p in wanted.params.items())
    assert state.optimizer["seen"] == [9, (1, None)]


def test_it_is_the_state_of_that_moment(tmp_path):
    """A donating step overwrites what was given to it, while the thread still writes."""
    step = lone(
        nn.ModuleDict(
            {
                "trunk": nn.Sequential(nn.Linear(4, 400), nn.BatchNorm1d(400)),
                "a": nn.Linear(400, 2),
                "b": nn.Linear(400, 1),
            }
        )
    )
    state = step.init()
    for _ in range(4):
        wanted = {path: tensor.clone() for path, tensor in state.params.items()}
        at = ff.checkpoint.save(tmp_path, step, state, background=True)
        state = train(step, state, 3)
        found, _ = ff.checkpoint.load(at, lone(copy.deepcopy(step.module)))
        assert all(torch.equal(found.params[path], tensor) for path, tensor in wanted.items())
    assert len([*tmp_path.iterdir()]) == 3
