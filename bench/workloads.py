"""The models and losses that are timed, written as their users write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Losses = Callable[[nn.Module, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Workload:
    """A model, its losses and routes, and a source of fresh batches."""

    name: str
    model: nn.Module
    losses: Losses
    routes: Mapping[str, Any]
    batch: Callable[[], Any]


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Adversarial(nn.Module):
    """The design's example: an encoder of 6 x 512, four class heads, four domain heads."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.encoder = mlp(*[width] * 7)
        self.classes = nn.ModuleList(mlp(width, width, 10) for _ in range(4))
        self.domains = nn.ModuleList(mlp(width, width, 2) for _ in range(4))


def adversarial(width: int = 512, size: int = 256) -> Workload:
    """Domain-adversarial training: the domain loss trains its heads, and with the other sign the encoder."""

    def losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        x, label, domain = batch
        h = model.encoder(x)
        return {
            "cls": sum(F.cross_entropy(head(h), label) for head in model.classes),
            "dom": sum(F.cross_entropy(head(h), domain) for head in model.domains),
        }

    return Workload(
        "adversarial MLP",
        Adversarial(width),
        losses,
        {"cls": ["encoder", "classes"], "dom": {"domains": 1.0, "encoder": -0.1}},
        lambda: (torch.randn(size, width), torch.randint(10, (size,)), torch.randint(2, (size,))),
    )


def confusion(width: int = 512, size: int = 256) -> Workload:
    """Three losses over the same model: class losses, the domain heads' own, and one that confuses them."""
    base = adversarial(width, size)

    def losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        x, label, domain = batch
        h = model.encoder(x)
        domains = [head(h) for head in model.domains]
        return {
            "cls": sum(F.cross_entropy(head(h), label) for head in model.classes),
            "dom": sum(F.cross_entropy(logits, domain) for logits in domains),
            "adv": 0.1 * sum(F.cross_entropy(logits, 1 - domain) for logits in domains),
        }

    routes = {"cls": ["encoder", "classes"], "dom": "domains", "adv": "encoder"}
    return Workload("adversarial MLP, 3 losses", base.model, losses, routes, base.batch)


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
