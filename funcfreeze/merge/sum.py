"""The plain sum: what there is without a rule."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from funcfreeze.merge.rule import Meeting, Rule


@dataclass(frozen=True)
class _Sum:
    def __call__(self, meeting: Meeting) -> Tensor:
        return meeting.values.new_ones(len(meeting.losses))


def sum() -> Rule:
    """The plain sum of the losses' gradients, as without a rule; nothing is kept apart for it.

    >>> sum()
    sum()
    """
    return Rule(_Sum(), name="sum", is_sum=True)
