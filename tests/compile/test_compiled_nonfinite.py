"""Compiled steps that are skipped or raise where something is not finite: as the eager ones."""

from __future__ import annotations

import math

import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff

GRAPH = {"backend": "aot_eager"}
ROUTES = {"task": "*", "small": {"encoder": -0.1}}
OPTIMIZERS = {
    "adamw": ff.optim.adamw(0.01, amsgrad=True),
    "chain": ff.optim.chain(ff.optim.clip_by_global_norm(0.1), ff.optim.sgd(0.05, momentum=0.9, dampening=0.1)),
    "partition": ff.optim.partition({"encoder": ff.optim.rmsprop(0.01), "head": ff.optim.adam(0.01)}),
    "pure": ff.optim.Transform(*ff.optim.adam(0.01)[:2]),
    "state_dtype": ff.optim.adam(0.01, state_dtype=torch.float32),
}


class Encoder(nn.Module):
    """With buffers that are written in place, exchanged and swapped, in half precision with NaN in it too."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)
        self.register_buffer("narrow", torch.tensor([math.nan, -0.0, 1.0, 2.0] * 8, dtype=torch.bfloat16))
        self.register_buffer("assigned", torch.zeros(6))
        self.register_buffer("one", torch.zeros(2))
        self.register_buffer("other", torch.ones(2))

    def forward(self, x):
        h = self.norm(self.linear(x)).tanh()
        self.narrow.add_(1)
        self.assigned = self.assigned * 0.5 + h.detach().mean(0)
        self.one, self.other = self.other, self.one
        return h


def network():
    return nn.ModuleDict({"encoder": Encoder(), "head": nn.Linear(6, 2)})


def losses(model, batch):
    h = model["encoder"](batch)
    return {"task": model["head"](h).square().mean(), "small": h.abs().mean()}, {"mean": h.mean()}


def batches(number=6, bad=(2,)):
    found = [torch.randn(5, 4) for _ in range(number)]
    for turn in bad:
        found[turn][1, 2] = math.nan
    return found


def bits(tree):
    named = zip(optree.tree_paths(tree), optree.tree_leaves(tree), strict=True)
    return {path: leaf.contiguous().reshape(-1).view(torch.uint8).clone().tolist() for path, leaf in named}


def changed(before, after):
    assert before.keys() == after.keys()
    return {path for path in before if before[path] != after[path]}


def close(one, other):
    for a, b in zip(optree.tree_leaves(one), optree.tree_leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)


STEP = {("step",)}
SCALE = {("optimizer", "loss_scale", "scale"), ("optimizer", "loss_scale", "growth_tracker")}


@pytest.mark.parametrize(
    ("kind", "mode", "options", "has_halves"),
    [
        *((kind, "skip", {}, kind == "adamw") for kind in OPTIMIZERS),
        ("adamw", "raise", {}, True),
        ("adamw", "skip", {"donate": False}, False),
        ("adamw", "raise", {"donate": False}, False),
        ("adamw", "skip", {"loss_scale": ff.LossScale(8.0, growth_interval=2)}, True),
        ("pure", "raise", {"loss_scale": ff.LossScale(8.0, growth_interval=2)}, False),
    ],
    ids=str,
)
def test_it_is_the_eager_step(kind, mode, options, has_halves):
    """Halves, too, where they are compiled."""
    model, given = network(), batches(bad=(1, 4))
    options = {"optimizer": OPTIMIZERS[kind], "on_nonfinite": mode, **options}
    compiled = ff.Step(model, losses, ROUTES, compile=GRAPH, **options)
    eager = ff.Step(model, losses, ROUTES, **options)
    whole, halved, expected = compiled.init(), compiled.init(), eager.init()
    for turn, batch in enumerate(given):
        before = bits(whole)
        if turn in (1, 4) and mode == "raise":
            for step, state in ((compiled, whole), (eager, expected)):
                with pytest.raises(FloatingPointError) as caught:
                    step(state, batch)
                told = str(caught.value).splitlines()
                assert told[0].startswith(f"step {int(state.step)} (counted from 0) was not taken")
                assert told[1] == "  losses: task is nan, small is nan"
                if "loss_scale" not in options:
                    assert told[2].endswith("encoder.norm.weight, encoder.norm.bias, head.weight and 1 more")
            if has_halves:
                half = compiled.compute(halved, batch)
                with pytest.raises(FloatingPointError, match="losses: task is nan"):
                    compiled.apply_gradients(halved, half)
            assert not changed(before, bits(whole))
        else:
            whole, metrics = compiled(whole, batch)
            expected, wanted = eager(expected, batch)
            others = metrics
            if has_halves:
                halved, others = compiled.apply_gradients(halved, compiled.compute(halved, batch))
            assert metrics.keys() == wanted.keys() == others.keys()
            assert metrics.keys() - {"ff/grad_norm"} == {"task", "small", "mean", "ff/skipped"}
            close(metrics, wanted)
            assert bool(others["ff/skipped"]) == bool(metrics["ff/skipped"]) == (turn in (1, 4))
            assert metrics["ff/skipped"].shape == ()
            if turn in (1, 4):
                moved = changed(before, bits(whole))
                assert moved - SCALE == STEP
                assert ("loss_scale" in options) == bool(moved & SCALE)
        close(whole, expected)
        close(halved if has_halves else whole, expected)
    assert int(whole.step) == len(given) - 2 * (mode == "raise")
    assert compiled.traces == (3 if has_halves else 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_in_inductors_code(mode):
    step = ff.Step(network(), losses, ROUTES, optimizer=OPTIMIZERS["adamw"], compile=True, on_nonfinite=mode)
    state = step.init()
    for turn, batch in enumerate(batches(4, bad=(1,))):
        before = bits(state)
        if turn == 1 and mode == "raise":
            with pytest.raises(FloatingPointError, match="task is nan"):
                step(state, batch)
            assert not changed(before, bits(state))
        else:
            state, metrics = step(state, batch)
            assert bool(metrics["ff/skipped"]) == (turn == 1) == (changed(before, bits(state)) == STEP)


def test_verify():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), "head": nn.Linear(6, 2)})
    step = ff.Step(model, losses, ROUTES, optimizer=OPTIMIZERS["adamw"], compile=GRAPH, on_nonfinite="skip")
    report = ff.verify(step, step.init(), torch.randn(5, 4), steps=2)
    assert report.ok, str(report)


def test_what_changes_its_form_cannot_be_chosen_in_a_graph():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)
            self.register_buffer("seen", torch.zeros(0, 4))

        def forward(self, x):
            self.seen = torch.cat([self.seen, x])
            return self.linear(x)

    def fit(model, x):
        return {"l": model(x).square().mean()}

    adagrad = ff.optim.from_torch(torch.optim.Adagrad, lr=0.1)
    step = ff.Step(nn.Linear(4, 2), fit, {"l": "*"}, optimizer=adagrad, on_nonfinite="skip", compile=GRAPH)
    state = step.init()
    with pytest.raises(ValueError, match="Let a Step with compile=False take the steps in which that happens"):
        step(state, torch.randn(3, 4))
    eager = ff.Step(nn.Linear(4, 2), fit, {"l": "*"}, optimizer=adagrad, on_nonfinite="skip")
    state, _ = eager(state, torch.randn(3, 4))
    for bad in (False, True, False):
        before = bits(state)
        state, metrics = step(state, torch.full((3, 4), math.nan if bad else 0.5))
        assert bool(metrics["ff/skipped"]) == bad == (changed(before, bits(state)) == STEP)

    for options in ({}, {"compile": GRAPH}):
        step = ff.Step(Growing(), fit, {"l": "*"}, optimizer=ff.optim.sgd(0.1), on_nonfinite="skip", **options)
        state = step.init()
        sizes = []
        for bad in (False, True, False):
            state, _ = step(state, torch.full((3, 4), math.nan if bad else 0.5))
            sizes.append(len(state.buffers["seen"]))
        assert sizes == [3, 3, 6]
