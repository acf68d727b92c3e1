"""The adversarial MLP with two signed losses, or with three."""

from __future__ import annotations

from typing import Any

from bench.in_jax.layers import Params, cross_entropy, mlp


def losses(p: Params, buffers: Params, batch: Any, *, confusion: bool) -> tuple[dict[str, Any], Params]:
    """As `bench.workloads.adversarial` has them."""
    x, label, domain = batch
    h = mlp(p, "encoder", x)
    domains = [mlp(p, f"domains.{k}", h) for k in range(4)]
    found = {
        "cls": sum(cross_entropy(mlp(p, f"classes.{k}", h), label) for k in range(4)),
        "dom": sum(cross_entropy(logits, domain) for logits in domains),
    }
    if confusion:
        found["adv"] = 0.1 * sum(cross_entropy(logits, 1 - domain) for logits in domains)
    return found, buffers
