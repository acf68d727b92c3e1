"""A deep transformer with short arithmetic, so that planning shows (`python -m bench bars`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads.workload import Workload


class Block(nn.Module):
    """A transformer block with separate projections, so that the graph is as long as real ones are."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (proj(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A stack of blocks with three heads."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.heads = nn.ModuleList(nn.Linear(width, out) for out in (512, 2, 2))


def transformer(layers: int = 48, width: int = 128, size: int = 4, length: int = 64) -> Workload:
    """A deep transformer with a language loss on everything, a probe on its head, an adversary on the upper half."""

    def losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        tokens, style, domain = batch
        h = model.embed(tokens)
        for block in model.blocks:
            h = block(h)
        pooled = h.mean(1)
        return {
            "lm": F.cross_entropy(model.heads[0](h).flatten(0, 1), tokens.flatten()),
            "style": F.cross_entropy(model.heads[1](pooled), style),
            "domain": F.cross_entropy(model.heads[2](pooled), domain),
        }

    return Workload(
        f"{layers}-layer transformer",
        Transformer(layers, width, 4),
        losses,
        {
            "lm": ["embed", "blocks", "heads.0"],
            "style": ["embed", "blocks", "heads.1"],
            "domain": {"heads.2": 1.0, "embed": -0.1, "blocks": -0.1},
        },
        lambda: (torch.randint(512, (size, length)), torch.randint(2, (size,)), torch.randint(2, (size,))),
    )
