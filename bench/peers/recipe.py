"""What people write: toggle `requires_grad`, one `backward(retain_graph=True)` per loss and sign."""

from __future__ import annotations

import torch

from bench.contender import Contender, adam, batches_on, model_on, phases, waiter
from bench.workloads.workload import Workload


def build(workload: Workload, device: torch.device, *, fused: bool = True, step: bool = True) -> Contender:
    """The recipe; `step=False` leaves the optimizer out."""
    model, batches = model_on(workload, device), batches_on(workload, device)
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    optimizer = adam(model, workload.rates, fused=fused)
    turns = phases(workload)

    def run() -> None:
        optimizer.zero_grad()
        losses = workload.losses(model, next(batches))
        for turn, phase in enumerate(turns, start=1):
            for path, parameter in trained.items():
                parameter.requires_grad_(path in phase.paths)
            phase.weighted(losses).backward(retain_graph=turn < len(turns))
        for parameter in trained.values():
            parameter.requires_grad_(True)
        if step:
            optimizer.step()

    return Contender(run, waiter(device), lambda: dict(model.named_parameters()))
