"""When something takes its turn: `every`, `start` and `stop`, with the meaning they have in `range`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Turns:
    """The counts in `range(start, stop, every)`; without a stop there is no end.

    >>> turns = Turns(every=5, start=4)
    >>> [count for count in range(20) if turns.at(count)]
    [4, 9, 14, 19]
    >>> print(turns)
    every 5 from 4
    """

    every: int = 1
    start: int = 0
    stop: int | None = None

    def at(self, count: int) -> bool:
        """Whether this count is a turn."""
        return count in range(self.start, count + 1 if self.stop is None else self.stop, self.every)

    def before(self, count: int) -> int:
        """How many turns there are before this count."""
        return len(range(self.start, count if self.stop is None else min(count, self.stop), self.every))

    def __str__(self) -> str:
        parts = [
            f"every {self.every}" if self.every != 1 else "",
            f"from {self.start}" if self.start else "",
            f"to {self.stop}" if self.stop is not None else "",
        ]
        return " ".join(part for part in parts if part)

    def problems(self) -> Iterator[str]:
        """What is wrong with the numbers."""
        for name, value, least in (("every", self.every, 1), ("start", self.start, 0), ("stop", self.stop, 0)):
            if name == "stop" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield f"{name} is an int of at least {least}, got {value!r}"
                return
        if self.stop is not None and self.stop <= self.start:
            yield f"stop={self.stop} is not after start={self.start}: it would never be its turn"
