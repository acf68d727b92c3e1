"""Timed routes, compiled: one graph for every set of active routes, addresses that stay."""

from __future__ import annotations

import copy

import optree
import pytest
import torch

import funcfreeze as ff
import timed
from timed import OPTIMIZERS, PROGRAMS

SLOW = pytest.mark.slow
QUICK = ("a body that rests and starts afresh", "a discriminator that starts late")


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        pytest.param(name, kind, marks=() if name in QUICK and kind == "adamw" else SLOW)
        for name in PROGRAMS
        for kind in OPTIMIZERS
    ],
)
def test_a_run_equals_the_loop_that_toggles(name, optimizer):
    program, (ours, theirs) = PROGRAMS[name], OPTIMIZERS[optimizer]
    model, given = program.model(), timed.batches(program.steps)
    wanted, values, _ = timed.by_hand(program, model, given, theirs)
    step = ff.Step(copy.deepcopy(model), program.losses, program.routes, optimizer=ours, compile=timed.COMPILED)
    state, seen = timed.run(step, step.init(), given)
    timed.assert_moved_alike(model, state, wanted)
    for mine, other in zip(seen, values, strict=True):
        assert mine == pytest.approx(other, abs=1e-10)
    assert step.traces == program.active_sets


def one_layer(**options):
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 1)})

    def losses(model, x):
        return {"a": model["head"](model["body"](x)).square().mean()}

    routes = {"a": [ff.Route("head"), ff.Route("body", every=2, reset=True)]}
    return ff.Step(model, losses, routes, optimizer=ff.optim.adam(0.1), compile=timed.COMPILED, **options)


def test_the_state_stays_where_it_is_and_is_compiled_no_more():
    step = one_layer()
    state, found = step.init(), []
    for _ in range(7):
        state, _ = step(state, torch.ones(3, 2))
        tensors = [leaf for leaf in optree.tree_leaves((state.params, state.optimizer)) if leaf.ndim]
        found.append([tensor.data_ptr() for tensor in tensors])
        assert state.optimizer["body.weight"]["step"] == 1
    assert all(addresses == found[0] for addresses in found)
    assert state.optimizer["head.weight"]["step"] == 7
    assert step.traces == 2


def test_the_state_before_is_as_it_was_where_it_is_not_donated():
    step = one_layer(donate=False)
    state, _ = step(step.init(), torch.ones(3, 2))
    state, _ = step(state, torch.ones(3, 2))
    before = copy.deepcopy(state)
    step(state, torch.ones(3, 2))
    for one, other in zip(optree.tree_leaves(before), optree.tree_leaves(state), strict=True):
        assert torch.equal(one, other)
    assert state.optimizer["body.weight"]["exp_avg"].any()


def test_halves_are_a_graph_for_every_set():
    step = one_layer(donate=False)
    eager = ff.Step(step.model, step.losses, step.plan, optimizer=step.optimizer, compile=False, donate=False)
    one = other = step.init()
    for count in range(4):
        x = torch.randn(3, 2)
        half = step.compute(one, x)
        assert ("body.weight" in half.gradients) == (count % 2 == 0)
        one, _ = step.apply_gradients(one, half)
        other, _ = eager(other, x)
        for mine, theirs in zip(optree.tree_leaves(one), optree.tree_leaves(other), strict=True):
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)
    assert step.traces == 4  # two of gradients, two of updates


def test_where_nothing_is_active():
    model = timed.network()
    step = ff.Step(
        model, timed.adversarial, {"cls": ff.Route("*", start=5), "dom": ff.Route("dom", start=5)},
        optimizer=ff.optim.adamw(0.1), compile=timed.COMPILED,
    )  # fmt: skip
    start = step.init()
    before = copy.deepcopy(start)
    state, metrics = step(start, torch.randn(6, 4))
    assert metrics.keys() == {"cls", "dom"}
    assert all(map(torch.equal, before.params.values(), state.params.values()))
    assert (state.step, state.buffers["encoder.1.num_batches_tracked"]) == (1, 1)


def test_verify_sees_a_compiled_step_thaw():
    step = one_layer()
    report = ff.verify(step, step.init(), torch.randn(5, 2), steps=4)
    assert report.ok, report
