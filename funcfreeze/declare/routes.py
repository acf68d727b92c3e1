"""Routes as a user writes them, brought to one form: for each loss, selectors with weights.

{"cls": "*"}                                 a selector
{"cls": ["encoder", "classifier"]}           their union
{"dom": {"domain": 1.0, "encoder": -0.1}}    a weight for each selector
{"aux": [Route("encoder"), Route("*.bias", weight=0.5)]}   active weights add up
{"cls": ["head"], "aux": Route("encoder", start=1000)}     active from a count on
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
from funcfreeze.declare.timing import ALWAYS, Timing, as_count, never_thaws, timing_problems
from funcfreeze.schedules.calling import value_at

Weight = float | Tensor | Callable[[Tensor], Any]
"""What a loss's gradient is multiplied by: a number, a 0-d tensor, or a schedule of the step."""

Selection = Selector | str | Sequence[Selector | str]


@dataclass(frozen=True)
class Route:
    """Parameters a loss may update, the weight of its gradient there, and when.

    The route is active at the counts in `range(start, stop, every)`. The count is the number of steps taken so far,
    `state.step`: 0 at the first call; for `ff.combine` and `ff.backward` it is their `step=`. Warm-up, gradual
    unfreezing, a linear probe before fine-tuning and a discriminator that starts late are routes with a `start`.

    Not active means untouched: a parameter that no active route of any loss may update comes out of the step
    bit-identical, its optimizer state included: no decay, no momentum, no count. That is not what a weight of 0 does.
    In the forward such a parameter is a constant, as one with `requires_grad=False` is in an eager loop: nothing is
    computed or kept for it, its hooks do not run, and `losses` cannot differentiate at it unless
    `Step(..., differentiable=...)` names it. A loss of which no route is active is computed and reported all the same.

    Args:
        params: a selector, or a list of selectors that stands for their union.
        weight: a number, a 0-d floating tensor, or a schedule `step -> number or 0-d tensor`. Where several routes in a
            list name one parameter, the weights of those that are active add up.
        every: active at every so many counts from `start` on, an int of at least 1.
        start: the first count at which it is active, an int of at least 0.
        stop: the count from which on it is not, an int above `start`; None for no end.
        reset: whether the optimizer state of its parameters is fresh, as `transform.init` makes it, when it makes them
            active again. False keeps it as it was. It is fresh at a count c > 0 if this route is active at c, and at
            c - 1 no route of any loss was active for the parameter: of two routes, the one that thaws it decides, and
            where one goes on, nothing is reset. At count 0 there is no count before, and nothing is reset; a state that
            begins at a later count (by `step=`, or another Step's) is treated as if it had come there from 0. It does
            not matter whether the loss is absent, or a loss scale skips the step, at that count.

    Numbers that make no sense are an error of the `Step`, which can name the loss; those of the weight are one here.

    >>> Route("encoder", weight=-0.1)
    Route('encoder', weight=-0.1)
    >>> Route("encoder", every=2, start=1000, reset=True)
    Route('encoder', every=2, start=1000, reset=True)
    >>> Route("encoder", weight=float("nan"))
    Traceback (most recent call last):
        ...
    funcfreeze.declare.selectors.RouteError: Route('encoder'): a weight is a finite number, a 0-d tensor or a schedule,
        got nan

    A linear probe for two steps, then everything is trained:

    >>> import torch
    >>> from torch import nn
    >>> import funcfreeze as ff
    >>> model = nn.ModuleDict({"backbone": nn.Linear(3, 3), "head": nn.Linear(3, 1)})
    >>> losses = lambda model, x: {"cls": model["head"](model["backbone"](x)).square().mean()}
    >>> routes = {"cls": [Route("head"), Route("backbone", start=2)]}
    >>> step = ff.Step(model, losses, routes, optimizer=ff.optim.adam(0.1))
    >>> print(step.plan)
    parameter        elements  cls
    backbone.weight         9    1
    backbone.bias           3    1
    head.weight             3    1
    head.bias               1    1
    cls updates 4 of 4 parameters (16 of 16 elements)
    timed  cls: backbone from 2
    >>> state = step.init()
    >>> for _ in range(3):
    ...     print(sorted(step.gradients(state, torch.ones(4, 3))))
    ...     state, metrics = step(state, torch.ones(4, 3))
    ['head.bias', 'head.weight']
    ['head.bias', 'head.weight']
    ['backbone.bias', 'backbone.weight', 'head.bias', 'head.weight']
    """

    params: Selection
    weight: Weight
    every: int
    start: int
    stop: int | None
    reset: bool

    def __init__(
        self,
        params: Selection,
        *,
        weight: Weight = 1.0,
        every: int = 1,
        start: int = 0,
        stop: int | None = None,
        reset: bool = False,
    ) -> None:
        values = {
            "params": tuple(params) if isinstance(params, list) else params,
            "weight": weight,
            "every": as_count(every),
            "start": as_count(start),
            "stop": as_count(stop),
            "reset": reset,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        shown = ", ".join(map(repr, map(label, self.selectors)))
        if problem := weight_problem(weight):
            raise RouteError(f"Route({shown}): {problem}")

    def __repr__(self) -> str:
        names = [label(selector) for selector in self.selectors]
        shown = [repr(names[0]) if len(names) == 1 else repr(names)]
        if not _is_one(self.weight):
            shown.append(f"weight={self.weight!r}")
        timing = {"every": self.every, "start": self.start, "stop": self.stop, "reset": self.reset}
        shown += [f"{name}={value!r}" for name, value in timing.items() if repr(value) != repr(getattr(ALWAYS, name))]
        return f"Route({', '.join(shown)})"

    @property
    def timing(self) -> Timing:
        """When it is active."""
        return Timing(self.every, self.start, self.stop, self.reset)

    @property
    def timing_problem(self) -> str | None:
        """What is wrong with when it is active, or None."""
        problems = [*timing_problems(self.every, self.start, self.stop, self.reset)]
        if not problems and self.reset and never_thaws(self.timing):
            problems = [
                "reset=True means fresh optimizer state when the route becomes active again, which never happens: it "
                "is active from count 0 on without a gap; give start= or every=, or leave reset out"
            ]
        return f"{self!r}: {'; '.join(problems)}" if problems else None

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
            f"the weight {weight!r} is a schedule of the step, and there is no step here: give ff.combine or "
            "ff.backward step=, use ff.Step, or pass its value as a number"
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
