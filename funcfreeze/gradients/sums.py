"""Adding up gradients, dense and sparse ones in any order."""

from __future__ import annotations

from torch import Tensor


def add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, or of two cotangents; None is nothing. Sparse only if both are.

    >>> import torch
    >>> sparse = torch.sparse_coo_tensor([[1]], [[2.0]], (2, 1), check_invariants=True)
    >>> add(sparse, torch.ones(2, 1))
    tensor([[1.],
            [3.]])
    >>> add(None, None) is None
    True
    """
    if one is None or other is None:
        return other if one is None else one
    return plus(one, other)


def plus(one: Tensor, other: Tensor) -> Tensor:
    """As `add`, where both are there: torch adds sparse to dense, and not dense to sparse."""
    return other + one if one.is_sparse and not other.is_sparse else one + other
