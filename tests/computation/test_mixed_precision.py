"""Autocast inside `losses`, and parameters in half precision, against eager autograd and float32 torch.optim."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff
from laws import assert_gradients_equal, assert_step_law

ENGINES = ["routed", "reference", "toggle"]
HALF = 4e-3
"""One rounding of bfloat16: cotangents that are added up are rounded in another order."""


def trunk():
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh()),
            "cls": nn.Linear(16, 3),
            "dom": nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 2)),
        }
    )
    return model.float()


def under_autocast(dtype, **options):
    def losses(model, batch):
        x, label = batch
        with torch.autocast("cpu", dtype=dtype, **options):
            h = model["encoder"](x)
            return {
                "cls": F.cross_entropy(model["cls"](h), label),
                "dom": F.cross_entropy(model["dom"](h), label % 2),
                "small": h.float().square().mean(),
            }

    return losses


ROUTES = {
    "cls": ["encoder", "cls"],
    "dom": {"dom": 1.0, "encoder": -0.1},
    "small": {"encoder.0": 0.3, "encoder.2": torch.tensor(0.7)},
}


def batch():
    return torch.randn(32, 6, dtype=torch.float32), torch.randint(3, (32,))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cache_enabled", [True, False])
def test_autocast_inside_the_losses_is_that_of_eager_autograd(engine, cache_enabled):
    losses = under_autocast(torch.bfloat16, cache_enabled=cache_enabled)
    gradients = assert_step_law(trunk(), losses, ROUTES, batch(), engine=engine, tolerance=HALF)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [None, ff.LossScale(2.0**8)])
def test_autocast_around_the_step_is_that_of_eager_autograd(engine, scale):
    """With its cache of casted weights outliving the step, and the parameters overwritten meanwhile."""

    def losses(model, batch):
        x, label = batch
        h = model["encoder"](x)
        return {"cls": F.cross_entropy(model["cls"](h), label), "dom": model["dom"](h).float().square().mean()}

    routes = {name: ROUTES[name] for name in ("cls", "dom")}
    step = ff.Step(trunk(), losses, routes, optimizer=ff.optim.sgd(0.5), engine=engine, loss_scale=scale)
    state = step.init()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            given = batch()
            eager = copy.deepcopy(step.export(state))
            found = losses(eager, given)
            (found["cls"] - 0.1 * found["dom"]).backward(retain_graph=True)
            wanted = {path: p.grad.clone() for path, p in eager["encoder"].named_parameters(prefix="encoder")}
            mine = step.gradients(state, given)
            assert_gradients_equal({path: mine[path] for path in wanted}, wanted, HALF)
            state, _ = step(state, given)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_weight_is_used_under_autocast_by_several_losses(engine):
    """Autocast casts it once and keeps the result; the losses may update different parts of what they share."""

    def losses(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one, two = model["shared"](x), model["shared"](x.flip(0))
            return {"a": model["top"](one).square().mean().float(), "b": (one * two).mean().float()}

    model = nn.ModuleDict({"shared": nn.Linear(6, 6), "top": nn.Linear(6, 2)}).float()
    routes = {"a": {"top": 1.0, "shared.weight": 2.0}, "b": "shared"}
    assert_step_law(model, losses, routes, batch()[0], engine=engine, tolerance=HALF)


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_in_bfloat16_with_state_in_float32(engine):
    """A run whose updates are those of a float32 optimizer on the same gradients, each rounded once."""

    def losses(model, batch):
        x, label = batch
        h = model["encoder"](x.bfloat16())
        return {
            "cls": F.cross_entropy(model["cls"](h).float(), label),
            "dom": F.cross_entropy(model["dom"](h).float(), label % 2),
        }

    routes = {name: ROUTES[name] for name in ("cls", "dom")}
    tx = ff.optim.adamw(2.0**-6, weight_decay=0.1, state_dtype=torch.float32)
    step = ff.Step(trunk().bfloat16(), losses, routes, optimizer=tx, engine=engine, donate=False)
    state = step.init()
    params = {path: nn.Parameter(tensor.float()) for path, tensor in state.params.items()}
    optimizer = torch.optim.AdamW(params.values(), 2.0**-6, weight_decay=0.1)
    for _ in range(4):
        given = batch()
        before = dict(state.params)
        for path, gradient in step.gradients(state, given).items():
            params[path].grad = gradient.float()
            params[path].data.copy_(before[path])  # its update alone is compared: what is rounded away stays away
        optimizer.step()
        state, _ = step(state, given)
        for path, p in params.items():
            assert state.params[path].dtype == torch.bfloat16
            update = (p.detach() - before[path].float()).bfloat16()
            expected = before[path] + update
            # both sides round what may lie in the middle
            torch.testing.assert_close(state.params[path], expected, rtol=2.0**-7, atol=1e-6)
        entries = state.optimizer.values()
        assert {kept.dtype for entry in entries for kept in entry.values()} == {torch.float32}


@pytest.mark.parametrize("scale", [None, ff.LossScale(8.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_a_step_with_a_state_of_its_own_precision(dtype, scale):
    def losses(model, batch):
        x, label = batch
        h = model["encoder"](x.to(model["cls"].weight.dtype))
        return {"cls": F.cross_entropy(model["cls"](h), label), "dom": F.cross_entropy(model["dom"](h), label % 2)}

    routes = {name: ROUTES[name] for name in ("cls", "dom")}
    step = ff.Step(
        trunk().to(dtype),
        losses,
        routes,
        optimizer=ff.optim.adam(1e-3, state_dtype=torch.float32),
        loss_scale=scale,
    )
    state, _ = step(step.init(), batch())
    report = ff.verify(step, state, batch())
    assert report.ok, report
