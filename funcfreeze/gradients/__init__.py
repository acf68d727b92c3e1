"""The engines: three ways to compute one law (see `law`), one a file."""

from __future__ import annotations

from collections.abc import Mapping

from funcfreeze.gradients.law import Engine, Evaluate, Outcome, Routing, SeparateOutcome
from funcfreeze.gradients.reference import Reference
from funcfreeze.gradients.routed import Routed
from funcfreeze.gradients.timetable import Timetable
from funcfreeze.gradients.toggle import Toggle

ENGINES: Mapping[str, Engine] = {"routed": Routed(), "reference": Reference(), "toggle": Toggle()}


def find_engine(name: str) -> Engine:
    """The engine of that name; `ValueError` says which there are."""
    if name not in ENGINES:
        raise ValueError(f"engine is one of {', '.join(map(repr, ENGINES))}, got {name!r}")
    return ENGINES[name]


__all__ = ["ENGINES", "Engine", "Evaluate", "Outcome", "Routing", "SeparateOutcome", "Timetable", "find_engine"]
