"""Many small heads on one wide trunk: how cost grows with the number of losses (`python -m bench bars`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads.workload import Workload, mlp


class ManyHeads(nn.Module):
    """A trunk of 8 x 512 with many small heads."""

    def __init__(self, heads: int, width: int = 512) -> None:
        super().__init__()
        self.trunk = mlp(*[width] * 9)
        self.heads = nn.ModuleList(nn.Linear(width, 8) for _ in range(heads))


def many_heads(count: int = 16, size: int = 256, width: int = 512) -> Workload:
    """Multi-task training: every loss updates the trunk and its own head."""

    def losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        x, targets = batch
        h = model.trunk(x)
        return {f"task{k}": F.mse_loss(head(h), targets[k]) for k, head in enumerate(model.heads)}

    return Workload(
        f"{count} losses on one trunk",
        ManyHeads(count, width),
        losses,
        {f"task{k}": ["trunk", f"heads.{k}"] for k in range(count)},
        lambda: (torch.randn(size, width), torch.randn(count, size, 8)),
    )
