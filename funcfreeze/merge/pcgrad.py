"""PCGrad: every gradient loses what points against the others'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcfreeze.merge.draws import draws
from funcfreeze.merge.rows import diagonal
from funcfreeze.merge.rule import Meeting, Rule, refuse, whole_problem


@dataclass(frozen=True)
class _PCGrad:
    order: str = "random"
    seed: int = 0

    def __call__(self, meeting: Meeting) -> Tensor:
        return projected(meeting.gramian, self._orders(meeting)).sum(0)

    def _orders(self, meeting: Meeting) -> Tensor:
        number, device = len(meeting.losses), meeting.gramian.device
        if self.order == "declared" or number < 3:  # of two there is but one order
            return torch.arange(number, device=device).expand(number, number)
        keys = draws(self.seed, meeting.step, number * number, device)
        return keys.reshape(number, number).argsort(1)


def projected(gramian: Tensor, orders: Tensor) -> Tensor:
    """Every gradient after its projections, as weights: row i holds those of g_i, (K, K).

    Args:
        gramian: (K, K).
        orders: (K, K) int64; row i is the order in which g_i is projected, in which its own place says nothing.
    """
    number = len(gramian)
    own = torch.eye(number, dtype=gramian.dtype, device=gramian.device)
    rows, squares = own, diagonal(gramian)
    for turn in range(number):
        others = orders[:, turn]
        against = (gramian[others] * rows).sum(1).clamp(max=0.0)
        square = squares[others]
        is_other = (others != torch.arange(number, device=gramian.device)) & (square > 0)
        share = torch.where(is_other, against / torch.where(square > 0, square, 1.0), 0.0)
        rows = rows - share[:, None] * own[others]
    return rows


def pcgrad(*, order: str = "random", seed: int = 0, at: str = "parameters") -> Rule:
    """Gradient surgery: the sum of all gradients, each projected on the normal plane of those it conflicts with.

    For every i, starting with g = g_i, for every j ≠ i in a random order: where g · g_j < 0, g loses its component
    along g_j. The merged gradient is the sum of the results. With two losses it conflicts with neither; with more it
    may.

    Algorithm 1 of Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arXiv:2001.06782.

    Args:
        order: "random", drawn anew at every step by its count, so that a state decides it; or "declared", the order in
            which the losses were declared.
        seed: of the draws.
        at: "parameters", or "activations" (see `Rule`).

    >>> import torch
    >>> projected(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]), torch.tensor([[0, 1], [0, 1]]))
    tensor([[1.0000, 0.5000],
            [1.0000, 1.0000]])
    """
    is_order = order in ("random", "declared")
    refuse(
        "pcgrad",
        [] if is_order else [f"order is 'random' or 'declared', got {order!r}"],
        whole_problem("seed", seed),
    )
    return Rule(_PCGrad(order, seed), name="pcgrad", at=at, is_random=order == "random")
