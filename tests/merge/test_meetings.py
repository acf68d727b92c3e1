"""Rules on random overlaps of random computations: every engine against an oracle that shares no code with them."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import funcfreeze as ff
from counts import matmuls, multiply_adds
from funcfreeze import merge
from funcfreeze.gradients.passes import plan_passes
from funcfreeze.merge.rows import Rows
from funcfreeze.merge.rule import Meeting
from graphs import random_graph
from laws import assert_gradients_equal, without_none
from oracle import oracle

GRAPHS = 60
PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 5))]


def by_name(meeting):
    """Weights that are different for every loss, in any company."""
    return torch.tensor([0.3 + int(name[4:]) for name in meeting.losses])


def absolute(meeting):
    """A merged gradient that no weights make."""
    return meeting.matrix.abs().amax(0) * meeting.matrix.sum(0).sign()


RULES = [
    merge.Rule(by_name),
    merge.Rule(vector=absolute),
    merge.mean(),
    merge.sum(),
    merge.pcgrad(order="declared"),
    merge.mgda(),
    merge.upgrad(),
    merge.cagrad(0.4),
]
"""What rounding does not change much."""


def random_entries(graph, rng):
    """Disjoint entries over some of the parameters."""
    paths = sorted(graph.params)
    rng.shuffle(paths)
    cuts = sorted(rng.sample(range(1, len(paths)), min(rng.randint(1, 3), len(paths) - 1)))
    groups = [paths[a:b] for a, b in zip([0, *cuts], [*cuts, len(paths)], strict=True)]
    chosen = [group for group in groups if rng.random() < 0.7] or groups[:1]
    return {ff.regex("|".join(group)): (group, rng.choice(RULES)) for group in chosen}


def expected(graph, entries):
    """The merged gradients, and all terms they are made of."""
    apart = oracle(graph.losses, graph.params, graph.table)
    ruled = {path for paths, rule in entries.values() for path in paths if rule != merge.sum()}
    routed = {path: [loss for loss in graph.table if path in graph.table[loss]] for path in graph.params}
    merged = {}
    for row in apart.values():
        for path, gradient in row.items():
            if path not in ruled or len(routed[path]) < 2:
                merged[path] = merged[path] + gradient if path in merged else gradient
    for paths, rule in entries.values():
        here = [path for path in paths if len(routed[path]) > 1]
        losses = [loss for loss in graph.table if any(path in apart[loss] for path in here)]
        if rule == merge.sum() or not losses:
            continue
        touched = [path for path in here if any(path in apart[loss] for loss in losses)]
        rows = [
            torch.cat([apart[loss].get(path, torch.zeros_like(graph.params[path])).reshape(-1) for path in touched])
            for loss in losses
        ]
        whole = decided(rule, losses, torch.stack(rows)) if len(losses) > 1 else rows[0]
        sizes = [graph.params[path].numel() for path in touched]
        for path, part in zip(touched, whole.split(sizes), strict=True):
            merged[path] = part.view_as(graph.params[path])
    return merged, apart


def decided(rule, losses, matrix):
    if rule.weights is by_name:
        return sum((0.3 + int(name[4:])) * row for name, row in zip(losses, matrix, strict=True))
    if rule.vector is absolute:
        return matrix.abs().amax(0) * matrix.sum(0).sign()
    values, step = torch.zeros(len(losses)), torch.tensor(0)
    rows = Rows([[row] for row in matrix])
    found = rule.decide(Meeting(tuple(losses), tuple(range(len(losses))), len(losses), values, step, {}, rows))
    return found @ matrix


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_random_rules_on_random_overlaps(engine, part, seed):
    met = 0
    for offset in range(part * GRAPHS, (part + 1) * GRAPHS):
        rng = random.Random(seed + offset)
        graph = random_graph(seed + offset)
        entries = random_entries(graph, rng)
        rules = {selector: rule for selector, (_, rule) in entries.items()}
        wanted, apart = expected(graph, entries)
        grads, values = ff.grad_and_value(graph.losses, graph.table, engine=engine, merge=rules)(dict(graph.params))
        terms = [{path: sum(row[path].abs() for row in apart.values() if path in row) for path in wanted}]
        assert_gradients_equal(without_none(grads), wanted, 1e-8, terms)
        assert set(values) == set(graph.table)
        met += any(len([loss for loss in graph.table if path in graph.table[loss]]) > 1 for path in wanted)
    assert met > GRAPHS / 4


@pytest.mark.slow
def test_ten_thousand_graphs_equal_the_reference(seed):
    """The fast engine against the definition; what differs is rounding, relative to the losses' own gradients."""
    for offset in range(10_000):
        rng = random.Random(seed + offset)
        graph = random_graph(seed + offset)
        rules = {selector: rule for selector, (_, rule) in random_entries(graph, rng).items()}
        routed, reference = (
            without_none(ff.grad(graph.losses, graph.table, engine=engine, merge=rules)(dict(graph.params)))
            for engine in ("routed", "reference")
        )
        apart = oracle(graph.losses, graph.params, graph.table)
        terms = [{path: sum(row[path].abs() for row in apart.values() if path in row) for path in reference}]
        assert_gradients_equal(routed, reference, 1e-8, terms)


class Shared(nn.Module):
    """Four layers, two of them under every rule of the tests, and three heads."""

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.top = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))


def shared_losses(model, x):
    h = model.top(model.low(x))
    return {name: head(h).square().mean() for name, head in zip("abc", model.heads, strict=True)}


ROUTES = {name: ["low", "top", f"heads.{k}"] for k, name in enumerate("abc")}


def step_with(rule, **options):
    return ff.Step(Shared(), shared_losses, ROUTES, optimizer=ff.optim.sgd(0.1), merge=rule, **options)


def backward_matmuls(step):
    state, x = step.init(), torch.randn(4, 8)
    forward = matmuls(lambda: shared_losses(step.module, x))
    return matmuls(lambda: step.gradients(state, x)) - forward


def test_work_is_that_of_the_walks_over_the_overlap_and_nothing_twice_outside():
    """In products: a head has 2 (its weight and its input), a layer 2, the lowest 1; K = 3. Two more are the rule's."""
    assert backward_matmuls(step_with(None)) == 3 * 2 + 4 * 2 - 1
    above = backward_matmuls(step_with({"top": merge.Rule(by_place)}))
    assert above == 3 * 2 + 3 * (2 * 2) + 2 * 2 - 1 + 2, "three walks over the top, one below"
    below = backward_matmuls(step_with({"low": merge.Rule(by_place)}))
    everywhere = backward_matmuls(step_with(merge.Rule(by_place)))
    assert below == everywhere == 3 * 2 + 3 * (4 * 2 - 1) + 2, "three walks down to what is under the rule"


def by_place(meeting):
    return torch.arange(1.0, 1.0 + len(meeting.losses))


def test_activations_are_met_once_and_the_trunk_is_walked_once():
    plain = backward_matmuls(step_with(None))
    crossing = step_with({ff.path("low") | "top": merge.Rule(by_place, at="activations")})
    assert backward_matmuls(crossing) == plain + 2, "these are the rule's"


def test_the_sum_costs_nothing():
    step = step_with(merge.sum())
    x, state = torch.randn(4, 8), step.init()
    assert multiply_adds(lambda: step.gradients(state, x)) == multiply_adds(lambda: step_with(None).gradients(state, x))
    assert "ff/norm/*" not in step(state, x)[1]


def test_rules_of_equal_graphs_are_planned_once():
    step = step_with({"top": merge.pcgrad(), "low": merge.mgda()})
    state = step.init()
    state, _ = step(state, torch.randn(4, 8))
    before = plan_passes.cache_info()
    for _ in range(3):
        state, _ = step(state, torch.randn(4, 8))
    after = plan_passes.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 3)


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_one_entry_is_one_decision_and_two_are_two(engine):
    """MGDA over both halves has other weights than MGDA over each."""
    torch.manual_seed(3)
    model, x = Shared(), torch.randn(4, 8)

    def gradients(rules):
        step = ff.Step(model, shared_losses, ROUTES, optimizer=ff.optim.sgd(0.1), merge=rules, engine=engine)
        return step, step.gradients(step.init(), x)

    plain = ff.Step(model, shared_losses, ROUTES, optimizer=ff.optim.sgd(0.1))
    apart = plain.per_loss_gradients(plain.init(), x)

    def mixed(paths):
        rows = torch.stack([torch.cat([apart[name][path].reshape(-1) for path in paths]) for name in "abc"])
        gramian = rows @ rows.T
        grid = torch.tensor([[i / 200, j / 200, (200 - i - j) / 200] for i in range(201) for j in range(201 - i)])
        best = grid[(grid @ gramian * grid).sum(1).argmin()]
        return best @ rows

    paths = [path for path in plain.plan.paths if not path.startswith("heads")]
    _, both = gradients({ff.path("low") | "top": merge.mgda()})
    joint = torch.cat([both[path].reshape(-1) for path in paths])
    assert (joint - mixed(paths)).norm() < 0.02 * mixed(paths).norm()
    _, each = gradients({"low": merge.mgda(), "top": merge.mgda()})
    for half in ("low", "top"):
        own = [path for path in paths if path.startswith(half)]
        found = torch.cat([each[path].reshape(-1) for path in own])
        assert (found - mixed(own)).norm() < 0.02 * mixed(own).norm()
    assert any(not torch.allclose(both[path], each[path], rtol=1e-3) for path in paths)


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_absent_losses_have_no_row_and_one_row_left_is_the_sum(engine):
    present = {"a", "b", "c"}

    def losses(model, x):
        return {name: loss if name in present else None for name, loss in shared_losses(model, x).items()}

    seen = []

    def watching(meeting):
        seen.append(meeting.losses)
        return torch.ones(len(meeting.losses)) * 10

    model, x = Shared(), torch.randn(4, 8)
    rule = {ff.path("low") | "top": merge.Rule(watching)}
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1), merge=rule, engine=engine)
    plain = ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1))
    state, beside = step.init(), plain.init()
    assert_shared(step, plain, 10.0, state, beside, x)
    present.remove("b")
    assert_shared(step, plain, 10.0, state, beside, x)
    present.remove("a")
    assert_shared(step, plain, 1.0, state, beside, x)
    assert seen == [("a", "b", "c"), ("a", "c")]
    present.clear()
    assert step.gradients(state, x) == {}
    state, metrics = step(state, x)
    assert not metrics


def assert_shared(step, plain, factor, state, beside, x):
    wanted = plain.gradients(beside, x)
    for path, gradient in step.gradients(state, x).items():
        torch.testing.assert_close(gradient, wanted[path] * (1.0 if path.startswith("heads") else factor))


def test_timed_routes_meet_only_where_they_are_active():
    seen = []

    def watching(meeting):
        seen.append((meeting.losses, meeting.places, meeting.number, int(meeting.step)))
        return torch.ones(len(meeting.losses))

    routes = {**ROUTES, "b": [ff.Route(["low", "top"], start=2), ff.Route("heads.1")]}
    step = ff.Step(Shared(), shared_losses, routes, optimizer=ff.optim.sgd(0.1), merge={"top": merge.Rule(watching)})
    state = step.init()
    for _ in range(3):
        state, _ = step(state, torch.randn(4, 8))
    assert seen == [
        (("a", "c"), (0, 2), 3, 0),
        (("a", "c"), (0, 2), 3, 1),
        (("a", "b", "c"), (0, 1, 2), 3, 2),
    ]


def test_rules_see_weighted_gradients_and_the_table_says_so():
    routes = {"a": ["low", "heads.0"], "b": {"low": -0.5, "heads.1": 1.0}, "c": ["top", "heads.2"]}
    seen = []

    def watching(meeting):
        seen.append(meeting.norms)
        return torch.ones(2)

    model, x = Shared(), torch.randn(4, 8)
    step = ff.Step(model, shared_losses, routes, optimizer=ff.optim.sgd(0.1), merge={"low": merge.Rule(watching)})
    state = step.init()
    assert str(step.plan).splitlines()[-1] == (
        "merge  low: watching() on 4 parameters (144 elements), where a, b meet, b with its weight"
    )
    assert_gradients_equal(
        step.gradients(state, x),
        ff.Step(model, shared_losses, routes, optimizer=ff.optim.sgd(0.1)).gradients(state, x),
    )
    apart = step.per_loss_gradients(state, x)
    norm = torch.cat([gradient.reshape(-1) for path, gradient in apart["b"].items() if path.startswith("low")]).norm()
    torch.testing.assert_close(seen[0][1], norm)


def test_complex_parameters():
    """Inner products are real, over real and imaginary parts."""
    params = {"w": torch.randn(3, 2, dtype=torch.complex128), "v": torch.randn(2)}

    def losses(p):
        return {"a": (p["w"].abs() ** 2).sum() + p["v"].sum(), "b": (p["w"] * (1 + 2j)).real.sum() - p["v"][0]}

    table = {"a": {"w": 1.0, "v": 1.0}, "b": {"w": 1.0, "v": 1.0}}
    apart = oracle(losses, params, table)
    rows = torch.stack(
        [torch.cat([torch.view_as_real(row["w"]).reshape(-1), row["v"]]) for row in (apart["a"], apart["b"])]
    )
    gramian = rows @ rows.T
    t = ((gramian[1, 1] - gramian[0, 1]) / (gramian[0, 0] + gramian[1, 1] - 2 * gramian[0, 1])).clamp(0, 1)
    for engine in ("routed", "reference", "toggle"):
        found = ff.grad(losses, {"a": "*", "b": "*"}, engine=engine, merge=merge.mgda())(params)
        for path in params:
            torch.testing.assert_close(found[path], t * apart["a"][path] + (1 - t) * apart["b"][path])
        found = ff.grad(losses, {"a": "*", "b": "*"}, engine=engine, merge=merge.Rule(vector=absolute))(params)
        torch.testing.assert_close(
            torch.cat([torch.view_as_real(found["w"]).reshape(-1), found["v"]]),
            rows.abs().amax(0) * rows.sum(0).sign(),
        )


def test_sparse_gradients_are_refused_by_name():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3, sparse=True), "a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})

    def losses(model, x):
        h = model["embed"](x)
        return {"a": model["a"](h).mean(), "b": model["b"](h).square().mean()}

    step = ff.Step(model, losses, {"a": "*", "b": "*"}, optimizer=ff.optim.sgd(0.1), merge=merge.pcgrad())
    state = step.init()
    with pytest.raises(ff.RouteError) as error:
        step(state, torch.tensor([0, 1]))
    assert str(error.value) == (
        "merge '*': the gradient of embed.weight is sparse (a, b), and a rule takes dense ones; make it dense "
        '(sparse=False), or take it out of the rule, as in path("*") - "embed.weight"'
    )
    rest = ff.path("*") - "embed.weight"
    step = ff.Step(model, losses, {"a": "*", "b": "*"}, optimizer=ff.optim.sgd(0.1), merge={rest: merge.pcgrad()})
    step(state, torch.tensor([0, 1]))


def test_mixed_precisions_and_large_gradients_beside_small_ones():
    """Half precision is added up in float32, and gradients above and below the size that is packed say the same."""
    model = nn.ModuleDict({"wide": nn.Linear(200, 200), "narrow": nn.Linear(200, 2).to(torch.float32)})

    def losses(model, x):
        y = model["narrow"](model["wide"](x).to(torch.float32))
        return {"a": y[:, 0].square().mean(), "b": y[:, 1].sin().mean()}

    routes, x = {"a": "*", "b": "*"}, torch.randn(6, 200)
    step = ff.Step(model, losses, routes, optimizer=ff.optim.sgd(0.1), merge=merge.mgda())
    state = step.init()
    apart = step.per_loss_gradients(state, x)
    rows = torch.stack([torch.cat([g.double().reshape(-1) for g in apart[name].values()]) for name in "ab"])
    gramian = rows @ rows.T
    t = ((gramian[1, 1] - gramian[0, 1]) / (gramian[0, 0] + gramian[1, 1] - 2 * gramian[0, 1])).clamp(0, 1)
    for path, gradient in step.gradients(state, x).items():
        assert gradient.dtype == model.get_parameter(path).dtype
        wanted = t * apart["a"][path].double() + (1 - t) * apart["b"][path].double()
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-7)
    halves = Rows([[torch.full((70_000,), 3.0, dtype=torch.float16)] for _ in range(2)])
    torch.testing.assert_close(halves.gramian, torch.full((2, 2), 630_000.0))
