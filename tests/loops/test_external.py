"""Losses that are vectors, with gradients from outside, as `Q.backward(gradient=...)` takes them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import funcfreeze as ff

ROUTES = {"Q": "*", "adv": {"trunk": -0.5}}


def network():
    return nn.ModuleDict(
        {"trunk": nn.Sequential(nn.Linear(3, 4), nn.Tanh()), "q": nn.Linear(4, 5), "d": nn.Linear(4, 2)}
    )


def outputs(model, x):
    h = model["trunk"](x)
    return model["q"](h), model["d"](h).square().mean()


def recipe(model, x, external):
    """The gradients of toggling."""
    q, adv = outputs(model, x)
    q.backward(gradient=external, retain_graph=True)
    model["q"].requires_grad_(False)
    model["d"].requires_grad_(False)
    (-0.5 * adv).backward(inputs=list(model["trunk"].parameters()))
    model.requires_grad_(True)
    return {path: p.grad for path, p in model.named_parameters()}


def assert_same(model, wanted):
    for path, p in model.named_parameters():
        if wanted[path] is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, wanted[path], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("door", ["backward", "combine"])
def test_a_vector_loss(door):
    model = network()
    wanted = recipe(copy.deepcopy(model), x := torch.randn(6, 3), external := torch.randn(6, 5))
    q, adv = outputs(model, x)
    if door == "backward":
        with torch.no_grad():
            ff.backward({"Q": q, "adv": adv}, ROUTES, model, gradient={"Q": external})
    else:
        loss = ff.combine({"Q": q, "adv": adv}, ROUTES, model, gradient={"Q": external})
        assert loss.item() == pytest.approx(((q * external).sum() + adv).item())
        loss.backward()
    assert_same(model, wanted)


def test_the_gradient_is_a_constant_and_may_be_narrower():
    model = network()
    external = torch.randn(6, 5, dtype=torch.float32, requires_grad=True)
    wanted = recipe(copy.deepcopy(model), x := torch.randn(6, 3), external.detach().double())
    q, adv = outputs(model, x)
    ff.combine({"Q": q, "adv": adv}, ROUTES, model, gradient={"Q": external}).backward()
    assert_same(model, wanted)
    assert external.grad is None


def test_absent_and_scalar_losses():
    model = network()
    q, adv = outputs(model, torch.randn(6, 3))
    loss = ff.combine({"Q": None, "adv": adv}, ROUTES, model, gradient={"Q": None, "adv": torch.tensor(2.0)})
    assert loss.item() == pytest.approx(2 * adv.item())
    with torch.no_grad():
        q, adv = outputs(model, torch.randn(6, 3))
        loss = ff.combine({"Q": q, "adv": adv}, ROUTES, model, gradient={"Q": torch.ones(6, 5)})
    assert loss.item() == pytest.approx((q.sum() + adv).item())


@pytest.mark.parametrize("door", [ff.backward, ff.combine])
def test_all_mistakes_at_once(door):
    model = network()
    q, adv = outputs(model, torch.randn(6, 3))
    with pytest.raises(ff.RouteError) as caught:
        door({"Q": q, "adv": adv}, ROUTES, model, gradient={"Q": torch.ones(5), "q": torch.ones(1), "adv": 2.0})
    assert "gradient['Q'] has shape (5,) on cpu, the loss has shape (6, 5) on cpu" in str(caught.value)
    assert "gradient['q']: there is no such loss; there are 'Q', 'adv'" in str(caught.value)
    assert "gradient['adv'] is a tensor of the loss's shape, got float" in str(caught.value)
    with pytest.raises(TypeError, match="gradient= is a mapping by loss"):
        door({"Q": q, "adv": adv}, ROUTES, model, gradient=torch.ones(6, 5))
    with pytest.raises(ff.RouteError, match=r"loss 'Q' is not a scalar.*or give its gradient=\{'Q': ...\}"):
        door({"Q": q, "adv": adv}, ROUTES, model)
    with pytest.raises(ff.RouteError, match="is torch.complex64, the loss torch.float64, and the imaginary part"):
        door({"Q": q, "adv": adv}, ROUTES, model, gradient={"Q": torch.ones(6, 5, dtype=torch.complex64)})
    with pytest.raises(ff.RouteError, match="loss 'Q' is not a tensor but float"):
        door({"Q": 1.0, "adv": adv}, ROUTES, model, gradient={"Q": torch.ones(6, 5)})
    assert all(p.grad is None for p in model.parameters())
