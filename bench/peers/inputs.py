"""`backward(inputs=...)`: nobody is toggled, each loss names the parameters that it accumulates into."""

from __future__ import annotations

import torch

from bench.contender import Contender, adam, batches_on, model_on, phases, waiter
from bench.workloads.workload import Workload


def build(workload: Workload, device: torch.device) -> Contender:
    """One backward for each loss and weight, over just the parameters that it may update."""
    model, batches = model_on(workload, device), batches_on(workload, device)
    optimizer = adam(model, workload.rates)
    named = dict(model.named_parameters())
    turns = [(phase, [named[path] for path in sorted(phase.paths)]) for phase in phases(workload)]

    def run() -> None:
        optimizer.zero_grad()
        losses = workload.losses(model, next(batches))
        for turn, (phase, inputs) in enumerate(turns, start=1):
            phase.weighted(losses).backward(inputs=inputs, retain_graph=turn < len(turns))
        optimizer.step()

    return Contender(run, waiter(device), lambda: dict(model.named_parameters()))
