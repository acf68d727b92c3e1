"""What people write without the package: the recipe, a reversal layer, one summed loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import funcfreeze as ff
from bench.workloads import Workload


def recipe(workload: Workload, *, step: bool = True) -> Callable[[], None]:
    """Toggle `requires_grad`, one `backward(retain_graph=True)` per loss and sign, `torch.optim.Adam`."""
    model = copy.deepcopy(workload.model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    phases = _phases(workload)

    def run() -> None:
        optimizer.zero_grad()
        losses = workload.losses(model, workload.batch())
        parameters = dict(model.named_parameters())
        for turn, (loss, weight, allowed) in enumerate(phases):
            for path, parameter in parameters.items():
                parameter.requires_grad_(path in allowed)
            value = losses[loss] if weight == 1.0 else weight * losses[loss]
            value.backward(retain_graph=turn < len(phases) - 1)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        if step:
            optimizer.step()

    return run


def _phases(workload: Workload) -> list[tuple[str, float, set[str]]]:
    """(loss, weight, paths) of every backward that the routes take."""
    plan = ff.Step(workload.model, workload.losses, workload.routes, optimizer=ff.optim.sgd(0.1)).plan
    phases: dict[tuple[str, float], set[str]] = {}
    for row in plan.rows:
        for loss, (weight,) in row.weights.items():
            phases.setdefault((loss, float(weight)), set()).add(row.path)
    return [(loss, weight, paths) for (loss, weight), paths in phases.items()]


class Reversal(torch.autograd.Function):
    """A gradient reversal layer, as in every domain-adversarial repository."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return -0.1 * cotangent


def reversal(workload: Workload) -> Callable[[], None]:
    """The adversarial workload as one loss with a reversal layer before the domain heads."""
    model = copy.deepcopy(workload.model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    cross_entropy = nn.functional.cross_entropy

    def run() -> None:
        x, label, domain = workload.batch()
        optimizer.zero_grad()
        h = model.encoder(x)
        reversed_h = Reversal.apply(h)
        loss = sum(cross_entropy(head(h), label) for head in model.classes)
        loss = loss + sum(cross_entropy(head(reversed_h), domain) for head in model.domains)
        loss.backward()
        optimizer.step()

    return run


def summed(workload: Workload, *, step: bool = True) -> Callable[[], None]:
    """All losses added up, one backward: no routes at all."""
    model = copy.deepcopy(workload.model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def run() -> None:
        optimizer.zero_grad()
        sum(workload.losses(model, workload.batch()).values()).backward()
        if step:
            optimizer.step()

    return run


def routed(workload: Workload, engine: str = "routed") -> Callable[[], None]:
    """One funcfreeze step with Adam."""
    step = ff.Step(workload.model, workload.losses, workload.routes, optimizer=ff.optim.adam(1e-3), engine=engine)
    state = step.init()

    def run() -> None:
        nonlocal state
        state, _ = step(state, workload.batch())

    return run


def gradients(workload: Workload) -> Callable[[], Mapping[str, Tensor]]:
    """The merged gradients alone."""
    step = ff.Step(workload.model, workload.losses, workload.routes, optimizer=ff.optim.adam(1e-3))
    state = step.init()
    return lambda: step.gradients(state, workload.batch())
