"""Which results of `ff.grad` carry a graph: torch.func's rule, for every engine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import funcfreeze as ff

ENGINES = ["routed", "reference"]
ROUTES = {"plain": "*", "scaled": {"w": 2.0}}


def with_rate(rate):
    """A loss that depends on a tensor from elsewhere and one that does not, and such values beside them."""

    def losses(p):
        beside = {"own": p["w"].norm(), "rate": rate * 2, "both": (rate * p["w"]).sum(), "itself": rate, "number": 3}
        return {"plain": p["w"].square().sum(), "scaled": (rate * p["w"]).sum()}, beside

    return losses


def requiring(result):
    """The names of all tensors that require grad."""
    grads, (values, aux) = result
    named = {"grad": grads["w"], **values, **aux}
    return {name for name, value in named.items() if isinstance(value, torch.Tensor) and value.requires_grad}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_depends_on_a_tensor_outside_carries_a_graph_and_nothing_else_does(engine):
    """Where no parameter requires grad: a closure's rate is what anything can be differentiated at."""
    rate, params = torch.randn(3, requires_grad=True), {"w": torch.randn(3)}
    f = ff.grad_and_value(with_rate(rate), ROUTES, engine=engine, has_aux=True)
    grads, (values, aux) = f(params)
    assert requiring((grads, (values, aux))) == {"grad", "scaled", "rate", "both", "itself"}
    assert aux["itself"] is rate
    torch.testing.assert_close(torch.autograd.grad(grads["w"].sum(), rate)[0], torch.full((3,), 2.0))
    torch.testing.assert_close(torch.autograd.grad(values["scaled"], rate)[0], params["w"])
    torch.testing.assert_close(torch.autograd.grad(aux["both"], rate)[0], params["w"])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_returned_beside_losses_carries_a_graph_of_its_own(engine):
    """No loss depends on the rate, what comes beside them does."""
    rate, params = torch.randn(3, requires_grad=True), {"w": torch.randn(3)}

    def losses(p):
        found, beside = with_rate(rate)(p)
        return {"plain": found["plain"]}, beside

    result = ff.grad_and_value(losses, {"plain": "*"}, engine=engine, has_aux=True)(params)
    assert requiring(result) == {"rate", "both", "itself"}
    aux = ff.grad(losses, {"plain": "*"}, engine=engine, has_aux=True)(params)[1]
    torch.testing.assert_close(torch.autograd.grad(aux["both"], rate)[0], params["w"])


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_and_arguments_that_require_grad(engine):
    """Routed or not, leaf or not."""
    body, head = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    x = torch.randn(3, requires_grad=True)
    f = ff.grad_and_value(lambda p, x: {"a": (p["body"].sin() * p["head"] * x).sum()}, {"a": "head"}, engine=engine)
    for params, arg, at in [
        ({"body": body, "head": head.detach()}, x.detach(), body),
        ({"body": body * 2, "head": head}, x.detach(), body),
        ({"body": body.detach(), "head": head.detach()}, x, x),
    ]:
        grads, values = f(params, arg)
        assert grads["body"] is None
        by_hand = params["body"].sin() * arg
        for got, wanted in [(grads["head"], by_hand), (values["a"], (params["head"] * by_hand).sum())]:
            torch.testing.assert_close(got, wanted)
            pair = [torch.autograd.grad(value.square().sum(), at, retain_graph=True)[0] for value in (got, wanted)]
            torch.testing.assert_close(*pair)
    assert not f({"body": body.detach(), "head": head}, x.detach())[0]["head"].requires_grad, "linear in the head"


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_all_is_detached(engine, mode):
    rate, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    f = ff.grad_and_value(with_rate(rate), ROUTES, engine=engine, has_aux=True)
    with mode():
        result = f({"w": w})
    assert requiring(result) - {"itself"} == set()
    torch.testing.assert_close(result[0]["w"], (2 * w + 2 * rate).detach())


@pytest.mark.parametrize("engine", ENGINES)
def test_one_tensor_at_two_places_is_two_parameters(engine):
    w = torch.randn(3, requires_grad=True)
    grads = ff.grad(lambda p: {"a": (p["one"].sin() * p["two"]).sum()}, {"a": "*"}, engine=engine)({"one": w, "two": w})
    torch.testing.assert_close(grads["one"], w.cos() * w)
    torch.testing.assert_close(torch.autograd.grad(grads["two"].sum(), w)[0], w.cos())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_a_parameter(engine):
    w = torch.randn((), requires_grad=True)
    grads, values = ff.grad_and_value(lambda p: {"a": p, "b": p * p}, {"a": "*", "b": "*"}, engine=engine)(w)
    assert torch.equal(torch.autograd.grad(values["a"], w)[0], torch.ones(()))
    torch.testing.assert_close(torch.autograd.grad(grads, w)[0], torch.tensor(2.0))


def test_a_tensor_that_losses_makes_require_grad_counts():
    """As a gradient penalty does; without grad mode it costs nothing."""

    def losses(p):
        x = torch.ones(3).requires_grad_()
        (slope,) = torch.autograd.grad((p["w"] * x).sin().sum(), x, create_graph=True)
        return {"penalty": slope.square().sum()}

    f, params = ff.grad(losses, {"penalty": "*"}), {"w": torch.randn(3)}
    carrying = f(params)["w"]
    with torch.no_grad():
        detached = f(params)["w"]
    assert (carrying.requires_grad, detached.requires_grad) == (True, False)
    assert torch.equal(carrying, detached)


def test_sparse_and_complex_parameters():
    table, z = torch.randn(5, 3, requires_grad=True), torch.randn(3, dtype=torch.complex128, requires_grad=True)
    matrix = torch.randn(3, 3).to_sparse().requires_grad_()
    tokens = torch.tensor([0, 2, 2])

    def losses(p):
        rows = F.embedding(tokens, p["table"], sparse=True)
        return {
            "rows": rows.pow(3).sum(),
            "all": p["table"].square().sum(),
            "z": (p["z"] * p["z"] * p["table"].sum()).abs().sum(),
            "matrix": torch.sparse.mm(p["matrix"], p["table"].T).square().sum(),
        }

    grads = ff.grad(losses, {"rows": "table", "all": {"table": 0.5}, "z": "z", "matrix": "matrix"})(
        {"table": table, "z": z, "matrix": matrix}
    )
    assert grads["matrix"].layout is torch.sparse_coo
    dense = F.embedding(tokens, table).pow(3).sum() + 0.5 * table.square().sum()
    wanted = [
        *torch.autograd.grad(dense, table, create_graph=True),
        *torch.autograd.grad((z * z * table.sum()).abs().sum(), z, create_graph=True),
    ]
    for got, expected in zip([grads["table"], grads["z"]], wanted, strict=True):
        torch.testing.assert_close(got, expected)
        seconds = [torch.autograd.grad(g.abs().square().sum(), table, retain_graph=True)[0] for g in (got, expected)]
        torch.testing.assert_close(*seconds)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo asks for it
def test_what_torch_cannot_differentiate_twice_says_so():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @once_differentiable
        def backward(ctx, cotangent):
            return cotangent * ctx.saved_tensors[0].cos()

    compiled = torch.compile(lambda w: w.sin(), backend="aot_eager")
    w = torch.randn(3, requires_grad=True)
    for f, message in [
        (Once.apply, "differentiate twice a function that was marked with @once_differentiable"),
        (compiled, "does not currently support double backward"),
    ]:
        gradient = ff.grad(lambda p, f=f: {"a": f(p["w"]).square().sum()}, {"a": "*"})({"w": w})["w"]
        torch.testing.assert_close(gradient, 2 * w.sin() * w.cos())
        with pytest.raises(RuntimeError, match=message):
            gradient.sum().backward()


def test_toggle_refuses_to_cut_off_a_graph():
    w, rate = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    remedy = (
        r"use engine='routed' or 'reference', whose gradients can be differentiated, or call it under torch.no_grad"
    )
    f = ff.grad(lambda p, x: {"a": (p["v"] * p["w"] * x).sum()}, {"a": "v"}, engine="toggle")
    with pytest.raises(RuntimeError, match=rf"grad mode is on while this requires grad: v, w; {remedy}"):
        f({"w": w, "v": w * 2}, rate.detach())
    beside = "a tensor that `losses` uses beside the parameters"
    with pytest.raises(RuntimeError, match=f"requires grad: {beside}; {remedy}"):
        f({"w": w.detach(), "v": w.detach()}, rate)
    only_aux = ff.grad(lambda p: ({"a": p["w"].sum()}, {"x": [rate.sum()]}), {"a": "*"}, engine="toggle", has_aux=True)
    with pytest.raises(RuntimeError, match=f"requires grad: {beside}; {remedy}"):
        only_aux({"w": w.detach()})
    assert not f({"w": w.detach(), "v": w.detach()}, rate.detach())["v"].requires_grad


@pytest.mark.parametrize("routes", [{"a": "*"}, {"a": "v"}])
def test_writing_to_a_parameter_that_requires_grad_is_refused(routes):
    """Of a leaf torch itself says so, before it is written to."""

    def losses(p):
        p["w"].mul_(2)
        return {"a": (p["w"] * p["v"]).sum()}

    w, v = torch.randn(3, requires_grad=True), torch.randn(3)
    before = w.detach().clone()
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad is being used in an in-place"):
        ff.grad(losses, routes)({"w": w, "v": v})
    assert torch.equal(w, before)
    with pytest.raises(RuntimeError, match=r"`losses` wrote to w in place, which requires grad: .* \(.clone\(\)\)"):
        ff.grad(losses, routes)({"w": w * 1, "v": v})
