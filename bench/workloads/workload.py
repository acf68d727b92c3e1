"""What a workload is, and the pieces that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads.merge import Merge

Losses = Callable[[nn.Module, Any], dict[str, Tensor]]
NOT_WRITTEN = "not written for this workload"


@dataclass(frozen=True)
class MultiTask:
    """The losses in the form that multi-task packages want: a trunk's features, and losses from the features.

    Attributes:
        features: `features(model, batch)`, what all losses share.
        losses: `losses(model, features, batch)`.
        shared: the name of the module that computes the features.
    """

    features: Callable[[nn.Module, Any], Tensor]
    losses: Callable[[nn.Module, Tensor, Any], dict[str, Tensor]]
    shared: str

    def together(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """All losses, as `ff.Step` wants them."""
        return self.losses(model, self.features(model, batch), batch)


@dataclass(frozen=True)
class Workload:
    """A model, its losses and routes, a source of fresh batches, and how others say the same.

    Attributes:
        by_hand: one scalar whose plain `backward()` makes the routed gradient: the best that a careful user writes.
        multitask: the losses split at the features, or why they cannot be.
        in_jax: makes `losses(params, buffers, batch) -> (losses, buffers)` over flat dicts of jax arrays that have the
            torch model's names and layouts; or why there is none.
        rates: Adam's learning rate, by the name of a submodule; "" is the whole model.
        merge: the rule where losses meet; None for the plain sum.
    """

    name: str
    model: nn.Module
    losses: Losses
    routes: Mapping[str, Any]
    batch: Callable[[], Any]
    by_hand: Callable[[nn.Module, Any], Tensor] | str = NOT_WRITTEN
    multitask: MultiTask | str = NOT_WRITTEN
    in_jax: Callable[[], Callable[..., Any]] | str = NOT_WRITTEN
    rates: Mapping[str, float] = field(default_factory=lambda: {"": 1e-3})
    merge: Merge | None = None


def mlp(*widths: int, between: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), between()]
    return nn.Sequential(*layers[:-1])


class Reversal(torch.autograd.Function):
    """A gradient reversal layer, as in every domain-adversarial repository."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return -0.1 * cotangent


def detached(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)` through which gradients flow into `x` but not into the module's parameters."""
    values = {name: p.detach() for name, p in module.named_parameters()}
    return torch.func.functional_call(module, values, (x,))


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """All losses added up."""
    return torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))
