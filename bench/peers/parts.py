"""What everybody who trains a trunk with heads under a merge rule begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.contender import Contender, adam, batches_on, model_on, waiter
from bench.workloads.merge import Merge
from bench.workloads.workload import MultiTask, Workload


@dataclass(frozen=True)
class Parts:
    """A contender's own model, its parameters by who updates them, its optimizer, its batches.

    Attributes:
        shared: the trunk's parameters, where all losses meet.
        heads: of each loss its head's parameters, which it alone updates.
    """

    model: nn.Module
    split: MultiTask
    merge: Merge
    shared: list[nn.Parameter]
    heads: list[list[nn.Parameter]]
    optimizer: torch.optim.Optimizer
    batches: Iterator[Any]
    device: torch.device

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """The features and the losses on the next batch; gradients are cleared."""
        self.optimizer.zero_grad()
        batch = next(self.batches)
        h = self.split.features(self.model, batch)
        return h, list(self.split.losses(self.model, h, batch).values())

    def contender(self, run: Callable[[], object], *, draws: bool = False) -> Contender:
        """What is timed."""
        return Contender(run, waiter(self.device), lambda: dict(self.model.named_parameters()), draws=draws)


def parts(workload: Workload, device: torch.device) -> Parts:
    """For workloads with a rule, whose routes are all alike: the trunk, and a head for each loss."""
    split, merge = workload.multitask, workload.merge
    assert isinstance(split, MultiTask), split
    assert merge is not None
    model = model_on(workload, device)
    return Parts(
        model,
        split,
        merge,
        list(model.get_submodule(split.shared).parameters()),
        [list(head.parameters()) for head in model.get_submodule("heads").children()],
        adam(model, workload.rates),
        batches_on(workload, device),
        device,
    )
