"""A GPT-like model with a frozen body: adapters learn the task, and probes and an adversary look on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads.attention import Block
from bench.workloads.workload import Reversal, Workload, mlp


class Adapted(nn.Module):
    """A frozen body, an adapter after each block, and heads for the auxiliary losses."""

    def __init__(self, width: int, depth: int, heads: int, length: int, vocabulary: int, bottleneck: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.requires_grad_(False)
        self.adapters = nn.ModuleList(mlp(width, bottleneck, width, between=nn.GELU) for _ in range(depth))
        self.exit, self.style = nn.Linear(width, vocabulary), nn.Linear(width, 8)
        self.domain = mlp(width, width, 2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states half way up, and at the top."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        middle = x
        for index, (block, adapter) in enumerate(zip(self.blocks, self.adapters, strict=True), start=1):
            x = block(x)
            x = x + adapter(x)
            middle = x if 2 * index == len(self.blocks) else middle
        return middle, self.norm(x)


def _next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    tokens, style, domain = batch
    middle, h = model(tokens)
    pooled = h.mean(1)
    return {
        "lm": _next_token(F.linear(h, model.tokens.weight), tokens),
        "exit": _next_token(model.exit(middle), tokens),
        "style": F.cross_entropy(model.style(pooled), style),
        "domain": F.cross_entropy(model.domain(pooled), domain),
    }


def _by_hand(model: nn.Module, batch: Any) -> Tensor:
    """A `detach()` before the probe, a reversal layer before the adversary."""
    tokens, style, domain = batch
    middle, h = model(tokens)
    pooled = h.mean(1)
    return (
        _next_token(F.linear(h, model.tokens.weight), tokens)
        + _next_token(model.exit(middle), tokens)
        + F.cross_entropy(model.style(pooled.detach()), style)
        + F.cross_entropy(model.domain(Reversal.apply(pooled)), domain)
    )


def gpt(
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    size: int = 8,
    length: int = 64,
    vocabulary: int = 512,
    bottleneck: int = 16,
) -> Workload:
    """Adapters over a frozen body, with an early exit, a probe that moves nothing below it, and an adversary."""

    def in_jax() -> Callable[..., Any]:
        from bench.in_jax import gpt as written

        return partial(written.losses, depth=depth, heads=heads)

    return Workload(
        "GPT, frozen body, adapters",
        Adapted(width, depth, heads, length, vocabulary, bottleneck),
        _losses,
        {
            "lm": "adapters",
            "exit": ["exit", *(f"adapters.{k}" for k in range(depth // 2))],
            "style": "style",
            "domain": {"domain": 1.0, "adapters": -0.1},
        },
        lambda: (
            torch.randint(vocabulary, (size, length)),
            torch.randint(8, (size,)),
            torch.randint(2, (size,)),
        ),
        by_hand=_by_hand,
        multitask="one of the losses branches off half way up the trunk, and `features` is one place in the graph",
        in_jax=in_jax,
    )
