"""An oracle for the law that shares no code with the package: one `torch.autograd.grad` per loss over one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Table = Mapping[str, Mapping[str, float]]
"""loss -> parameter path -> weight"""


def oracle(
    losses: Callable[[dict[str, Tensor]], Mapping[str, Tensor | None]], params: Mapping[str, Tensor], table: Table
) -> dict[str, dict[str, Tensor]]:
    """Every loss's weighted gradients, holding only the parameters that autograd delivers a gradient for."""
    leaves = {path: param.detach().clone().requires_grad_() for path, param in params.items()}
    values = losses(leaves)
    apart: dict[str, dict[str, Tensor]] = {}
    for name, row in table.items():
        value = values[name]
        apart[name] = {}
        if value is None or not value.requires_grad:
            continue
        found = torch.autograd.grad(value, [leaves[path] for path in row], retain_graph=True, allow_unused=True)
        for (path, weight), gradient in zip(row.items(), found, strict=True):
            if gradient is not None:
                apart[name][path] = weight * gradient
    return apart


def summed(apart: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The merged gradients: the sum over the losses."""
    merged: dict[str, Tensor] = {}
    for row in apart.values():
        for path, found in row.items():
            gradient = found.to_dense() if found.is_sparse else found
            merged[path] = merged[path] + gradient if path in merged else gradient
    return merged
