"""Sparse and dense gradients of one parameter: any order, any weights, every door, against plain autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff
from laws import assert_law, assert_step_law

ENGINES = ["routed", "toggle", "reference"]
WEIGHTS = [1.0, 0.1, -2.0]


def lookup(table, rows, weighting):
    """A loss whose gradient at the table is sparse, with a row that is looked up twice."""
    return (F.embedding(rows, table, sparse=True) * weighting).square().sum()


def random_losses(order):
    """Losses in that order: s and t have sparse gradients at the table, d and e dense ones."""
    rows = {name: torch.randint(5, (4,)) for name in "st"}
    rows = {name: torch.cat([drawn, drawn[:1]]) for name, drawn in rows.items()}
    weighting = torch.randn(5, 3)
    every = {
        "s": lambda p: lookup(p["table"], rows["s"], weighting),
        "t": lambda p: lookup(p["table"], rows["t"], weighting + 1).sin(),
        "d": lambda p: (p["table"] @ p["head"]).square().sum(),
        "e": lambda p: p["table"].sin().sum() * p["head"].sum(),
    }
    return lambda p: {name: every[name](p) for name in order}


def of_module(losses):
    return lambda model, batch: losses(dict(model))


def module():
    return nn.ParameterDict({"table": nn.Parameter(torch.randn(5, 3)), "head": nn.Parameter(torch.randn(3, 2))})


def random_weights(order):
    """Weights for the table at random, one of them 1; a table for the oracle."""
    chosen = [WEIGHTS[int(index)] for index in torch.randint(len(WEIGHTS), (len(order),))]
    return {name: {"table": weight, "head": 1.0} for name, weight in zip(order, chosen, strict=True)}


ORDERS = ["sd", "ds", "st", "sde", "sed", "std", "dst", "sdt", "stde", "esdt"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_adds_them_in_any_order(engine, order):
    params = {path: p.detach() for path, p in module().items()}
    losses = random_losses(order)
    for weights in itertools.product(WEIGHTS, repeat=2):
        table = random_weights(order)
        table[order[0]]["table"], table[order[-1]]["table"] = weights
        assert_law(engine, losses, params, table)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_and_its_losses_apart(engine, order):
    losses, routes = of_module(random_losses(order)), random_weights(order)
    gradients = assert_step_law(module(), losses, routes, None, engine=engine)
    assert gradients["table"].is_sparse == (set(order) <= set("st"))


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_are_schedules_or_tensors(engine):
    losses = of_module(random_losses("sdt"))
    schedule = ff.optim.linear_schedule(0.5, 1.0, 10)
    routes = {"s": {"table": schedule}, "d": {"*": torch.tensor(0.3)}, "t": {"table": torch.tensor(-0.7)}}
    model = module()
    step = ff.Step(model, losses, routes, optimizer=ff.optim.sgd(0.1, momentum=0.9), engine=engine)
    found = losses(model, None)
    wanted = sum(
        weight * torch.autograd.grad(found[name], model["table"], retain_graph=True)[0].to_dense()
        for name, weight in (("s", 0.5), ("d", 0.3), ("t", -0.7))
    )
    torch.testing.assert_close(step.gradients(step.init(), None)["table"], wanted)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_verify_runs_on_them(engine, order):
    step = ff.Step(
        module(), of_module(random_losses(order)), random_weights(order), optimizer=ff.optim.sgd(1e-3), engine=engine
    )
    report = ff.verify(step, step.init(), None, steps=2)
    assert report.ok, report


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("held", ["nothing", "sparse", "dense"])
def test_backward_adds_to_whatever_is_in_grad(order, held):
    model, losses = module(), random_losses(order)
    table = random_weights(order)
    before = {"nothing": None, "sparse": "s", "dense": "d"}[held]
    wanted = torch.zeros(5, 3)
    if before:
        random_losses(before)(dict(model))[before].backward()
        wanted += model["table"].grad.to_dense()
    found = losses(dict(model))
    for name in order:
        (gradient,) = torch.autograd.grad(found[name], model["table"], retain_graph=True)
        wanted += table[name]["table"] * gradient.to_dense()
    ff.backward(found, table, model)
    assert model["table"].grad.is_sparse == (set(order) <= set("st") and held != "dense")
    torch.testing.assert_close(model["table"].grad.to_dense(), wanted)


@pytest.mark.parametrize("order", ["sd", "ds", "sdt"])
def test_a_run_equals_torchs(order):
    model, losses = module(), random_losses(order)
    routes = random_weights(order)
    step = ff.Step(model, of_module(losses), routes, optimizer=ff.optim.sgd(1e-3, momentum=0.9))
    state = step.init()
    theirs = nn.ParameterDict({path: nn.Parameter(p.detach().clone()) for path, p in model.items()})
    optimizer = torch.optim.SGD(theirs.parameters(), 1e-3, momentum=0.9)
    for _ in range(4):
        state, _ = step(state, None)
        optimizer.zero_grad()
        found = losses(dict(theirs))
        for name in order:
            paths = list(routes[name])
            gradients = torch.autograd.grad(
                found[name], [theirs[path] for path in paths], retain_graph=True, allow_unused=True
            )
            for path, gradient in zip(paths, gradients, strict=True):
                if gradient is not None:
                    moved = routes[name][path] * gradient.to_dense()
                    theirs[path].grad = moved if theirs[path].grad is None else theirs[path].grad + moved
        optimizer.step()
    for path, p in theirs.items():
        torch.testing.assert_close(state.params[path], p.detach(), rtol=1e-10, atol=1e-12)
