"""A small vision transformer with K classification tasks, one head each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads.attention import Block
from bench.workloads.workload import MultiTask, Workload, total


class Trunk(nn.Module):
    """Patches, blocks, and the mean over tokens."""

    def __init__(self, width: int, depth: int, heads: int, image: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch * patch, width)
        self.position = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        tall = images.unflatten(2, (-1, self.patch)).unflatten(4, (-1, self.patch))  # batch, channel, i, p, j, q
        x = self.embed(tall.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


def vit(
    tasks: int = 4,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    size: int = 16,
    image: int = 32,
    patch: int = 4,
) -> Workload:
    """Multi-task training: every loss updates the trunk and its own head. The heads are a small part of the work."""

    def losses(model: nn.Module, h: Tensor, batch: Any) -> dict[str, Tensor]:
        return {f"task{k}": F.cross_entropy(head(h), batch[1][k]) for k, head in enumerate(model["heads"])}

    def in_jax() -> Callable[..., Any]:
        from bench.in_jax import vit as written

        return partial(written.losses, tasks=tasks, depth=depth, heads=heads, patch=patch)

    split = MultiTask(lambda model, batch: model["trunk"](batch[0]), losses, shared="trunk")
    model = {
        "trunk": Trunk(width, depth, heads, image, patch),
        "heads": nn.ModuleList(nn.Linear(width, 10) for _ in range(tasks)),
    }
    return Workload(
        f"ViT, {tasks} losses" if tasks > 1 else "ViT, 1 loss",
        nn.ModuleDict(model),
        split.together,
        {f"task{k}": ["trunk", f"heads.{k}"] for k in range(tasks)},
        lambda: (torch.randn(size, 3, image, image), torch.randint(10, (tasks, size))),
        by_hand=lambda model, batch: total(split.together(model, batch)),
        multitask=split,
        in_jax=in_jax,
    )
