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


def carrying(
    losses: Callable[[dict[str, Tensor]], Mapping[str, Tensor | None]], params: Mapping[str, Tensor], table: Table
) -> tuple[dict[str, Tensor], Mapping[str, Tensor | None]]:
    """The merged gradients and the losses, with a graph to every parameter that requires grad."""
    given = {path: param if param.requires_grad else param.clone().requires_grad_() for path, param in params.items()}
    values = losses(given)
    merged: dict[str, Tensor] = {}
    for name, row in table.items():
        value = values[name]
        if value is None or not value.requires_grad:
            continue
        found = torch.autograd.grad(value, [given[path] for path in row], create_graph=True, allow_unused=True)
        for (path, weight), gradient in zip(row.items(), found, strict=True):
            if gradient is not None:
                merged[path] = merged[path] + weight * gradient if path in merged else weight * gradient
    return merged, values


def summed(apart: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The merged gradients: the sum over the losses."""
    merged: dict[str, Tensor] = {}
    for row in apart.values():
        for path, found in row.items():
            gradient = found.to_dense() if found.is_sparse else found
            merged[path] = merged[path] + gradient if path in merged else gradient
    return merged
