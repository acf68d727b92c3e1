"""TorchJD's aggregators as rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from funcfreeze.merge.rule import Meeting, Rule


@dataclass(frozen=True)
class _Aggregated:
    aggregator: Callable[[Tensor], Tensor]

    def __call__(self, meeting: Meeting) -> Tensor:
        return self.aggregator(meeting.matrix)


def from_torchjd(aggregator: Callable[[Tensor], Tensor]) -> Rule:
    """An aggregator of TorchJD's as a rule: a function from the matrix of gradients to the merged one. Eager only.

    What it draws comes from torch's global generator, and what it keeps stays in the aggregator, not in the state.

    Args:
        aggregator: such as `torchjd.aggregation.UPGrad()`.

    Raises:
        TypeError: no aggregator.
    """
    if isinstance(aggregator, type) or not callable(aggregator):
        raise TypeError(f"from_torchjd takes an aggregator such as torchjd.aggregation.UPGrad(), got {aggregator!r}")
    if any(kind.__name__ == "Weighting" and kind.__module__.startswith("torchjd") for kind in type(aggregator).__mro__):
        raise TypeError(
            f"from_torchjd takes an aggregator, a function from the matrix to the merged gradient; {aggregator!r} is a "
            "Weighting, which gives weights. Give the aggregator of that name, UPGrad() for UPGradWeighting()"
        )
    return Rule(vector=_Aggregated(aggregator), name="from_torchjd", compiles=False)
