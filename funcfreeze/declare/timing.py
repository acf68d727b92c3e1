"""When a route is active, or a member of an alternation runs: at the counts in `range(start, stop, every)`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

from funcfreeze.declare.selectors import RouteError


@dataclass(frozen=True)
class Timing:
    """The counts at which a route is active, and whether optimizer state is fresh when it becomes active again.

    >>> timing = Timing(every=2, start=4, stop=8)
    >>> [count for count in range(10) if count in timing.counts]
    [4, 6]
    >>> print(timing)
    from 4 to 8 every 2
    """

    every: int = 1
    start: int = 0
    stop: int | None = None
    reset: bool = False

    def __str__(self) -> str:
        return " ".join(self._told()) or "always"

    def _told(self) -> Iterator[str]:
        if self.start:
            yield f"from {self.start}"
        if self.stop is not None:
            yield f"to {self.stop}"
        if self.every != 1:
            yield f"every {self.every}"
        if self.reset:
            yield "reset"

    @cached_property
    def counts(self) -> range:
        """The counts at which the route is active."""
        return range(self.start, sys.maxsize if self.stop is None else self.stop, self.every)

    def before(self, count: int) -> int:
        """How many of the counts come before this one."""
        return len(range(self.start, min(count, self.counts.stop), self.every))

    def resets_at(self, count: int) -> bool:
        """Whether it asks for fresh optimizer state at a count, where nothing was active at the one before."""
        return self.reset and count in self.counts

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"every": self.every, "start": self.start, "stop": self.stop, "reset": self.reset}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Timing:
        """The timing that `to_dict` wrote down; `RouteError` says what is wrong with it."""
        if problems := [*timing_problems(**data)]:
            raise RouteError(f"this is not a timing's data: {'; '.join(problems)}")
        return Timing(**data)


ALWAYS = Timing()
"""Active at every count."""


def timing_problems(every: object, start: object, stop: object, reset: object) -> Iterator[str]:
    """Everything that is wrong with a timing as it was written."""
    if not _is_count(every, 1):
        yield f"every is an int of at least 1, got {_shown(every)}"
    if not _is_count(start, 0):
        yield f"start is an int of at least 0, got {_shown(start)}"
    if stop is not None and not _is_count(stop, 0):
        yield f"stop is an int above start, or None for no end; got {_shown(stop)}"
    elif isinstance(stop, int) and isinstance(start, int) and _is_count(start, 0) and stop <= start:
        yield f"stop is an int above start, got stop={stop} and start={start}: it would never be its turn"
    if not isinstance(reset, bool):
        yield f"reset is True or False, got {_shown(reset)}"


def never_thaws(timing: Timing) -> bool:
    """Whether the route is active from the first count on without a gap, so that it never becomes active again."""
    return timing.start == 0 and (timing.every == 1 or len(timing.counts[:2]) == 1)


def as_count(value: Any) -> Any:
    """A whole number of another library as Python's; anything else as it is."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, int | float | str | None) else f"{type(value).__name__}: {value!r}"
