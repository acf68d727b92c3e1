"""Layers as functions of a flat dict of parameters and a module's path in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp

Array = Any
Params = Mapping[str, Array]


def linear(p: Params, path: str, x: Array) -> Array:
    """`nn.Linear`."""
    y = x @ p[f"{path}.weight"].T
    return y + p[f"{path}.bias"] if f"{path}.bias" in p else y


def mlp(p: Params, path: str, x: Array, between: Callable[[Array], Array] = jax.nn.relu) -> Array:
    """Linear layers with an activation between them, every other entry of an `nn.Sequential`."""
    for index in count(0, 2):
        x = linear(p, f"{path}.{index}", x)
        if f"{path}.{index + 2}.weight" not in p:
            return x
        x = between(x)
    raise AssertionError


def norm(p: Params, path: str, x: Array) -> Array:
    """`nn.LayerNorm`."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p[f"{path}.weight"] + p[f"{path}.bias"]


def gelu(x: Array) -> Array:
    """The exact one, torch's default."""
    return jax.nn.gelu(x, approximate=False)


def block(p: Params, path: str, x: Array, heads: int, causal: bool = False) -> Array:
    """The pre-norm transformer block of `bench.workloads.attention`."""
    size, length, width = x.shape
    parts = jnp.split(linear(p, f"{path}.qkv", norm(p, f"{path}.norm1", x)), 3, -1)
    q, k, v = (part.reshape(size, length, heads, width // heads).swapaxes(1, 2) for part in parts)
    scores = (q @ k.swapaxes(-1, -2)) * (width // heads) ** -0.5
    if causal:
        scores = jnp.where(jnp.triu(jnp.ones((length, length), bool), 1), -jnp.inf, scores)
    attended = (jax.nn.softmax(scores, -1) @ v).swapaxes(1, 2).reshape(size, length, width)
    x = x + linear(p, f"{path}.out", attended)
    return x + linear(p, f"{path}.down", gelu(linear(p, f"{path}.up", norm(p, f"{path}.norm2", x))))


def cross_entropy(logits: Array, label: Array) -> Array:
    """The mean over examples, labels as integers."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits, -1), label[..., None], -1).mean()
