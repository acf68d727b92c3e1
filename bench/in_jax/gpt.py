"""The GPT-like model with a frozen body and adapters."""

from __future__ import annotations

from typing import Any

from bench.in_jax.layers import Params, block, cross_entropy, gelu, linear, mlp, norm


def losses(p: Params, buffers: Params, batch: Any, *, depth: int, heads: int) -> tuple[dict[str, Any], Params]:
    """As `bench.workloads.gpt` has them."""
    tokens, style, domain = batch
    x = p["tokens.weight"][tokens] + p["positions.weight"][: tokens.shape[1]]
    middle = x
    for index in range(depth):
        x = block(p, f"blocks.{index}", x, heads, causal=True)
        x = x + mlp(p, f"adapters.{index}", x, gelu)
        middle = x if 2 * (index + 1) == depth else middle
    h = norm(p, "norm", x)
    pooled = h.mean(1)
    return {
        "lm": cross_entropy((h @ p["tokens.weight"].T)[:, :-1], tokens[:, 1:]),
        "exit": cross_entropy(linear(p, "exit", middle)[:, :-1], tokens[:, 1:]),
        "style": cross_entropy(linear(p, "style", pooled), style),
        "domain": cross_entropy(mlp(p, "domain", pooled), domain),
    }, buffers
