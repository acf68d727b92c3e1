"""Routes as a user writes them, brought to one form: for each loss, selectors with weights.

{"cls": "*"}                                 a selector
{"cls": ["encoder", "classifier"]}           their union
{"dom": {"domain": 1.0, "encoder": -0.1}}    a weight for each selector
{"aux": [Route("encoder"), Route("*.bias", weight=0.5)]}   active weights add up
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor

from funcfreeze.declare.selectors import RouteError, Selector, label, to_selector
from funcfreeze.schedules.calling import value_at

Weight = float | Tensor | Callable[[Tensor], Any]
"""What a loss's gradient is multiplied by: a number, a 0-d tensor, or a schedule of the step."""

Selection = Selector | str | Sequence[Selector | str]


@dataclass(frozen=True)
class Route:
    """Parameters a loss may update, and the weight of its gradient there.

    Args:
        params: a selector, or a list of selectors that stands for their union.
        weight: a number, a 0-d floating tensor, or a schedule `step -> number or 0-d tensor`.

    >>> Route("encoder", weight=-0.1)
    Route('encoder', weight=-0.1)
    >>> Route("encoder", weight=float("nan"))
    Traceback (most recent call last):
        ...
    funcfreeze.declare.selectors.RouteError: Route('encoder'): a weight is a finite number, a 0-d tensor or a schedule,
        got nan
    """

    params: Selection
    weight: Weight

    def __init__(self, params: Selection, *, weight: Weight = 1.0) -> None:
        chosen = tuple(params) if isinstance(params, list) else params
        object.__setattr__(self, "params", chosen)
        object.__setattr__(self, "weight", weight)
        shown = ", ".join(map(repr, map(label, self.selectors)))
        if problem := weight_problem(weight):
            raise RouteError(f"Route({shown}): {problem}")

    def __repr__(self) -> str:
        names = [label(selector) for selector in self.selectors]
        shown = repr(names[0]) if len(names) == 1 else repr(names)
        return f"Route({shown})" if _is_one(self.weight) else f"Route({shown}, weight={self.weight!r})"

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """The selectors whose union the route stands for."""
        given = self.params if isinstance(self.params, tuple | list) else (self.params,)
        return tuple(to_selector(selector) for selector in given)


def _is_one(weight: Weight) -> bool:
    return isinstance(weight, Real) and float(weight) == 1.0


def weight_problem(weight: object) -> str | None:
    """What is wrong with a weight, or None."""
    wanted = "a weight is a finite number, a 0-d tensor or a schedule"
    if isinstance(weight, Tensor):
        if weight.ndim != 0 or not weight.is_floating_point():
            return f"{wanted}, got a tensor of shape {tuple(weight.shape)} and dtype {weight.dtype}"
        if weight.requires_grad:
            return f"{wanted}, got a tensor that requires grad: a weight is not differentiated, pass weight.detach()"
        return None
    if isinstance(weight, bool):
        return f"{wanted}, got {weight}"
    if isinstance(weight, Real):
        return None if math.isfinite(weight) else f"{wanted}, got {weight}"
    return None if callable(weight) else f"{wanted}, got {type(weight).__name__}: {weight!r}"


@dataclass(frozen=True)
class Declaration:
    """One loss's routes in one form.

    `exclusive` means that no parameter may be claimed by two of the routes (the entries of one mapping).
    """

    routes: tuple[Route, ...]
    exclusive: bool


def declare(given: object) -> Declaration:
    """Bring what a user wrote for one loss to one form; `RouteError` says what is not a route."""
    if isinstance(given, Route):
        return Declaration((given,), exclusive=False)
    if isinstance(given, Mapping):
        if not given:
            raise RouteError("an empty mapping selects nothing; leave the loss out of `losses` or route it")
        return Declaration(tuple(Route(selector, weight=weight) for selector, weight in given.items()), exclusive=True)
    if isinstance(given, list | tuple):
        if not given:
            raise RouteError("an empty list selects nothing; leave the loss out of `losses` or route it")
        listed = [isinstance(item, Route) for item in given]
        if all(listed):
            return Declaration(tuple(given), exclusive=False)
        if any(listed):
            raise RouteError("a list holds either selectors (their union) or Routes (weights add), not both")
        return Declaration((Route(list(given)),), exclusive=False)
    return Declaration((Route(to_selector(given)),), exclusive=False)  # type: ignore[arg-type]  # it raises on others


def weight_value(terms: Sequence[Weight], step: Tensor | None) -> float | Tensor:
    """The sum of the active weights at a step: a float where all are numbers, else a 0-d tensor.

    Raises:
        TypeError: a weight is a schedule and there is no step to read.
        ValueError: a schedule returned something that is not a number or a 0-d tensor.
    """
    values = [_evaluate(term, step) for term in terms]
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _evaluate(weight: Weight, step: Tensor | None) -> float | Tensor:
    if isinstance(weight, Tensor):
        return weight
    if isinstance(weight, Real):
        return float(weight)
    if step is None:
        raise TypeError(
            f"the weight {weight!r} is a schedule of the step, and there is no step here: give ff.combine step=, use "
            "ff.Step, or pass its value as a number"
        )
    schedule: Callable[[Any], Any] = weight  # type: ignore[assignment]  # mypy takes an int for a Real, a float for none
    value: float | Tensor = value_at(schedule, step, partial(_checked, schedule))
    return value


def _checked(schedule: Callable[[Any], Any], value: Any) -> float | Tensor:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.detach()
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(f"the schedule {schedule!r} must return a finite number or a 0-d tensor, it returned {shown}")


def scalar_like(weight: float | Tensor, like: Tensor) -> float | Tensor:
    """A weight that can multiply `like` without moving it or, where it is 0-d too, promoting it."""
    if not isinstance(weight, Tensor):
        return weight
    precision = like.real.dtype if like.is_complex() else like.dtype
    return weight.to(like.device, precision)


UNIT: tuple[Weight, ...] = (1.0,)
"""The weight that multiplies nothing."""

__all__ = [
    "UNIT", "Declaration", "Route", "Weight", "declare", "scalar_like", "weight_problem", "weight_value",
]  # fmt: skip
