"""The mean of the losses' gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcfreeze.merge.rule import Meeting, Rule


@dataclass(frozen=True)
class _Mean:
    def __call__(self, meeting: Meeting) -> Tensor:
        number = len(meeting.losses)
        return torch.full((number,), 1 / number, dtype=torch.float64, device=meeting.values.device)


def mean() -> Rule:
    """The mean of the gradients of the losses that have one: 1/K Σ g_k.

    A loss that is absent, or touches none of the parameters, does not count.

    >>> mean()
    mean()
    """
    return Rule(_Mean(), name="mean")
