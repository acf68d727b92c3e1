"""MGDA: the shortest vector in the convex hull of the gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcfreeze.merge.faces import MOST, best, faces, restricted, scaled, solved, with_derivatives
from funcfreeze.merge.interior import ITERATIONS, minimized, quadratic
from funcfreeze.merge.rule import Meeting, Rule, refuse, whole_problem


@dataclass(frozen=True)
class _MGDA:
    iterations: int = ITERATIONS

    def __call__(self, meeting: Meeting) -> Tensor:
        return shortest(meeting.gramian, self.iterations)


def shortest(gramian: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """The weights w ≥ 0, Σ w = 1 that minimise wᵀ G w: (K,).

    >>> shortest(torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64))
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    number, known = len(gramian), scaled(gramian)
    if number > MOST:
        start = torch.full((number,), 1 / number, dtype=known.dtype, device=known.device)
        return minimized(quadratic(known, torch.zeros_like(start)), start, iterations, sums_to_one=True)
    chosen = faces(number, known.device, empty=False)
    with torch.no_grad():
        found = _on(known, chosen)
        products = found @ known
        level = (found * products).sum(1, keepdim=True)
        violations = torch.cat([-found, level - products, (products - level).abs() * chosen], 1).amax(1)
        solution, face = best(found, chosen, violations)
    weights = with_derivatives(solution, lambda: _on(known, face[None])[0]).clamp(min=0.0)
    return weights / weights.sum()


def _on(gramian: Tensor, chosen: Tensor) -> Tensor:
    """On each face S the solution of G_SS w_S = μ 1, Σ w_S = 1: (faces, K)."""
    bordered = torch.cat([restricted(gramian, chosen), chosen[:, :, None]], 2)
    below = torch.cat([chosen, torch.zeros_like(chosen[:, :1])], 1)
    right = torch.cat([torch.zeros_like(chosen), torch.ones_like(chosen[:, :1])], 1)
    return solved(torch.cat([bordered, below[:, None, :]], 1), right)[:, :-1]


def mgda(*, iterations: int = ITERATIONS, at: str = "parameters") -> Rule:
    """Multiple gradient descent: the convex combination of the gradients that is shortest, min |Σ w_k g_k|².

    It conflicts with no loss, g_i · d ≥ |d|² for all i, and is zero exactly where no direction improves all losses.
    Solved exactly up to 8 losses, by an interior point method beyond.

    Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization, Comptes Rendus 350 (2012);
    Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018, arXiv:1810.04650, where
    `at="activations"` is called MGDA-UB.

    Args:
        iterations: of the interior point method.
        at: "parameters", or "activations" (see `Rule`).
    """
    refuse("mgda", whole_problem("iterations", iterations, 1))
    return Rule(_MGDA(iterations), name="mgda", at=at)
