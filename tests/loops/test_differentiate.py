"""`ff.grad` and `ff.grad_and_value`: any pytree, torch.func's conventions."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import funcfreeze as ff


class Pair(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


def losses(params, x):
    h = params["enc"][0] @ x + params["enc"][1].bias
    return {"task": (params["head"].weight @ h).sum() + params["head"].bias.sum(), "small": h.square().sum()}


def tree():
    return {
        "enc": [torch.randn(3, 2), Pair(torch.randn(3), torch.randn(3))],
        "head": Pair(torch.randn(1, 3), torch.randn(1)),
        "steps": torch.tensor(3),
        "name": "net",
        "none": None,
    }


ROUTES = {"task": "*", "small": {"enc.0": -0.5, "enc.1.bias": 2.0}}


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_any_pytree(engine):
    params, x = tree(), torch.randn(2)
    grads, values = ff.grad_and_value(losses, ROUTES, engine=engine)(params, x)
    assert isinstance(grads["head"], Pair)
    assert grads["enc"][1].weight is grads["steps"] is grads["name"] is grads["none"] is None
    h = params["enc"][0] @ x + params["enc"][1].bias
    back = params["head"].weight[0]
    torch.testing.assert_close(grads["enc"][1].bias, back + 4 * h)
    torch.testing.assert_close(grads["enc"][0], torch.outer(back - h, x))
    torch.testing.assert_close(grads["head"].weight[0], h)
    torch.testing.assert_close(values["small"], h.square().sum())
    assert not any(value.requires_grad for value in values.values())


def test_order_of_results_is_that_of_torch_func():
    def with_aux(params, x):
        return losses(params, x), {"norm": params["enc"][0].norm(), "text": "fine"}

    params, x = tree(), torch.randn(2)
    grads, (values, aux) = ff.grad_and_value(with_aux, ROUTES, has_aux=True)(params, x)
    assert set(values) == {"task", "small"}
    assert aux["text"] == "fine"
    assert not aux["norm"].requires_grad
    again, aux = ff.grad(with_aux, ROUTES, has_aux=True)(params, x)
    assert torch.equal(again["enc"][0], grads["enc"][0])
    assert set(aux) == {"norm", "text"}
    with pytest.raises(TypeError, match=r"returns a pair \(losses, aux\), got dict"):
        ff.grad(losses, ROUTES, has_aux=True)(params, x)


def test_a_lone_tensor_is_a_pytree():
    grad = ff.grad(lambda w: {"a": w.sum()}, {"a": "*"})
    assert torch.equal(grad(torch.zeros(3)), torch.ones(3))


def test_gradients_do_not_depend_on_what_surrounds():
    w = torch.randn(3, requires_grad=True)
    f = ff.grad(lambda p: {"a": p["w"].square().sum()}, {"a": "w"})
    with torch.no_grad():
        inside = f({"w": w})["w"]
    torch.testing.assert_close(inside, 2 * w.detach())
    assert w.grad is None
    assert torch.equal(f({"w": w})["w"], inside)


def test_under_vmap_with_the_reference_engine():
    params, xs = {"w": torch.randn(3, 3), "v": torch.randn(3)}, torch.randn(5, 3)

    def f(p, x):
        h = torch.tanh(p["w"] @ x)
        return {"a": (h * p["v"]).sum(), "b": h.square().sum()}

    one = ff.grad(f, {"a": "*", "b": {"w": -0.1}}, engine="reference")
    every = torch.vmap(one, in_dims=(None, 0))(params, xs)
    for index, x in enumerate(xs):
        torch.testing.assert_close(every["w"][index], one(params, x)["w"])
        torch.testing.assert_close(every["v"][index], one(params, x)["v"])


def test_a_functional_loop_equals_a_step():
    model = torch.nn.ModuleDict({"enc": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 1)})
    routes, tx = {"task": "*", "small": {"enc": 0.1}}, ff.optim.adamw(1e-2)

    def of_module(m, x):
        h = m["enc"](x)
        return {"task": m["head"](h).square().mean(), "small": h.square().mean()}

    def of_params(params, x):
        h = x @ params["enc.weight"].T + params["enc.bias"]
        out = h @ params["head.weight"].T + params["head.bias"]
        return {"task": out.square().mean(), "small": h.square().mean()}

    step = ff.Step(model, of_module, routes, optimizer=tx)
    state = step.init()
    params = {path: p.detach().clone() for path, p in model.named_parameters()}
    f, opt_state = ff.grad_and_value(of_params, routes), tx.init(params)
    for _ in range(4):
        x = torch.randn(5, 3)
        state, metrics = step(state, x)
        grads, values = f(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = ff.apply_updates(params, updates)
        torch.testing.assert_close(values["task"], metrics["task"])
    for path, tensor in params.items():
        torch.testing.assert_close(state.params[path], tensor, rtol=1e-10, atol=1e-12)


def test_a_plan_stands_for_names_not_positions():
    model = torch.nn.Linear(2, 1)
    step = ff.Step(model, lambda m, b: {"a": m(b).sum()}, {"a": "weight"}, optimizer=ff.optim.sgd(0.1))
    x = torch.randn(4, 2)
    grads = ff.grad(lambda p: {"a": (x @ p["weight"].T + p["bias"]).sum()}, step.plan)(dict(step.init().params))
    assert grads["bias"] is None
    torch.testing.assert_close(grads["weight"][0], x.sum(0))


def test_mistakes():
    with pytest.raises(ff.RouteError, match=r"path\('encoder'\) matches no parameter; did you mean 'enc'"):
        ff.grad(losses, {"task": "encoder"})(tree(), torch.randn(2))
    with pytest.raises(ff.RouteError, match="names only frozen parameters"):
        ff.grad(losses, {"task": "steps"})(tree(), torch.randn(2))
    with pytest.raises(ff.RouteError, match="a bare pytree has no modules"):
        ff.grad(losses, {"task": ff.kind(torch.nn.Linear)})(tree(), torch.randn(2))
    with pytest.raises(ValueError, match=r"two leaves of one pytree have the path 'a.b'; rename a key"):
        ff.grad(lambda p: {"l": p["a.b"]}, {"l": "*"})({"a.b": torch.ones(()), "a": {"b": torch.ones(())}})
    with pytest.raises(ValueError, match="engine is one of"):
        ff.grad(losses, ROUTES, engine="quick")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_inside_torch_compile(backend):
    """A functional loop of one's own, compiled as one graph: gradients, None where untouched, losses and aux."""

    def losses(params, x):
        h = torch.tanh(x @ params["encoder"][0])
        return {"task": (h @ params["head"]).square().mean(), "adv": h.mean()}, {"size": h.abs().sum()}

    both = ff.grad_and_value(losses, {"task": "*", "adv": {"encoder.0": -0.1}}, has_aux=True)
    params = {"encoder": [torch.randn(4, 4)], "head": torch.randn(4, 2), "unused": torch.randn(3)}

    @torch.compile(fullgraph=True, backend=backend)
    def step(params, x):
        grads, (values, aux) = both(params, x)
        moved = {"encoder": [params["encoder"][0] - 0.1 * grads["encoder"][0]]}
        return moved, grads, values, aux

    for size in (5, 5, 7, 9):
        x = torch.randn(size, 4)
        grads, (values, aux) = both(params, x)
        moved, compiled, losses_, sizes = step(params, x)
        torch.testing.assert_close(moved["encoder"][0], params["encoder"][0] - 0.1 * grads["encoder"][0])
        torch.testing.assert_close(compiled["head"], grads["head"])
        assert compiled["unused"] is None
        torch.testing.assert_close((losses_, sizes), (values, aux))
