"""GradDrop: for every element one sign is drawn, and gradients of the other are dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcfreeze.merge.draws import draws
from funcfreeze.merge.rule import Meeting, Rule, number_problem, refuse, whole_problem


@dataclass(frozen=True)
class _GradDrop:
    leak: float = 0.0
    seed: int = 0

    def __call__(self, meeting: Meeting) -> Tensor:
        merged: list[Tensor] = []
        first = 0
        for piece in meeting.rows.pieces():
            width = piece.shape[1]
            drawn = draws(self.seed, meeting.step, width, piece.device, first).to(piece.dtype)
            merged.append(dropped(piece, drawn, self.leak))
            first += width
        return torch.cat(merged)


def dropped(matrix: Tensor, drawn: Tensor, leak: float) -> Tensor:
    """The sum of the rows without what is dropped.

    Args:
        matrix: (K, elements).
        drawn: uniform numbers, one for every element.
        leak: what is let through all the same.

    >>> dropped(torch.tensor([[1.0, 2.0], [-1.0, 1.0]]), torch.tensor([0.7, 0.7]), 0.0)
    tensor([-1.,  3.])
    """
    up, down = matrix.clamp(min=0.0).sum(0), matrix.clamp(max=0.0).sum(0)
    sizes = up - down
    purity = up / torch.where(sizes > 0, sizes, 1.0)  # ½ (1 + Σ g / Σ |g|)
    return torch.where(purity > drawn, up + leak * down, leak * up + down)


def graddrop(*, leak: float = 0.0, seed: int = 0) -> Rule:
    """Gradient sign dropout: for every element a sign is drawn, and only gradients of that sign are added up.

    It is positive with the probability ½ (1 + Σ g / Σ |g|). Of the others the part `leak` gets through.

    Algorithm 1 of Chen et al., Just Pick a Sign, NeurIPS 2020, arXiv:2010.06808, on the gradients of parameters.

    Args:
        leak: from 0 to 1.
        seed: of the draws, which follow the count of steps.
    """
    refuse(
        "graddrop",
        number_problem("leak", leak, lambda value: 0 <= value <= 1, "from 0 to 1"),
        whole_problem("seed", seed),
    )
    return Rule(vector=_GradDrop(leak, seed), name="graddrop", is_random=True)
