"""Gradients that carry a graph are exact, on random graphs; and a graph is made only where something requires grad."""

from __future__ import annotations

import random

import pytest
import torch

import funcfreeze as ff
from funcfreeze.gradients import routed
from graphs import random_graph
from laws import without_none
from oracle import carrying

GRAPHS = {"routed": 150, "reference": 40}


def second_derivatives(first, params, required, cotangents):
    """Derivatives of a number made of all gradients and losses, at the parameters that require grad."""
    given = {path: tensor.detach().clone().requires_grad_(path in required) for path, tensor in params.items()}
    gradients, values = first(given)
    parts = [(gradient * cotangents[path]).sum() for path, gradient in gradients.items()]
    total = torch.stack([*parts, *values.values()]).sum()
    if not total.requires_grad:
        return set(gradients), [torch.zeros_like(given[path]) for path in required]
    found = torch.autograd.grad(total, [given[path] for path in required], allow_unused=True, materialize_grads=True)
    return set(gradients), found


def assert_second_order(engine, graph, rng):
    required = sorted(path for path in graph.params if rng.random() < rng.choice([0.3, 1.0])) or ["p0"]
    cotangents = {path: torch.randn_like(tensor) for path, tensor in graph.params.items()}
    transformed = ff.grad_and_value(graph.losses, graph.table, engine=engine)

    def ours(params):
        gradients, values = transformed(params)
        return without_none(gradients), values

    touched, found = second_derivatives(ours, graph.params, required, cotangents)
    expected_touched, expected = second_derivatives(
        lambda params: carrying(graph.losses, params, graph.table), graph.params, required, cotangents
    )
    assert touched == expected_touched
    for got, wanted in zip(found, expected, strict=True):
        scale = 1 + float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("engine", ["routed", "reference"])
def test_second_derivatives_on_random_graphs(engine, seed, monkeypatch):
    blocked = []
    plan = routed.plan_passes

    def noted(*given):
        passes = plan(*given)
        blocked.extend(node for planned in passes for node in planned.blocked)
        return passes

    monkeypatch.setattr(routed, "plan_passes", noted)
    rng = random.Random(seed)
    for offset in range(GRAPHS[engine]):
        assert_second_order(engine, random_graph(seed + offset), rng)
    assert engine != "routed" or blocked, "blocked exits are what a second backward could stumble over"


def test_second_derivatives_through_hooks(seed):
    """They run as for each loss alone, and once more in the backward of the backward."""
    rng = random.Random(seed)
    for offset in range(60):
        assert_second_order("routed", random_graph(seed + offset, hooks=True), rng)


@pytest.mark.parametrize(
    ("inner", "outer", "depth"),
    [
        ("routed", "routed", 2),
        ("routed", "routed", 3),
        ("reference", "routed", 2),
        ("routed", "reference", 2),
        pytest.param("reference", "routed", 3, marks=pytest.mark.slow),
        pytest.param("routed", "reference", 3, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_gradients_of_gradients(inner, outer, depth, seed):
    """`ff.grad` over `ff.grad`, with overlapping signed routes at every level, of plain tensors."""
    for offset in range(6):
        graph = random_graph(seed + offset)

        def above(gradients, table=graph.table):
            """Losses of the same names, made of gradients, and of a parameter where there are none."""

            def losses(params):
                found = without_none(gradients(params)).values()
                small = 0.1 * sum(p.square().sum() for p in params.values())  # gradients may be constant, losses not
                return {name: sum(((k + 1) * g).sin().sum() for g in found) + small for k, name in enumerate(table)}

            return losses

        ours, oracle = graph.losses, graph.losses
        for level in range(depth):
            f = ff.grad(ours, graph.table, engine=inner if level < depth - 1 else outer)
            g = lambda p, losses=oracle, table=graph.table: carrying(losses, p, table)[0]  # noqa: E731
            ours, oracle = above(f), above(g)
        found, expected = without_none(f(graph.params)), g(graph.params)
        for path, gradient in found.items():
            assert not gradient.requires_grad
            # what the oracle leaves out is zero: of a gradient that does not depend on it, or only through zeros
            wanted = expected.get(path, torch.zeros_like(gradient)).detach()
            # sines of numbers in the thousands: rounding grows from level to level, a term left out is far larger
            torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-7 * (1 + float(wanted.abs().max())))
        assert all(expected[path].abs().max() < 1e-12 for path in expected.keys() - found.keys())


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of the autograd engine."""
    made = []
    walk = routed.walk

    def noted(*args, **kwargs):
        made.append(kwargs)
        return walk(*args, **kwargs)

    monkeypatch.setattr(routed, "walk", noted)
    return made


def passes_of(graph, calls):
    planned = []
    plan = routed.plan_passes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routed, "plan_passes", lambda *args: planned.append(plan(*args)) or planned[-1])
        calls.clear()
        grads = ff.grad(graph.losses, graph.table)(graph.params)
    return planned[-1], grads


def test_nothing_is_retained_where_nothing_requires_grad(calls, seed):
    """Exactly what the plan says, as before gradients could carry a graph."""
    for offset in range(30):
        graph = random_graph(seed + offset)
        passes, grads = passes_of(graph, calls)
        assert [call["retain_graph"] for call in calls] == [planned.retain for planned in passes]
        assert not any(call["create_graph"] for call in calls)
        assert not any(gradient.requires_grad for gradient in without_none(grads).values())
        before = list(calls)
        required = {path: tensor.clone().requires_grad_() for path, tensor in graph.params.items()}
        calls.clear()
        with torch.no_grad():
            ff.grad(graph.losses, graph.table)(required)
        assert calls == before


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_a_step_never_makes_a_graph_whatever_requires_grad_around_it(engine, calls):
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 1)})
    teacher, rate = torch.nn.Linear(3, 3), torch.tensor(0.3, requires_grad=True)

    def losses(m, x):
        h = torch.tanh(m["body"](x))
        return {"task": m["head"](h).square().mean(), "like": rate * (h - teacher(x)).square().mean()}, {"h": h}

    step = ff.Step(model, losses, {"task": "head", "like": {"head": 0.1}}, optimizer=ff.optim.sgd(0.1), engine=engine)
    state, x = step.init(), torch.randn(5, 3, requires_grad=True)
    assert not any(gradient.requires_grad for gradient in step.gradients(state, x).values())
    for row in step.per_loss_gradients(state, x).values():
        assert not any(gradient.requires_grad for gradient in row.values())
    state, metrics = step(state, x)
    assert not any(tensor.requires_grad for tensor in [*metrics.values(), *state.params.values()])
    assert not any(call.get("create_graph") for call in calls)


def test_backward_never_makes_a_graph(calls):
    model = torch.nn.Linear(3, 1)
    rate = torch.tensor(0.3, requires_grad=True)
    ff.backward({"task": rate * model(torch.randn(4, 3)).square().mean()}, {"task": "*"}, model)
    assert not model.weight.grad.requires_grad
    assert not any(call["create_graph"] or call["retain_graph"] for call in calls)


def test_the_outer_plan_knows_the_hooks_of_an_inner_gradient(calls):
    """Those that the inner forward registered keep apart what meets above them; those at blocked exits are gone."""

    def inner(p, hook):
        trunk = torch.tanh(torch.eye(4) @ p["trunk"])
        middle = torch.tanh(trunk @ p["middle"])
        if hook:
            middle.register_hook(lambda g: g.clamp(-0.1, 0.1))
        head = torch.tanh(middle @ p["head"]) * trunk
        return {"a": (head @ p["head"]).square().sum(), "b": (middle * trunk).sin().sum()}

    gradients = ff.grad(inner, {"a": "*", "b": ["trunk", "middle"]})

    def through_all(p, hook):
        found = gradients(p, hook)
        return {"one": found["trunk"].sum(), "two": found["middle"].sin().sum(), "three": found["head"].sum()}

    def through_one(p, hook):
        h = torch.tanh(p["head"] @ p["head"])
        return {"one": gradients(p, hook)["trunk"].sum(), "two": h.sum(), "three": h.square().sum()}

    params = {name: torch.randn(4, 4) for name in ("trunk", "middle", "head")}
    made = []
    for hook, outer in [(False, through_all), (True, through_all), (True, through_one)]:
        calls.clear()
        ff.grad(outer, {"one": "*", "two": "*", "three": "*"})(params, hook)
        made.append(sum(not call["create_graph"] for call in calls))
    assert made == [1, 3, 2], "walks over the outer graph: all in one, each alone, those apart from the hook in one"
