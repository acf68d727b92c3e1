"""A generative adversarial network, generator and discriminator updated in one step, each at its own rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads.workload import MultiTask, Workload, detached, mlp

SLOPE = 0.01  # nn.LeakyReLU's default


def _losses(model: nn.Module, fake: Tensor, batch: Any) -> dict[str, Tensor]:
    real, _ = batch
    scores = model["disc"](fake)
    return {
        "d": F.softplus(-model["disc"](real)).mean() + F.softplus(scores).mean(),
        "g": F.softplus(-scores).mean(),
    }


def _by_hand(model: nn.Module, batch: Any) -> Tensor:
    """The discriminator sees the fake images twice: detached, and with detached weights."""
    real, noise = batch
    fake = model["gen"](noise)
    d = F.softplus(-model["disc"](real)).mean() + F.softplus(model["disc"](fake.detach())).mean()
    return d + F.softplus(-detached(model["disc"], fake)).mean()


def gan(width: int = 512, noise: int = 64, pixels: int = 784, size: int = 128) -> Workload:
    """The non-saturating loss: `d` trains the discriminator alone, `g` the generator alone."""

    def in_jax() -> Callable[..., Any]:
        from bench.in_jax import gan as written

        return partial(written.losses, slope=SLOPE)

    split = MultiTask(lambda model, batch: model["gen"](batch[1]), _losses, shared="gen")
    model = {
        "gen": mlp(noise, width, width, pixels, between=nn.LeakyReLU),
        "disc": mlp(pixels, width, width, 1, between=nn.LeakyReLU),
    }
    return Workload(
        "GAN",
        nn.ModuleDict(model),
        split.together,
        {"d": "disc", "g": "gen"},
        lambda: (torch.randn(size, pixels), torch.randn(size, noise)),
        by_hand=_by_hand,
        multitask=split,
        in_jax=in_jax,
        rates={"gen": 1e-4, "disc": 4e-4},
    )
