"""Convex programs over w ≥ 0, with or without Σ w = 1: a primal-dual interior point method of fixed length.

For more losses than `faces` takes. Every iteration is one Newton step on the conditions of Karush, Kuhn and Tucker with
x_i z_i = σ μ, cut before it leaves the interior, and shorter where that brings it closer (Nocedal and Wright, Numerical
Optimization, 2nd edition, chapter 19).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcfreeze.merge.faces import solved

ITERATIONS = 40
"""So many are enough for a residual of 1e-12 on all that was tried; a step that can do no more changes nothing."""

_CENTERING = 0.1
"""Every step aims at so much of the present duality gap."""

_SHARES = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01)
"""Shares of the longest possible step that are tried at once, of which the best is taken."""

Derivatives = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From x (..., K) to the gradient (..., K) and the Hessian (..., K, K) of a convex function.

The other argument (..., 1) is the x_i z_i that the present step aims at: by so much a kink may be rounded off.
"""


def quadratic(matrix: Tensor, linear: Tensor) -> Derivatives:
    """Of ½ xᵀ A x + bᵀ x."""
    return lambda x, _: (x @ matrix + linear, matrix.expand(*x.shape, x.shape[-1]))


def minimized(derivatives: Derivatives, start: Tensor, iterations: int, *, sums_to_one: bool) -> Tensor:
    """The x ≥ 0 that minimises a convex function.

    Args:
        derivatives: of the function.
        start: (..., K), inside; sums to one if x is to.
        iterations: how many.
        sums_to_one: whether Σ x = 1 is asked for.
    """
    slope = derivatives(start, torch.ones_like(start[..., :1]))[0]
    border = torch.ones_like(start) if sums_to_one else torch.zeros_like(start)
    largest = slope.abs().amax(-1, keepdim=True)
    now = _Point(start, largest.clamp(min=1e-3).expand_as(start), torch.zeros_like(start[..., :1]))
    for _ in range(iterations):
        aim = _CENTERING * (now.x * now.z).mean(-1, keepdim=True)
        slope, curvature = derivatives(now.x, aim)
        dual = slope - now.z - now.level * border
        whole = curvature + torch.diag_embed(now.z / now.x)
        right = aim / now.x - now.z - dual
        if sums_to_one:
            below = torch.cat([border, torch.zeros_like(now.level)], -1)
            whole = torch.cat([torch.cat([whole, -border[..., :, None]], -1), below[..., None, :]], -2)
            right = torch.cat([right, 1 - now.x.sum(-1, keepdim=True)], -1)
        moved = solved(whole, right[..., None])[..., 0]
        dx, dlevel = moved[..., : start.shape[-1]], moved[..., start.shape[-1] :] if sums_to_one else 0.0
        dz = aim / now.x - now.z - now.z / now.x * dx
        length = torch.minimum(_room(now.x, dx), _room(now.z, dz))
        lengths = torch.stack([share * length for share in _SHARES])
        tried = _Point(now.x + lengths * dx, now.z + lengths * dz, now.level + lengths * dlevel)
        residual = derivatives(tried.x, aim)[0] - tried.z - tried.level * border
        off = residual.square().sum(-1) + (tried.x * tried.z - aim).square().sum(-1)
        pick = off.nan_to_num(torch.inf, torch.inf).argmin(0)
        good = off.isfinite().any(0)[..., None]
        now = _Point(*(torch.where(good, _picked(new, pick), old) for new, old in zip(tried, now, strict=True)))
    return now.x


class _Point(NamedTuple):
    """Where the method is: x, the multipliers of x ≥ 0, and that of Σ x = 1."""

    x: Tensor
    z: Tensor
    level: Tensor


def _picked(tried: Tensor, pick: Tensor) -> Tensor:
    """Of what was tried (tries, ..., K) the one that was picked (...)."""
    return tried.gather(0, pick[None, ..., None].expand(1, *tried.shape[1:]))[0]


def _room(x: Tensor, dx: Tensor) -> Tensor:
    """How much of a move may be made, so that x stays positive: (..., 1), at most 1."""
    ratio = torch.where(dx < 0, -x / torch.where(dx < 0, dx, -1.0), torch.inf)
    return (0.995 * ratio.amin(-1, keepdim=True)).clamp(max=1.0)
