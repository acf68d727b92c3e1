"""Calling a schedule, also while a step is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from funcfreeze.schedules.schedule import Schedule

Check = Callable[[Any], Any]
"""Gives a schedule's value back, or raises on one that is no number."""

Caller = Callable[[Callable[[Any], Any], Check], Any]

_calling: ContextVar[Caller | None] = ContextVar("calling", default=None)


def value_at(schedule: Callable[[Any], Any], step: Any, check: Check) -> Any:
    """A schedule's checked value at a step: of a `Schedule`, and of any other function of the step."""
    # Dynamo, in a loop that somebody compiles, cannot read a context variable; the tracer that sets it is not Dynamo.
    call = None if torch.compiler.is_dynamo_compiling() else _calling.get()
    return check(schedule(step)) if call is None or _is_arithmetic(schedule) else call(schedule, check)


def _is_arithmetic(schedule: Callable[[Any], Any]) -> bool:
    """Whether all that it does is arithmetic on the step and plain numbers, which a trace can hold."""
    return isinstance(schedule, Schedule) and not schedule.has_table


@contextmanager
def calling(call: Caller) -> Iterator[None]:
    """Inside, `value_at` leaves functions to `call` that read what a tracer cannot see, or what it would copy."""
    token = _calling.set(call)
    try:
        yield
    finally:
        _calling.reset(token)
