"""The routed engine does what the best hand-written code does, counted exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff
from bench.recipes import Reversal, recipe
from bench.workloads import adversarial, confusion, many_heads, mlp
from counts import matmuls, multiply_adds
from funcfreeze.gradients.graph import gradient_edge, read_graph
from funcfreeze.gradients.law import Routing
from funcfreeze.gradients.passes import plan_passes


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


def gradients(workload, batch, engine="routed"):
    step = ff.Step(workload.model, workload.losses, workload.routes, optimizer=ff.optim.sgd(0.1), engine=engine)
    state = step.init()
    return lambda: step.gradients(state, batch)


def reversal(model, batch):
    """Signed weights by hand: a reversal layer."""
    x, label, domain = batch
    h = model.encoder(x)
    back = Reversal.apply(h)
    loss = sum(F.cross_entropy(head(h), label) for head in model.classes)
    (loss + sum(F.cross_entropy(head(back), domain) for head in model.domains)).backward()


def test_signed_weights_cost_what_a_reversal_layer_does():
    workload = adversarial(width=32, size=16)
    batch = workload.batch()
    by_hand = multiply_adds(lambda: reversal(workload.model, batch))
    assert multiply_adds(gradients(workload, batch)) == by_hand
    assert multiply_adds(recipe(workload, step=False)) >= 1.6 * by_hand


def test_two_losses_of_which_one_updates_only_the_encoder():
    """The example of the design: 57 matrix products; every other way makes more."""
    workload = adversarial(width=32, size=16)
    batch = workload.batch()
    step = ff.Step(
        workload.model, workload.losses, {"cls": ["encoder", "classes"], "dom": "encoder"}, optimizer=ff.optim.sgd(0.1)
    )
    state = step.init()

    def by_hand():
        x, label, domain = batch
        for p in workload.model.domains.parameters():
            p.requires_grad_(False)
        h = workload.model.encoder(x)
        loss = sum(F.cross_entropy(head(h), label) for head in workload.model.classes)
        (loss + sum(F.cross_entropy(head(h), domain) for head in workload.model.domains)).backward()

    assert matmuls(lambda: step.gradients(state, batch)) == 57 == matmuls(by_hand)
    assert multiply_adds(lambda: step.gradients(state, batch)) == multiply_adds(by_hand)


@pytest.mark.parametrize("weights", ["numbers", "tensors", "schedules"])
def test_weights_of_every_kind_cost_nothing(weights):
    workload = confusion(width=32, size=16)
    batch = workload.batch()
    plain = multiply_adds(gradients(workload, batch))
    kind = {"numbers": 0.3, "tensors": torch.tensor(0.3), "schedules": ff.optim.dann_schedule(10)}[weights]
    step = ff.Step(
        workload.model,
        workload.losses,
        {"cls": {"encoder": kind, "classes": 1.0}, "dom": "domains", "adv": {"encoder": -0.1}},
        optimizer=ff.optim.sgd(0.1),
    )
    state = step.init()
    assert multiply_adds(lambda: step.gradients(state, batch)) == plain


@pytest.mark.parametrize("count", [2, 16])
def test_a_shared_trunk_is_walked_once(count):
    workload = many_heads(count, size=8, width=32)
    batch = workload.batch()
    summed = multiply_adds(lambda: sum(workload.losses(workload.model, batch).values()).backward())
    assert multiply_adds(gradients(workload, batch)) == summed


def test_frozen_parameters_cost_no_weight_gradient():
    model = nn.ModuleDict({"body": mlp(8, 8, 8, 8), "head": nn.Linear(8, 2)})
    losses = lambda m, batch: {"cls": m["head"](m["body"](batch)).square().mean()}  # noqa: E731
    step = ff.Step(model, losses, {"cls": "head"}, optimizer=ff.optim.sgd(0.1))
    state, batch = step.init(), torch.randn(4, 8)
    assert matmuls(lambda: step.gradients(state, batch)) == 4 + 1
    lower = ff.Step(model, losses, {"cls": "body.0"}, optimizer=ff.optim.sgd(0.1))
    state = lower.init()
    assert matmuls(lambda: lower.gradients(state, batch)) == 4 + 3 + 1, "through the frozen layers, and one weight"


def test_equal_graphs_are_planned_once():
    workload = many_heads(3, size=8, width=16)
    step = ff.Step(workload.model, workload.losses, workload.routes, optimizer=ff.optim.sgd(0.1))
    state = step.init()
    step.gradients(state, workload.batch())
    before = plan_passes.cache_info()
    for _ in range(3):
        state, _ = step(state, workload.batch())
    after = plan_passes.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 3)


def test_graphs_that_differ_are_told_apart():
    """The cache key holds everything a plan depends on: structure, which leaf is which, roots, hooks."""
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)

    def key(build, leaves=(a, b), hooked=()):
        return read_graph([gradient_edge(loss) for loss in build()], leaves, hooked)[0]

    base = key(lambda: [(a * b).sum(), a.sum()])
    assert base == key(lambda: [(a * b).sum(), a.sum()])
    assert base != key(lambda: [(b * a).sum(), a.sum()])
    assert base != key(lambda: [(a * b).sum(), b.sum()])
    assert base != key(lambda: [(a + b).sum(), a.sum()])
    assert base != key(lambda: [(a * b).sum(), a.sum()], leaves=(b, a))
    assert base != key(lambda: [(a * b).sum(), a.sum()], hooked=None)
    assert key(lambda: list((a * b).unbind()[:2])) != key(lambda: list((a * b).unbind()[1:]))


def test_nothing_is_retained_that_no_later_call_needs():
    """Without skips every call frees its part of the graph as it goes; the class heads share the encoder's call."""
    workload = adversarial(width=8, size=4)
    leaves = [p.detach().requires_grad_() for p in workload.model.parameters()]
    step = ff.Step(workload.model, workload.losses, workload.routes, optimizer=ff.optim.sgd(0.1))
    params = dict(zip(step.plan.paths, leaves, strict=True))
    with step.functional.holding(params, {}):
        losses = workload.losses(step.module, workload.batch())
    graph, _ = read_graph([gradient_edge(losses[name]) for name in step.plan.losses], leaves, ())
    passes = plan_passes(graph, (routing := Routing.of(step.plan)).weights, routing.shared)
    assert len(passes) == 2
    assert not any(planned.retain for planned in passes)
    assert not any(planned.blocked for planned in passes)


def test_the_graph_is_gone_after_the_backward():
    """No Python reference keeps activations alive once the gradients are there."""
    kept = []

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.marker = Marker()
            return x * 1.0

        @staticmethod
        def backward(ctx, g):
            return g

    class Marker:
        def __init__(self):
            kept.append(1)

        def __del__(self):
            kept.pop()

    def losses(p):
        h = Keep.apply(p["w"])
        return {"a": h.sum(), "b": h.square().sum()}

    ff.grad(losses, {"a": "*", "b": "*"})({"w": torch.ones(3)})
    assert kept == []
