"""The evaluation that a run is judged by: the best so far, and how long nothing was better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

AIMS = ("min", "max")


@dataclass(frozen=True)
class Watched:
    """What evaluations came to.

    Attributes:
        aim: "min" or "max".
        name: what the value is called that is judged.
        best: the best value so far; None before the first.
        step: where that was.
        since: evaluations after it.

    >>> Watched("max").after(10, "accuracy", 0.5).after(20, "accuracy", 0.4)
    Watched(aim='max', name='accuracy', best=0.5, step=10, since=1)
    """

    aim: str
    name: str | None = None
    best: float | None = None
    step: int | None = None
    since: int = 0

    def after(self, step: int, name: str, value: float) -> Watched:
        """With one evaluation more. NaN is never better.

        Raises:
            ValueError: it is of another name than those before.
        """
        if self.name not in (None, name):
            raise ValueError(
                f"this run is judged by {self.name!r}, the first number that evaluate returned, and now that is "
                f"{name!r}; keep the order, or begin a run in a folder of its own"
            )
        better = value == value and (
            self.best is None or (value < self.best if self.aim == AIMS[0] else value > self.best)
        )
        if better:
            return replace(self, name=name, best=value, step=step, since=0)
        return replace(self, name=name, since=self.since + 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def of(aim: str, kept: Mapping[str, Any]) -> Watched:
        """As it was kept in a checkpoint.

        Raises:
            ValueError: there, what is best is the other way round.
        """
        found = Watched(**kept) if kept else Watched(aim)
        if found.name is None:  # nothing was evaluated yet
            return Watched(aim)
        if found.aim != aim:
            raise ValueError(
                f"fit: best is {aim!r}, and the evaluations so far were judged by {found.aim!r} ({found.name} "
                f"{found.best} at step {found.step}); begin a run in a folder of its own"
            )
        return found
