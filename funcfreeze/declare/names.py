"""Names that a step keeps for itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

OWN = "ff/"
"""What the names of the metrics begin with that a step adds to the user's."""


def is_own(name: object) -> bool:
    """Whether a name is one that a step may give to a metric of its own."""
    return isinstance(name, str) and name.startswith(OWN)


def own_name_problems(what: str, names: Iterable[object]) -> Iterator[str]:
    """What is wrong with names that a user gave.

    >>> list(own_name_problems("metric", ["accuracy", "ff/skipped"]))
    ["metric 'ff/skipped': names that begin with 'ff/' are those of the step's own metrics; rename it"]
    """
    for name in names:
        if is_own(name):
            yield f"{what} {name!r}: names that begin with {OWN!r} are those of the step's own metrics; rename it"
