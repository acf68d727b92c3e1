"""A plain loop with a gradient scaler, accumulation and clipping, against the same loop around the recipe."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_ways import dann, distance, example, framework, recipe
from torch import nn

import funcfreeze as ff


@pytest.fixture(scope="module")
def plain_loop():
    framework("sklearn")
    return example("plain_loop")


def by_hand(plain_loop, model, batches, half=False, way="recipe"):
    readers = [*model.encoder.parameters(), *model.digit.parameters()]
    groups = [{"params": readers, "lr": 2e-3}, {"params": model.domain.parameters(), "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.999))
    scaler = torch.amp.GradScaler("cpu")
    norms = []
    for number, batch in enumerate(batches, 1):
        with torch.autocast("cpu", torch.float16, enabled=half):
            found = plain_loop.losses(model, batch)
        if way == "sum":
            scaler.scale(sum(found.values()) / 2).backward()
        elif way == "ff.backward":
            routes = {**plain_loop.ROUTES, "domain": {"domain": 1.0, "encoder": -0.3 * dann(number // 2, 400)}}
            ff.backward({name: scaler.scale(loss / 2) for name, loss in found.items()}, routes, model)
        else:
            entries = [
                (found["digit"], 1.0, ("encoder", "digit")),
                (found["domain"], 1.0, ("domain",)),
                (found["domain"], -0.3 * dann(number // 2, 400), ("encoder",)),
            ]
            recipe(model, entries, lambda loss, **how: scaler.scale(loss / 2).backward(**how))
        if number % 2 == 0:
            scaler.unscale_(optimizer)
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return norms


def some(plain_loop, seed, dtype):
    batches = plain_loop.batches(plain_loop.two_domains(seed), seed, steps=24, size=32)
    return [(clean.to(dtype), labels, noisy.to(dtype)) for clean, labels, noisy in batches]


def test_as_the_recipe(plain_loop, seed, capsys):
    batches = some(plain_loop, seed, torch.float64)
    ours = plain_loop.Reader()
    theirs, by_backward, summed = (copy.deepcopy(ours) for _ in range(3))
    start = copy.deepcopy(ours.state_dict())
    plain_loop.train(ours, batches, half=False)
    assert max(by_hand(plain_loop, theirs, batches)) > 0.5, "clipping bites"
    by_hand(plain_loop, by_backward, batches, way="ff.backward")
    by_hand(plain_loop, summed, batches, way="sum")
    assert distance(ours, by_backward, start) < 1e-10
    assert distance(ours, theirs, start) < 1e-10
    assert distance(ours, summed, start) > 1e-4
    assert "domain.4.bias" in capsys.readouterr().out


@pytest.mark.parametrize("inside", [True, False])
def test_half_precision_costs_what_it_costs_the_recipe(plain_loop, seed, inside):
    """The gradients at one point: along a trajectory, Adam turns their rounding into steps of full size."""
    batches = some(plain_loop, seed, torch.float32)
    weight = -0.3 * dann(200, 400)

    def gradient(model):
        return torch.cat([p.grad.ravel().double() / 1024 for p in model.parameters()])

    for batch in batches[:6]:
        full = plain_loop.Reader().float()
        ours, theirs = copy.deepcopy(full), copy.deepcopy(full)
        for model, half in ((full, False), (theirs, True)):
            with torch.autocast("cpu", torch.float16, enabled=half):
                found = plain_loop.losses(model, batch)
            entries = [
                (found["digit"], 1.0, ("encoder", "digit")),
                (found["domain"], 1.0, ("domain",)),
                (found["domain"], weight, ("encoder",)),
            ]
            recipe(model, entries, lambda loss, **how: (1024 * loss).backward(**how))
        with torch.autocast("cpu", torch.float16):
            found = plain_loop.losses(ours, batch)
            loss = ff.combine(found, plain_loop.ROUTES, ours, step=200) if inside else None
        if not inside:
            loss = ff.combine(found, plain_loop.ROUTES, ours, step=200)
        (1024 * loss).backward()
        exact = gradient(full)
        cost = (gradient(theirs) - exact).norm()
        assert 0 < (gradient(ours) - exact).norm() < 1.5 * cost
        assert cost < 0.05 * exact.norm()
