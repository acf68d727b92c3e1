"""A compiled function that differentiates through `ff.grad`: exactly right or refused, never cut off in silence."""

from __future__ import annotations

import pytest
import torch

import funcfreeze as ff

ROUTES = {"task": "*", "adv": {"body": -0.3}}
ENGINES = ["routed", pytest.param("reference", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def losses(p, x):
    h = torch.tanh(x @ p["body"])
    return {"task": (h * p["head"]).sum().sin(), "adv": h.square().mean() * p["head"].sum()}


def by_hand(p, x):
    values = losses(p, x)
    body, head = torch.autograd.grad(values["task"], [p["body"], p["head"]], create_graph=True)
    (adv,) = torch.autograd.grad(values["adv"], [p["body"]], create_graph=True)
    return {"body": body - 0.3 * adv, "head": head}


def parameters(required=True):
    torch.manual_seed(3)
    shapes = {"body": (3, 3), "head": (3,), "unused": (2,)}
    return {path: torch.randn(shape).requires_grad_(required) for path, shape in shapes.items()}


def adapted(gradients, p, x, rate):
    """A loss after a step of the inner loop."""
    grads = gradients(p, x)
    return losses({path: q - rate * grads[path] if path in ("body", "head") else q for path, q in p.items()}, x + 1)[
        "task"
    ]


def compiled(f, backend="aot_eager"):
    return torch.compile(f, fullgraph=True, backend=backend)


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "required"),
    [
        ("eager", "all"),
        ("aot_eager", "all"),
        ("aot_eager", "rate"),
        pytest.param("aot_eager", "argument", marks=pytest.mark.slow),
        pytest.param("inductor", "all", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_outer_loss(backend, required):
    """What requires grad: parameters, an argument and a learned rate; or one of these alone."""
    f, x = ff.grad(losses, ROUTES), torch.randn(5, 3)
    found = []
    for gradients, wrap in ((f, lambda g: compiled(g, backend)), (by_hand, lambda g: g)):
        p = parameters(required == "all" or gradients is by_hand)
        arg, rate = (
            tensor.clone().requires_grad_(required in ("all", name))
            for tensor, name in ((x, "argument"), (torch.tensor(0.2), "rate"))
        )
        outer = wrap(lambda p, x, rate, g=gradients: adapted(g, p, x, rate))
        at = {"all": [p["body"], p["head"], arg, rate], "argument": [arg], "rate": [rate]}[required]
        found.append(torch.autograd.grad(outer(p, arg, rate), at))
    assert_same(*found)


@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_gradients_and_losses_are_differentiated_outside(engine):
    f, x, p = ff.grad_and_value(losses, ROUTES, engine=engine), torch.randn(5, 3), parameters()
    at = [p["body"], p["head"]]

    def number(grads, values):
        return grads["body"].pow(3).sum() + grads["head"].sin().sum() * values["adv"] + values["task"]

    grads, values = compiled(lambda p, x: f(p, x))(p, x)
    assert grads["unused"] is None
    assert_same(
        torch.autograd.grad(number(grads, values), at), torch.autograd.grad(number(by_hand(p, x), losses(p, x)), at)
    )
    grads, values = compiled(lambda p, x: f(p, x))(p, x)
    again = torch.autograd.grad(number(grads, values), at, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        again[0].sum().backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_gradients_inside_one_graph(engine):
    """`ff.grad` over `ff.grad`, and transforms of torch.func over it."""
    inner = ff.grad(losses, ROUTES, engine=engine)
    outer = ff.grad(lambda p, x: {"o": adapted(inner, p, x, 0.1)}, {"o": "*"}, engine=engine)
    x, p = torch.randn(5, 3), parameters()
    expected = torch.autograd.grad(adapted(by_hand, p, x, 0.1), [p["body"], p["head"]])
    plain = parameters(False)
    for f in (outer, lambda p, x: torch.func.grad(lambda q: adapted(inner, q, x, 0.1))(p)):
        grads = compiled(lambda p, x, f=f: f(p, x))(plain, x)
        assert_same([grads["body"], grads["head"]], expected)
    rows = compiled(lambda p, x: torch.func.vmap(lambda row: inner(p, row[None])["body"])(x))(plain, x)
    assert_same(rows, [by_hand(p, row[None])["body"].detach() for row in x])


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_under_no_grad_the_graph_is_a_plain_one(where):
    f, x, p = ff.grad(losses, ROUTES), torch.randn(5, 3), parameters()

    def inside(p, x):
        with torch.no_grad():
            return f(p, x)

    with torch.set_grad_enabled(where == "inside"):
        grads = compiled(inside if where == "inside" else lambda p, x: f(p, x))(p, x)
    assert not any(grads[path].requires_grad for path in ("body", "head"))
    assert_same([grads["body"], grads["head"]], [gradient.detach() for gradient in by_hand(p, x).values()])


@pytest.mark.parametrize(
    ("engine", "beside"),
    [
        ("routed", False),
        ("reference", True),
        pytest.param("routed", True, marks=pytest.mark.slow),
        pytest.param("reference", False, marks=pytest.mark.slow),
    ],
)
def test_a_closure_that_requires_grad_is_refused(engine, beside):
    """AOTAutograd would take it for a constant: its gradient would be missing in silence."""
    rate = torch.randn((2,), requires_grad=True)

    def scaled(p, x):
        found = losses(p, x)
        return ({**found, "task": found["task"] * (1.0 if beside else rate.sum())}, {"rate": rate * 2})

    f, x = ff.grad(scaled, ROUTES, engine=engine, has_aux=True), torch.randn(5, 3)
    message = (
        r"inside torch.compile, `losses` depends on tensors that require grad and are none of its arguments, of shape "
        r"\(2,\).* pass them in params or \*args, detach them, or call under torch.no_grad\(\)"
    )
    for required in (False, True):
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
            compiled(lambda p, x: f(p, x))(parameters(required), x)
        torch._dynamo.reset()
    with torch.no_grad():
        grads, aux = compiled(lambda p, x: f(p, x))(parameters(), x)
        assert_same([grads["body"], aux["rate"]], [f(parameters(), x)[0]["body"], 2 * rate])


def test_a_penalty_inside_a_graph_is_no_closure():
    """What `losses` makes require grad is traced like all the rest."""

    def penalty(p, x):
        z = torch.linspace(-1, 1, 3).requires_grad_()
        (slope,) = torch.autograd.grad(torch.tanh(z @ p["body"]) @ p["head"], z, create_graph=True)
        return {"task": losses(p, x)["task"], "adv": slope.square().sum()}

    f, x, p = ff.grad(penalty, ROUTES), torch.randn(5, 3), parameters()
    found = [
        torch.autograd.grad(g(p, x)["body"].pow(3).sum(), p["body"])[0] for g in (compiled(lambda p, x: f(p, x)), f)
    ]
    assert_same(found[:1], found[1:])


def test_toggle_says_so_inside_a_graph():
    f, x = ff.grad(losses, ROUTES, engine="toggle"), torch.randn(5, 3)
    assert_same([compiled(lambda p, x: f(p, x))(parameters(False), x)["body"]], [f(parameters(False), x)["body"]])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="engine='toggle' inside torch.compile computes gradients"):
        compiled(lambda p, x: f(p, x))(parameters(), x)
    with pytest.raises(RuntimeError, match="grad mode is on while this requires grad: body, head, unused"):
        torch.compile(lambda p, x: f(p, x), backend="aot_eager")(parameters(), x)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo asks for it
@pytest.mark.parametrize(
    ("engine", "backend"),
    [
        ("routed", "aot_eager"),
        ("reference", "eager"),
        pytest.param("routed", "eager", marks=pytest.mark.slow),
        pytest.param("reference", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_one_graph_is_computed_outside_of_it(engine, backend):
    """Losses that ask for a value: Dynamo breaks its graph around them, and leaves the engine alone."""

    def branching(p, x):
        found = losses(p, x)
        return found if found["adv"].item() < 1e9 and x.sum() < 1e9 else {}

    f, x, p = ff.grad(branching, ROUTES, engine=engine), torch.randn(5, 3), parameters()
    outer = torch.compile(lambda p, x: adapted(f, p, x, 0.1) * 2, backend=backend)
    at = [p["body"], p["head"]]
    assert_same(torch.autograd.grad(outer(p, x), at), torch.autograd.grad(adapted(by_hand, p, x, 0.1) * 2, at))


def test_functions_that_differ_in_their_declaration_alone_are_not_taken_for_one_another():
    """Dynamo knows a closure by its code; one compiled function must not answer for the next."""

    def losses(params, x):
        h = torch.tanh(x @ params["w"])
        return {"a": h.square().mean(), "b": h.sin().mean()}

    params, x = {"w": torch.randn(3, 2)}, torch.randn(4, 3)

    def declared(weight, rule):
        return ff.grad(losses, {"a": "*", "b": {"*": weight}}, merge=rule)

    def caller(f):
        return torch.compile(lambda given: f(params, given)["w"])

    for make in (torch.compile, caller):
        for weight, rule in ((1.0, None), (-3.0, None), (1.0, ff.merge.mgda()), (1.0, ff.merge.mean())):
            f = declared(weight, rule)
            with torch.no_grad():
                found = make(f)(params, x)["w"] if make is torch.compile else make(f)(x)
                torch.testing.assert_close(found, f(params, x)["w"])
