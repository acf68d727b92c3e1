"""The evaluation that a run is judged by: the best so far, and how long nothing was better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

AIMS = ("min", "max")


@dataclass(frozen=True)
class Watched:
    """What evaluations came to.

    Attributes:
        aim: "min" or "max".
        best: the best value so far; None before the first.
        step: where that was.
        since: evaluations after it.

    >>> Watched("max").after(10, 0.5).after(20, 0.4)
    Watched(aim='max', best=0.5, step=10, since=1)
    """

    aim: str
    best: float | None = None
    step: int | None = None
    since: int = 0

    def after(self, step: int, value: float) -> Watched:
        """With one evaluation more. NaN is never better."""
        better = value == value and (
            self.best is None or (value < self.best if self.aim == AIMS[0] else value > self.best)
        )
        return replace(self, best=value, step=step, since=0) if better else replace(self, since=self.since + 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"best": self.best, "step": self.step, "since": self.since}

    @staticmethod
    def of(aim: str, kept: Mapping[str, Any]) -> Watched:
        """As it was kept in a checkpoint."""
        return Watched(aim, kept.get("best"), kept.get("step"), kept.get("since", 0))
