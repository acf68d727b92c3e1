"""Aligned-MTL: the gradients' principal components made equally long."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcfreeze.merge.eigen import eigen, threshold
from funcfreeze.merge.rows import EXACT
from funcfreeze.merge.rule import Meeting, Rule, refuse

SCALES = ("min", "median", "rmse")


@dataclass(frozen=True)
class _AlignedMTL:
    scale: str = "min"

    def __call__(self, meeting: Meeting) -> Tensor:
        return aligned(meeting.gramian, self.scale, meeting.rows.precision)


def aligned(gramian: Tensor, scale: str = "min", precision: float = EXACT) -> Tensor:
    """The weights: √σ V Σ^(-1/2) Vᵀ 1/K over the eigenvalues that are not rounding, with σ one of them.

    >>> aligned(torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
    tensor([0.5000, 0.2500], dtype=torch.float64)
    """
    number = len(gramian)
    found, columns = eigen(gramian)
    values, order = found.sort()
    vectors = columns[:, order]
    is_positive = values > threshold(values, precision)
    rank = is_positive.sum()
    known = torch.where(is_positive, values, 0.0)
    length = _length(known, rank, scale)
    inverses = torch.where(is_positive, length.sqrt() / torch.where(is_positive, values, 1.0).sqrt(), 0.0)
    weights = vectors @ (inverses * vectors.mean(0))
    return torch.where(rank > 0, weights, 1 / number)


def _length(values: Tensor, rank: Tensor, scale: str) -> Tensor:
    """The eigenvalue that all are to have, from the ascending ones, of which those beyond the rank are zero."""
    if scale == "rmse":
        return values.sum() / rank.clamp(min=1)
    first = len(values) - rank
    place = first if scale == "min" else first + (rank - 1) // 2
    return values.index_select(0, place.clamp(max=len(values) - 1)[None])[0]


def aligned_mtl(*, scale: str = "min", at: str = "parameters") -> Rule:
    """Independent component alignment: the mean of the gradients after their principal components are made equal.

    No component dominates and none conflicts: the system of the aligned gradients has condition number 1.

    Algorithm 1 of Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023,
    arXiv:2305.19000.

    Args:
        scale: how long they are made: as the shortest, "min", as the median, or "rmse", as the mean of the squares.
        at: "parameters", or "activations" (see `Rule`).
    """
    refuse("aligned_mtl", [] if scale in SCALES else [f"scale is one of {', '.join(map(repr, SCALES))}, got {scale!r}"])
    return Rule(_AlignedMTL(scale), name="aligned_mtl", at=at)
