"""IMTL-G: the direction that is equally steep for all losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcfreeze.merge.eigen import eigen, threshold
from funcfreeze.merge.faces import scaled
from funcfreeze.merge.rows import EXACT, diagonal
from funcfreeze.merge.rule import Meeting, Rule


@dataclass(frozen=True)
class _IMTLG:
    def __call__(self, meeting: Meeting) -> Tensor:
        return impartial(meeting.gramian, meeting.rows.precision)


def impartial(gramian: Tensor, precision: float = EXACT) -> Tensor:
    """The weights, which sum to one; zeros where they cannot.

    >>> impartial(torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
    tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    known = scaled(gramian)
    norms = diagonal(known).clamp(min=0.0).sqrt()
    values, vectors = eigen(known)
    is_positive = values > threshold(values, precision)
    inverses = torch.where(is_positive, 1 / torch.where(is_positive, values, 1.0), 0.0)
    weights = vectors @ (inverses * (norms @ vectors))
    total = weights.sum()
    is_zero = total.abs() < 1e-12
    return torch.where(is_zero, 0.0, weights / torch.where(is_zero, 1.0, total))


def imtl_g(*, at: str = "parameters") -> Rule:
    """Impartial multi-task learning: the d in the gradients' affine hull with equal g_i · d / |g_i| for all i.

    The weights are G⁺ n / Σ G⁺ n, where n are the norms; G⁺ is the pseudoinverse, for gradients that depend on one
    another. They may be negative.

    Liu et al., Towards Impartial Multi-task Learning, ICLR 2021; with the pseudoinverse in arXiv:2406.16232.

    Args:
        at: "parameters", or "activations" (see `Rule`).
    """
    return Rule(_IMTLG(), name="imtl_g", at=at)
