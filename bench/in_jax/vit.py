"""The vision transformer with K tasks."""

from __future__ import annotations

from typing import Any

from bench.in_jax.layers import Params, block, cross_entropy, linear, norm


def losses(
    p: Params, buffers: Params, batch: Any, *, tasks: int, depth: int, heads: int, patch: int
) -> tuple[dict[str, Any], Params]:
    """As `bench.workloads.vit` has them."""
    images, labels = batch
    size, channels, tall, wide = images.shape
    x = images.reshape(size, channels, tall // patch, patch, wide // patch, patch)
    x = x.transpose(0, 2, 4, 1, 3, 5).reshape(size, (tall // patch) * (wide // patch), channels * patch * patch)
    x = linear(p, "trunk.embed", x) + p["trunk.position"]
    for index in range(depth):
        x = block(p, f"trunk.blocks.{index}", x, heads)
    h = norm(p, "trunk.norm", x).mean(1)
    return {f"task{k}": cross_entropy(linear(p, f"heads.{k}", h), labels[k]) for k in range(tasks)}, buffers
