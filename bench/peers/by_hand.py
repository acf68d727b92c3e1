"""Hand-written: one loss with `detach()` and reversal layers in the right places, one backward; compiled too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.contender import Absent, Contender, adam, batches_on, model_on, waiter
from bench.workloads.program import Program
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
    begin = _beginning(compile)

    def run() -> None:
        begin()
        optimizer.zero_grad()
        loss(model, next(batches)).backward()
        optimizer.step()

    return Contender(run, waiter(device), lambda: dict(model.named_parameters()))


def program(program: Program, device: torch.device, *, compile: Mapping[str, Any] | None = None) -> Contender:
    """The loop as it was written; a step is as many calls of its body as are in the program's own period."""
    model, batches = model_on(program, device), batches_on(program, device)
    loop, begin = program.by_hand(model, compile), _beginning(compile)
    parts = {"": model, **{f"targets.{name}.": target for name, target in loop.targets.items()}}

    def run() -> None:
        for _ in range(program.calls):
            begin()
            loop.body(next(batches))

    def parameters() -> dict[str, Tensor]:
        return {before + path: p for before, part in parts.items() for path, p in part.named_parameters()}

    return Contender(run, waiter(device), parameters)


def _beginning(compile: Mapping[str, Any] | None) -> Callable[[], None]:
    """What a step begins with: outputs of the last replay of a CUDA graph might still be in use."""
    graphs = compile is not None and compile.get("mode") == "reduce-overhead"
    return torch.compiler.cudagraph_mark_step_begin if graphs else lambda: None


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
