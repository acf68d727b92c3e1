"""The timed routes of a plan in words, one a line: the loss, the parameters, and when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Protocol

from funcfreeze.declare.routes import Weight
from funcfreeze.declare.timing import ALWAYS, Timing

MOST_NAMES = 4
"""Parameters that are no whole modules are named up to this number."""


class _Row(Protocol):
    @property
    def path(self) -> str: ...
    @property
    def trainable(self) -> bool: ...
    @property
    def weights(self) -> Mapping[str, tuple[Weight, ...]]: ...
    @property
    def timings(self) -> Mapping[str, tuple[Timing, ...]]: ...


def timed_routes(losses: Sequence[str], rows: Sequence[_Row]) -> Iterator[tuple[str, str]]:
    """The loss, and which parameters and when, with the weight where a loss has several routes to one of them.

    The parameters are told by the largest modules of which the route takes everything that can be trained.
    """
    for loss in losses:
        found: dict[tuple[Timing, str], set[str]] = {}
        for row in rows:
            terms, timings = row.weights.get(loss, ()), row.timings.get(loss, ())
            for weight, timing in zip(terms, timings, strict=False):  # an untimed loss has no timings
                shown = f" with weight {_number(weight)}" if len(terms) > 1 else ""
                if timing != ALWAYS:
                    found.setdefault((timing, shown), set()).add(row.path)
        for (timing, shown), paths in found.items():
            yield loss, f"{_named(paths, rows)}{shown} {timing}"


def _number(weight: Weight) -> str:
    return f"{weight:g}" if isinstance(weight, int | float) else repr(weight)


def _named(paths: Set[str], rows: Sequence[_Row]) -> str:
    names = [*_largest(paths, [row.path for row in rows if row.trainable], "")]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _largest(chosen: Set[str], paths: Sequence[str], prefix: str) -> Iterator[str]:
    """The names of the largest modules below a prefix that are chosen as a whole, and of other chosen parameters."""
    if chosen >= {*paths}:
        yield prefix or "*"
        return
    children: dict[str, list[str]] = {}
    for path in paths:
        rest = path[len(prefix) + 1 :] if prefix else path
        children.setdefault(rest.split(".")[0], []).append(path)
    for name, inside in children.items():
        if not chosen.isdisjoint(inside):
            yield from _largest(chosen, inside, f"{prefix}.{name}" if prefix else name)
