"""Merge rules as the papers' own programs have them: on the matrix of gradients, with their solvers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.workloads.merge import RADIUS

Combine = Callable[[Tensor], Tensor]
"""From the losses' gradients, (K, elements), to the merged one."""


def pcgrad(matrix: Tensor) -> Tensor:
    """Whole vectors are projected on one another; in the order of the losses, so that nothing is drawn."""
    merged = torch.zeros_like(matrix[0])
    for own, gradient in enumerate(matrix):
        left = gradient.clone()
        for other, against in enumerate(matrix):
            product = left @ against
            if other != own and product < 0:
                left -= product / against.square().sum() * against
        merged += left
    return merged


def mgda(matrix: Tensor) -> Tensor:
    """The shortest convex combination, by Frank and Wolfe's method on the host."""
    gramian = _on_host(matrix @ matrix.T)
    weights = gramian.diagonal() * 0 + 1 / len(gramian)
    for _ in range(250):
        products = gramian @ weights
        corner = int(products.argmin())
        gap = weights @ products - products[corner]
        span = gap + gramian[corner, corner] - products[corner]
        share = min(1.0, gap / span) if span > 0 else 0.0
        weights = (1 - share) * weights
        weights[corner] += share
        if share < 1e-5:
            break
    return _back(weights, matrix) @ matrix


def imtl_g(matrix: Tensor) -> Tensor:
    """In closed form: all weights but the first solve a linear system of differences."""
    units = matrix / matrix.norm(dim=1, keepdim=True)
    apart, turned = matrix[:1] - matrix[1:], units[:1] - units[1:]
    rest = torch.linalg.solve(apart @ turned.T, matrix[:1] @ turned.T, left=False)[0]
    return torch.cat([1 - rest.sum(0, keepdim=True), rest]) @ matrix


def cagrad(matrix: Tensor) -> Tensor:
    """The dual problem goes to SciPy's SLSQP."""
    from scipy.optimize import minimize

    gramian, small = _on_host(matrix @ matrix.T), 1e-8
    slope = gramian.mean(1)
    radius = RADIUS * (gramian.mean() + small) ** 0.5 + small

    def objective(w: Any) -> Any:
        return w @ slope + radius * (w @ gramian @ w + small) ** 0.5

    found = minimize(
        objective,
        slope * 0 + 1 / len(slope),
        bounds=[(0, 1)] * len(slope),
        constraints={"type": "eq", "fun": lambda w: 1 - w.sum()},
    )
    worst = _back(found.x, matrix) @ matrix
    share: Tensor = float(radius) / (worst.norm() + small)
    return matrix.mean(0) + share * worst


def aligned_mtl(matrix: Tensor) -> Tensor:
    """The mean after all principal components are as long as the shortest."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    known = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[known], vectors[:, known]
    balance = values.min().sqrt() * vectors / values.sqrt() @ vectors.T
    weights: Tensor = balance.mean(1)
    return weights @ matrix


def graddrop(matrix: Tensor) -> Tensor:
    """One draw for every element, of whether what is positive or what is negative stays."""
    purity = 0.5 * (1 + matrix.sum(0) / matrix.abs().sum(0))
    drawn = torch.rand_like(purity)
    kept = (purity > drawn) * (matrix > 0) + (purity < drawn) * (matrix < 0)
    return (kept * matrix).sum(0)


def _on_host(gramian: Tensor) -> Any:
    return gramian.double().cpu().numpy()


def _back(weights: Any, matrix: Tensor) -> Tensor:
    return torch.as_tensor(weights).to(matrix)


COMBINED: Mapping[str, Combine] = {
    "sum": lambda matrix: matrix.sum(0),
    "mean": lambda matrix: matrix.mean(0),
    "pcgrad": pcgrad,
    "mgda": mgda,
    "imtl-g": imtl_g,
    "cagrad": cagrad,
    "aligned-mtl": aligned_mtl,
    "graddrop": graddrop,
}
"""Those that somebody has written without a package for it; UPGrad's authors wrote TorchJD."""
