"""Small quadratic programs solved exactly: every face of the feasible set is tried at once, in one batched solve.

For K losses there are at most 2^K faces. On each the solution is that of a linear system; the one that satisfies the
conditions of Karush, Kuhn and Tucker best is the answer. Nothing branches on a value, so nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcfreeze.merge.rows import diagonal

MOST = 8
"""Up to so many losses; beyond, the number of faces is too large (see `interior`)."""


def faces(number: int, device: torch.device, empty: bool) -> Tensor:
    """All subsets of so many, as rows of ones and zeros: (2^number, number) float64, or one less without the empty one.

    >>> faces(2, torch.device("cpu"), empty=False)
    tensor([[1., 0.],
            [0., 1.],
            [1., 1.]], dtype=torch.float64)
    """
    counted = torch.arange(0 if empty else 1, 2**number, device=device)
    return (counted[:, None] >> torch.arange(number, device=device) & 1).to(torch.float64)


def nested(values: Tensor) -> Tensor:
    """The subsets of the largest one, the largest two and so on: (K, K) float64.

    >>> nested(torch.tensor([0.1, 0.7, 0.2]))
    tensor([[0., 1., 0.],
            [0., 1., 1.],
            [1., 1., 1.]], dtype=torch.float64)
    """
    places = values.argsort(descending=True).argsort()
    return (places <= torch.arange(len(values), device=values.device)[:, None]).to(torch.float64)


def solved(matrices: Tensor, right: Tensor) -> Tensor:
    """Solutions of linear systems, not finite where a matrix is singular; no device is waited for."""
    found: Tensor = torch.linalg.solve_ex(matrices, right, check_errors=False)[0]
    return found


def restricted(gramian: Tensor, chosen: Tensor) -> Tensor:
    """The Gramian on each face, with the identity outside of it: (faces, K, K)."""
    return gramian * chosen[:, :, None] * chosen[:, None, :] + torch.diag_embed(1 - chosen)


class Picked(NamedTuple):
    """The best of what was solved on all faces.

    Attributes:
        solution: (..., K).
        face: where it is, as ones and zeros (..., K).
    """

    solution: Tensor
    face: Tensor


def best(found: Tensor, chosen: Tensor, violations: Tensor) -> Picked:
    """Of solutions (faces, ..., K) on these faces (faces, K) those with the least violation (faces, ...).

    NaN is the worst.
    """
    face = violations.nan_to_num(torch.inf, torch.inf).argmin(0)
    index = face[None, ..., None].expand(1, *found.shape[1:])
    where = chosen.index_select(0, face.reshape(-1)).reshape(*face.shape, chosen.shape[1])
    return Picked(found.gather(0, index)[0], where)


def with_derivatives(solution: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """The solution, with the derivatives of what is solved once more on its face, where anybody could want them.

    Derivatives through all faces would be those of singular ones, too, which are not finite.
    """
    if not torch.is_grad_enabled():
        return solution
    solved_again = again()
    return solution + torch.where(solved_again.isfinite(), solved_again - solved_again.detach(), 0.0)


def scaled(gramian: Tensor) -> Tensor:
    """The Gramian with 1 as the largest squared norm; zeros as they are."""
    largest = diagonal(gramian).max()
    return gramian / torch.where(largest > 0, largest, 1.0)
