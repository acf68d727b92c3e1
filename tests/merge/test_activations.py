"""Rules that decide where the losses' cotangents meet, and so for all that is below."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze import merge

ROUTES = {"a": ["trunk", "a"], "b": {"trunk": -0.3, "b": 1.0}, "c": ["trunk", "c"]}


def network():
    trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
    return nn.ModuleDict({"trunk": trunk, **{name: nn.Linear(6, 1) for name in "abc"}})


def losses(model, x):
    h = model["trunk"](x)
    return {name: model[name](h).square().mean() * (k + 1) for k, name in enumerate("abc")}


def by_hand(model, x, merged):
    """The trunk's gradients, of what `merged` makes of the losses' gradients at the features."""
    h = model["trunk"](x)
    below = h.detach().requires_grad_()
    weights = {"a": 1.0, "b": -0.3, "c": 1.0}
    rows = [
        weights[name] * torch.autograd.grad((k + 1) * model[name](below).square().mean(), below)[0].reshape(-1)
        for k, name in enumerate("abc")
    ]
    parameters = [*model["trunk"].parameters()]
    found = torch.autograd.grad(h, parameters, merged(torch.stack(rows)).view_as(h))
    return {f"trunk.{path}": g for (path, _), g in zip(model["trunk"].named_parameters(), found, strict=True)}


def shortest(rows):
    """By trying, over a fine grid and then finer around the best."""
    best, width = torch.full((3,), 1 / 3), 1.0
    for _ in range(40):
        tried = (best + width * torch.randn(2000, 3)).clamp(min=1e-9)
        tried = torch.cat([best[None], tried / tried.sum(1, keepdim=True)])
        best = tried[(tried @ rows).square().sum(1).argmin()]
        width *= 0.7
    return best @ rows


def dropped(rows):
    return rows.abs().amax(0)


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_scale": ff.LossScale(8.0)}, pytest.param({"compile": True}, marks=pytest.mark.slow)],
    ids=["plain", "scaled", "compiled"],
)
@pytest.mark.parametrize("kind", ["weights", "vector"])
def test_it_is_the_rule_on_the_features(kind, options):
    model, x = network(), torch.randn(12, 5)
    rules = {"weights": merge.mgda(at="activations"), "vector": merge.Rule(vector=lambda m: dropped(m.matrix))}
    rule = {"trunk": rules[kind].looking_at("activations")}
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1), merge=rule, donate=False, **options)
    state = step.init()
    wanted = by_hand(model, x, shortest if kind == "weights" else dropped)
    apart = step.per_loss_gradients(state, x)
    after, metrics = step(state, x)
    half = step.compute(state, x, per_loss=True)
    for found in (step.gradients(state, x), half.gradients, step.compute(state, x).gradients):
        for path, gradient in wanted.items():
            torch.testing.assert_close(found[path], gradient, rtol=1e-3, atol=1e-4)
        for name in "abc":
            torch.testing.assert_close(found[f"{name}.weight"], apart[name][f"{name}.weight"])
    for path, gradient in half.gradients.items():
        torch.testing.assert_close(after.params[path], state.params[path] - 0.1 * gradient)
    assert metrics["ff/norm/trunk"].shape == (3,)
    shown = step.conflicts(state, x)
    assert str(shown).splitlines()[0] == "trunk (4 parameters, 102 elements, at the activations above)"
    assert shown["trunk"].norms["a"] == pytest.approx(float(metrics["ff/norm/trunk"][0]), rel=1e-3)
    assert metrics["ff/weight/trunk"].isnan().any() == (kind == "vector")


def test_absent_losses_have_no_row_there_either():
    model, x = network(), torch.randn(6, 5)
    present = {"a", "c"}

    def some(model, x):
        return {name: loss if name in present else None for name, loss in losses(model, x).items()}

    rule = {"trunk": merge.Rule(lambda meeting: 10.0 * torch.ones(len(meeting.losses)), at="activations")}
    step = ff.Step(model, some, ROUTES, optimizer=ff.optim.sgd(0.1), merge=rule)
    plain = ff.Step(model, some, ROUTES, optimizer=ff.optim.sgd(0.1))
    state = step.init()
    for factor in (10.0, 1.0):
        wanted = plain.gradients(state, x)
        for path, gradient in step.gradients(state, x).items():
            torch.testing.assert_close(gradient, wanted[path] * (factor if path.startswith("trunk") else 1.0))
        present.discard("c")


def test_several_outputs_of_one_node_are_one_decision():
    """The losses meet at a node with two outputs, both of which they use."""

    def split(model, x):
        left, right = model["trunk"](x).chunk(2, dim=1)
        return {
            "a": (left.square() + right).mean() + model["a"].bias.sum(),
            "b": (left * right).mean() + model["b"].bias.sum(),
        }

    model, x = network(), torch.randn(6, 5)
    routes = {"a": ["trunk", "a.bias"], "b": ["trunk", "b.bias"]}
    rule = {"trunk": merge.Rule(lambda meeting: torch.tensor([2.0, -1.0]), at="activations")}
    step = ff.Step(model, split, routes, optimizer=ff.optim.sgd(0.1), merge=rule)
    state = step.init()
    apart, found = step.per_loss_gradients(state, x), step.gradients(state, x)
    for path in found:
        if path.startswith("trunk"):
            torch.testing.assert_close(found[path], 2 * apart["a"][path] - apart["b"][path])


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("at", ["parameters", "activations"])
def test_beside_what_members_of_an_alternation_share(at, compile):
    model, x = network(), torch.randn(6, 5)

    def two(model, x, *, shared):
        return {name: model[name](shared).square().mean() * (k + 1) for k, name in enumerate("ab")}

    def third(model, x, *, shared):
        return {"c": model["c"](shared).sin().mean()}

    def alone(model, x):
        return {name: loss for name, loss in losses(model, x).items() if name != "c"}

    routes, rule = {name: ROUTES[name] for name in "ab"}, {"trunk": merge.mgda(at=at)}
    sgd = ff.optim.sgd(0.1)
    step = ff.alternate(
        {
            "two": ff.Step(model, two, routes, optimizer=sgd, merge=rule),
            "third": ff.Step(model, third, {"c": "c"}, optimizer=sgd),
        },
        shared=lambda model, x: model["trunk"](x),
        compile=compile,
    )
    lone = ff.Step(model, alone, routes, optimizer=sgd, merge=rule)
    state, metrics = step(step.init(), x)
    wanted, expected = lone(lone.init(), x)
    for path, tensor in wanted.params.items():
        if not path.startswith("c"):
            torch.testing.assert_close(state.params[path], tensor)
    torch.testing.assert_close(metrics["two"]["ff/weight/trunk"], expected["ff/weight/trunk"])


def test_where_losses_do_not_meet_so_it_is_refused_and_says_where_they_do():
    model, x = network(), torch.randn(6, 5)

    def later(model, x):
        found = losses(model, x)
        return {**found, "c": model["c"](model["trunk"][0](x)[:, :6]).square().mean()}

    mgda = merge.mgda(at="activations")
    for function, entry, message in [
        (
            losses,
            "trunk.2",
            "merge 'trunk.2': where a, b and c meet, trunk.0.bias, trunk.0.weight are below, too, and not under the "
            "rule. A rule with at='activations' decides for all that is below: put them under it, or use "
            "at='parameters'",
        ),
        (
            later,
            "trunk",
            "merge 'trunk': at='activations' takes losses that meet at one place above these parameters; a, b and c do "
            "not: a and b meet at AddmmBackward0; c arrives by another way as well. Use at='parameters'",
        ),
    ]:
        step = ff.Step(model, function, ROUTES, optimizer=ff.optim.sgd(0.1), merge={entry: mgda})
        with pytest.raises(ff.RouteError) as error:
            step(step.init(), x)
        told = re.sub(r"trunk\.0\.weight, trunk\.0\.bias", "trunk.0.bias, trunk.0.weight", str(error.value))
        assert told == message


def test_where_nobody_knows_such_places_it_is_refused():
    model, x = network(), torch.randn(6, 5)
    rule = {"trunk": merge.mgda(at="activations")}
    with pytest.raises(
        ValueError, match="at='activations' decides where losses meet, and engine='reference' knows none"
    ):
        ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1), merge=rule, engine="reference")
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1), merge=rule, microbatches=2)
    with pytest.raises(ValueError, match="the parts of a batch meet nowhere; use at='parameters'"):
        step(step.init(), x)
    for call in (
        lambda: ff.combine(losses(model, x), ROUTES, model, merge=rule),
        lambda: ff.backward(losses(model, x), ROUTES, model, merge=rule),
        lambda: ff.grad(lambda p: {"a": p.sum(), "b": p.mean()}, {"a": "*", "b": "*"}, merge=rule["trunk"])(x),
    ):
        with pytest.raises(
            ff.RouteError, match=r"mgda\(at='activations'\) looks at activations, which takes a graph of"
        ):
            call()
    with pytest.raises(ValueError, match="a rule that keeps a state looks at parameters"):
        merge.gradnorm().looking_at("activations")


def test_verify_says_that_it_cannot_look_there():
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.sgd(0.1), merge=merge.mgda(at="activations"))
    with pytest.raises(ValueError, match=r"merge '\*': at='activations' decides where losses meet, which the recipe"):
        ff.verify(step, step.init(), torch.randn(6, 5), steps=1)
