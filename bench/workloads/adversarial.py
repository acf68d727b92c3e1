"""The design's example: an encoder, class heads, and domain heads that the encoder works against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads.workload import MultiTask, Reversal, Workload, detached, mlp


class Adversarial(nn.Module):
    """An encoder of 6 layers, four class heads, four domain heads."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.encoder = mlp(*[width] * 7)
        self.classes = nn.ModuleList(mlp(width, width, 10) for _ in range(4))
        self.domains = nn.ModuleList(mlp(width, width, 2) for _ in range(4))


def _batches(width: int, size: int) -> Callable[[], Any]:
    return lambda: (torch.randn(size, width), torch.randint(10, (size,)), torch.randint(2, (size,)))


def _features(model: nn.Module, batch: Any) -> Tensor:
    return model.encoder(batch[0])


def _class_loss(model: nn.Module, h: Tensor, label: Tensor) -> Tensor:
    return sum(F.cross_entropy(head(h), label) for head in model.classes)


def _two_losses(model: nn.Module, h: Tensor, batch: Any) -> dict[str, Tensor]:
    _, label, domain = batch
    return {
        "cls": _class_loss(model, h, label),
        "dom": sum(F.cross_entropy(head(h), domain) for head in model.domains),
    }


def _reversal(model: nn.Module, batch: Any) -> Tensor:
    x, label, domain = batch
    h = model.encoder(x)
    back = Reversal.apply(h)
    return _class_loss(model, h, label) + sum(F.cross_entropy(head(back), domain) for head in model.domains)


def adversarial(width: int = 512, size: int = 256) -> Workload:
    """Domain-adversarial training: the domain loss trains its heads, and with the other sign the encoder."""
    split = MultiTask(_features, _two_losses, shared="encoder")

    def in_jax() -> Callable[..., Any]:
        from bench.in_jax import adversarial as written

        return partial(written.losses, confusion=False)

    return Workload(
        "adversarial MLP",
        Adversarial(width),
        split.together,
        {"cls": ["encoder", "classes"], "dom": {"domains": 1.0, "encoder": -0.1}},
        _batches(width, size),
        by_hand=_reversal,
        multitask=split,
        in_jax=in_jax,
    )


def _three_losses(model: nn.Module, h: Tensor, batch: Any) -> dict[str, Tensor]:
    _, label, domain = batch
    domains = [head(h) for head in model.domains]
    return {
        "cls": _class_loss(model, h, label),
        "dom": sum(F.cross_entropy(logits, domain) for logits in domains),
        "adv": 0.1 * sum(F.cross_entropy(logits, 1 - domain) for logits in domains),
    }


def _two_forwards(model: nn.Module, batch: Any) -> Tensor:
    """The domain heads run twice: on detached features, and with detached weights."""
    x, label, domain = batch
    h = model.encoder(x)
    still = h.detach()
    own = sum(F.cross_entropy(head(still), domain) for head in model.domains)
    adversary = sum(F.cross_entropy(detached(head, h), 1 - domain) for head in model.domains)
    return _class_loss(model, h, label) + own + 0.1 * adversary


def confusion(width: int = 512, size: int = 256) -> Workload:
    """Three losses over the same model: class losses, the domain heads' own, and one that confuses them."""
    split = MultiTask(_features, _three_losses, shared="encoder")

    def in_jax() -> Callable[..., Any]:
        from bench.in_jax import adversarial as written

        return partial(written.losses, confusion=True)

    return Workload(
        "adversarial MLP, 3 losses",
        Adversarial(width),
        split.together,
        {"cls": ["encoder", "classes"], "dom": "domains", "adv": "encoder"},
        _batches(width, size),
        by_hand=_two_forwards,
        multitask=split,
        in_jax=in_jax,
    )
