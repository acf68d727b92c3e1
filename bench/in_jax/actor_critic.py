"""The tiny actor-critic."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bench.in_jax.layers import Params, linear, mlp


def losses(p: Params, buffers: Params, batch: Any, *, entropy: float) -> tuple[dict[str, Any], Params]:
    """As the workload has them; `entropy` is the weight of the bonus."""
    observation, action, returns = batch
    h = jnp.tanh(mlp(p, "trunk.0", observation, jnp.tanh))
    log_policy = jax.nn.log_softmax(linear(p, "actor", h), -1)
    value = linear(p, "critic", h)[:, 0]
    advantage = returns - jax.lax.stop_gradient(value)
    chosen = jnp.take_along_axis(log_policy, action[:, None], -1)[:, 0]
    return {
        "policy": -(advantage * chosen).mean(),
        "entropy": entropy * (jnp.exp(log_policy) * log_policy).sum(-1).mean(),
        "value": jnp.square(value - returns).mean(),
    }, buffers
