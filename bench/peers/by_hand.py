"""Hand-written: one loss with `detach()` and reversal layers in the right places, one backward; compiled too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bench.contender import Absent, Contender, adam, batches_on, model_on, waiter
from bench.workloads.workload import Workload, total


def build(
    workload: Workload,
    device: torch.device,
    *,
    compile: Mapping[str, Any] | None = None,
    fused: bool = True,
) -> Contender | Absent:
    """The best that a careful user writes; with `compile` the loss function goes through `torch.compile(**compile)`."""
    if isinstance(workload.by_hand, str):
        return Absent("not written", workload.by_hand)
    model, batches = model_on(workload, device), batches_on(workload, device)
    optimizer = adam(model, workload.rates, fused=fused)
    loss = workload.by_hand if compile is None else torch.compile(workload.by_hand, **compile)
    graphs = compile is not None and compile.get("mode") == "reduce-overhead"

    def run() -> None:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()  # or outputs of the last replay might still be in use
        optimizer.zero_grad()
        loss(model, next(batches)).backward()
        optimizer.step()

    return Contender(run, waiter(device), lambda: dict(model.named_parameters()))


def summed(workload: Workload, device: torch.device, *, fused: bool = True, step: bool = True) -> Contender:
    """All losses added up and no routes at all: another update, and the price of training with a single loss."""
    model, batches = model_on(workload, device), batches_on(workload, device)
    optimizer = adam(model, workload.rates, fused=fused)

    def run() -> None:
        optimizer.zero_grad()
        total(workload.losses(model, next(batches))).backward()
        if step:
            optimizer.step()

    return Contender(run, waiter(device), lambda: dict(model.named_parameters()))
