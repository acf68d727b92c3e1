"""Eigenvalues and eigenvectors of a small symmetric matrix, without waiting for a device.

LAPACK's answer is checked on the host, which on the CPU costs nothing. Elsewhere Jacobi's method is run for a fixed
number of sweeps, all disjoint pairs of a sweep's round at once (Golub and Van Loan, Matrix Computations, section 8.5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcfreeze.merge.rows import diagonal

SWEEPS = 10
"""Jacobi's method converges quadratically: ten sweeps are several more than matrices of this size need."""


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (K,), unordered, and eigenvectors as columns (K, K), of a finite symmetric matrix."""
    return tuple(torch.linalg.eigh(matrix)) if matrix.device.type == "cpu" else jacobi(matrix)


def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The same by Jacobi's method.

    >>> values, vectors = jacobi(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> values.sort().values.round()
    tensor([1., 3.])
    """
    number = len(matrix)
    vectors = torch.eye(number, dtype=matrix.dtype, device=matrix.device)
    for _ in range(SWEEPS):
        for pairs in _rounds(number):
            rotation = _rotations(matrix, pairs)
            matrix = rotation.T @ matrix @ rotation
            vectors = vectors @ rotation
    return diagonal(matrix), vectors


def _rounds(number: int) -> list[list[tuple[int, int]]]:
    """All pairs of so many, in rounds of disjoint ones, as in a tournament."""
    players = [*range(number + number % 2)]
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < number])
        players = [players[0], players[-1], *players[1:-1]]
    return [pairs for pairs in rounds if pairs]


def _rotations(matrix: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """The rotation that makes the entries of these pairs zero."""
    entries = [
        [matrix.new_ones(()) if i == j else matrix.new_zeros(()) for j in range(len(matrix))]
        for i in range(len(matrix))
    ]
    for p, q in pairs:
        apart, beside = (matrix[q, q] - matrix[p, p]) / 2, matrix[p, q]
        size = apart.abs() + torch.hypot(apart, beside)
        sign = torch.where(apart < 0, -1.0, 1.0)
        tangent = torch.where(size > 0, sign * beside / torch.where(size > 0, size, 1.0), 0.0)
        cosine = (1 + tangent * tangent).rsqrt()
        entries[p][p] = entries[q][q] = cosine
        entries[p][q], entries[q][p] = tangent * cosine, -tangent * cosine
    return torch.stack([torch.stack(row) for row in entries])


def threshold(values: Tensor, precision: float) -> Tensor:
    """Below this an eigenvalue of a Gramian is rounding.

    Args:
        values: its eigenvalues.
        precision: how exact its entries are, relative to the largest.
    """
    return values.max() * (4 * len(values) * precision)
