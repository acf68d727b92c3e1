"""Meetings of losses for tests of merge rules, and matrices of gradients of many kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from funcfreeze.merge.deciding import decided
from funcfreeze.merge.rows import Rows
from funcfreeze.merge.rule import Meeting


def rows_of(matrix):
    """The matrix as gradients at two parameters; a loss whose part of the second is zero has none there."""
    cut = (matrix.shape[1] + 1) // 2
    parts = [(row[:cut], row[cut:]) for row in matrix]
    return Rows([[first, second if second.any() else None] for first, second in parts])


def meeting(matrix, *, step=0, values=None, state=None, places=None, number=None):
    """What a rule is shown of these gradients."""
    count = len(matrix)
    places = tuple(range(count)) if places is None else tuple(places)
    values = torch.ones(count, dtype=torch.float64) if values is None else values
    names = tuple(f"loss{place}" for place in places)
    return Meeting(names, places, number or count, values, torch.tensor(step), state or {}, rows_of(matrix))


def merged(rule, matrix, **options):
    """The merged gradient, as a vector as wide as the matrix."""
    found, _, _ = decided(rule, "here", meeting(matrix, **options))
    cut = (matrix.shape[1] + 1) // 2
    widths = (cut, matrix.shape[1] - cut)
    return torch.cat([torch.zeros(w) if g is None else g for w, g in zip(widths, found, strict=True)])


def weights(rule, matrix, **options):
    """The weights that it gives the losses."""
    found = decided(rule, "here", meeting(matrix, **options))[1]
    assert isinstance(found, Tensor)
    return found


def whole(rows, columns):
    """Small whole numbers, with which products are exact."""
    return torch.randint(-3, 4, (rows, columns)).to(torch.float64)


def _with_zero_rows(count):
    matrix = torch.randn(count, 2 * count + 3)
    matrix[torch.randperm(count)[: (count + 1) // 2]] = 0
    return matrix


def _opposed(count):
    matrix = torch.randn(count, 2 * count + 3)
    return matrix - 0.95 * matrix.mean(0)


KINDS = {
    "wide": lambda count: torch.randn(count, 3 * count + 5),
    "one column": lambda count: torch.randn(count, 1),
    "narrow": lambda count: whole(count, max(1, count // 2)),
    "dependent": lambda count: whole(count, max(1, count // 2)) @ whole(max(1, count // 2), 2 * count + 3),
    "agreeing": lambda count: torch.randn(count, 2 * count + 3) + 2 * torch.randn(2 * count + 3),
    "nearly alike": lambda count: 1e-2 * torch.randn(count, 2 * count + 3) + torch.randn(2 * count + 3),
    "opposed": _opposed,
    "zero rows": _with_zero_rows,
    "all zero": lambda count: torch.zeros(count, 5),
    "ill-scaled": lambda count: torch.randn(count, 3 * count + 5) * 10.0 ** (4 * torch.rand(count, 1) - 2),
}
"""How a matrix of gradients of so many losses comes about. Where rows depend on one another the rank is clear."""
