"""The tiny actor-critic."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bench.in_jax.layers import Params, linear, mlp
from bench.workloads.actor_critic import ENTROPY


def losses(p: Params, buffers: Params, batch: Any) -> tuple[dict[str, Any], Params]:
    """As `bench.workloads.actor_critic` has them."""
    observation, action, returns = batch
    h = jnp.tanh(mlp(p, "trunk.0", observation, jnp.tanh))
    log_policy = jax.nn.log_softmax(linear(p, "actor", h), -1)
    value = linear(p, "critic", h)[:, 0]
    advantage = returns - jax.lax.stop_gradient(value)
    chosen = jnp.take_along_axis(log_policy, action[:, None], -1)[:, 0]
    return {
        "policy": -(advantage * chosen).mean(),
        "entropy": ENTROPY * (jnp.exp(log_policy) * log_policy).sum(-1).mean(),
        "value": jnp.square(value - returns).mean(),
    }, buffers
