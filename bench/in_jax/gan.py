"""The generative adversarial network."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from bench.in_jax.layers import Params, mlp


def losses(p: Params, buffers: Params, batch: Any, *, slope: float) -> tuple[dict[str, Any], Params]:
    """As `bench.workloads.gan` has them."""
    real, noise = batch
    leaky = partial(jax.nn.leaky_relu, negative_slope=slope)
    scores = mlp(p, "disc", mlp(p, "gen", noise, leaky), leaky)
    d = jax.nn.softplus(-mlp(p, "disc", real, leaky)).mean() + jax.nn.softplus(scores).mean()
    return {"d": d, "g": jax.nn.softplus(-scores).mean()}, buffers
