"""ResNet-18, domain-adversarial, with BatchNorm in training mode."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bench.in_jax.layers import Array, Params, cross_entropy, linear, mlp


def _convolve(p: Params, path: str, x: Array, stride: int = 1) -> Array:
    kernel = p[f"{path}.weight"]
    pad = (kernel.shape[-1] - 1) // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )


def _batch_norm(p: Params, buffers: dict[str, Array], path: str, x: Array, momentum: float = 0.1) -> Array:
    """`nn.BatchNorm2d` in training mode; the new running statistics are put into `buffers`."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    elements = x.size // x.shape[1]
    for name, now in (("running_mean", mean), ("running_var", var * elements / (elements - 1))):
        before = buffers[f"{path}.{name}"]
        buffers[f"{path}.{name}"] = before + momentum * (jax.lax.stop_gradient(now) - before)
    buffers[f"{path}.num_batches_tracked"] = buffers[f"{path}.num_batches_tracked"] + 1
    scale = p[f"{path}.weight"] * jax.lax.rsqrt(var + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + p[f"{path}.bias"][:, None, None]


def _block(p: Params, buffers: dict[str, Array], path: str, x: Array, stride: int) -> Array:
    y = jax.nn.relu(_batch_norm(p, buffers, f"{path}.bn1", _convolve(p, f"{path}.conv1", x, stride)))
    y = _batch_norm(p, buffers, f"{path}.bn2", _convolve(p, f"{path}.conv2", y))
    if f"{path}.downsample.0.weight" in p:
        x = _batch_norm(p, buffers, f"{path}.downsample.1", _convolve(p, f"{path}.downsample.0", x, stride))
    return jax.nn.relu(x + y)


def losses(p: Params, buffers: Params, batch: Any) -> tuple[dict[str, Any], Params]:
    """As `bench.workloads.resnet` has them."""
    images, label, domain = batch
    after = dict(buffers)
    x = jax.nn.relu(_batch_norm(p, after, "encoder.bn1", _convolve(p, "encoder.conv1", images, 2)))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), ((0, 0), (0, 0), (1, 1), (1, 1)))
    for layer in range(1, 5):
        for index in range(2):
            stride = 2 if layer > 1 and index == 0 else 1
            x = _block(p, after, f"encoder.layer{layer}.{index}", x, stride)
    h = x.mean((2, 3))
    return {
        "cls": cross_entropy(linear(p, "classifier", h), label),
        "dom": cross_entropy(mlp(p, "domain", h), domain),
    }, after
