"""The formulas of the step that have a name, and what each is given.

A formula takes the step as a float64 tensor and gives one on the same device. Its other arguments are plain numbers, so
nothing has to be brought to that device, and nothing waits for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from funcfreeze.schedules.lookup import Lookup

Check = Callable[[str, Any], Any]
"""From an argument's name and value to the value as plain data; a ValueError says what it must be."""


def finite(what: str, value: object) -> int | float:
    """A number as Python's own int or float.

    >>> finite("a", 3)
    3
    >>> finite("a", True)
    Traceback (most recent call last):
        ...
    ValueError: a must be a finite number, got True
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def positive(what: str, value: object) -> int | float:
    """A number above 0."""
    number = finite(what, value)
    if number <= 0:
        raise ValueError(f"{what} must be more than 0, got {value!r}")
    return number


def not_negative(what: str, value: object) -> int | float:
    """A number from 0 on."""
    number = finite(what, value)
    if number < 0:
        raise ValueError(f"{what} must be at least 0, got {value!r}")
    return number


def whole(what: str, value: object) -> int:
    """A whole number from 1 on."""
    number = finite(what, value)
    if number < 1 or number != int(number):
        raise ValueError(f"{what} must be a whole number of at least 1, got {value!r}")
    return int(number)


def numbers(what: str, value: object) -> tuple[int | float, ...]:
    """A list of numbers."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{what} must be a list of numbers, got {value!r}")
    return tuple(finite(f"{what}[{index}]", number) for index, number in enumerate(value))


def floats(what: str, value: object) -> tuple[float, ...]:
    """A list of at least one number."""
    found = tuple(map(float, numbers(what, value)))
    if not found:
        raise ValueError(f"{what} must have at least one number, got {value!r}")
    return found


@dataclass(frozen=True)
class Formula:
    """How a schedule of one name is computed.

    Attributes:
        bind: from the arguments, in their order, to the function of the step.
        arguments: what each must be, by name.
        problem: from the arguments to what is wrong with them together, or None.
    """

    bind: Callable[..., Callable[[Tensor], Tensor]]
    arguments: Mapping[str, Check]
    problem: Callable[..., str | None] = lambda *arguments: None


def closed(compute: Callable[..., Tensor]) -> Callable[..., Callable[[Tensor], Tensor]]:
    """`compute(step, *arguments)` in the form that `Formula.bind` has."""
    return lambda *arguments: lambda step: compute(step, *arguments)


def _constant(step: Tensor, value: float) -> Tensor:
    return torch.full_like(step, value)


def _linear(step: Tensor, a: float, b: float, steps: float) -> Tensor:
    return a + (b - a) * (step / steps).clamp(0, 1)


def _cosine(step: Tensor, a: float, b: float, steps: float) -> Tensor:
    return b + (a - b) * _half_cosine((step / steps).clamp(0, 1))


def _cosine_wave(step: Tensor, a: float, b: float, steps: float) -> Tensor:
    return b + (a - b) * _half_cosine(step % (2 * steps) / steps)


def _cosine_restarts(step: Tensor, a: float, b: float, steps: int, growth: int) -> Tensor:
    if growth == 1:
        return b + (a - b) * _half_cosine(step % steps / steps)

    def started(period: Tensor) -> Tensor:
        # Powers of whole numbers are whole; on a GPU they come out a few digits off.
        return steps * ((growth**period).round() - 1) / (growth - 1)

    # The logarithm may be off by its last digits, just where a period begins.
    step = step.clamp(min=0)
    near = (torch.log1p(step / steps * (growth - 1)) / math.log(growth)).floor().clamp(min=0)
    period = near + (started(near + 1) <= step).to(near.dtype) - (started(near) > step).to(near.dtype)
    return b + (a - b) * _half_cosine((step - started(period)) / (steps * (growth**period).round()))


def _exponential(step: Tensor, a: float, rate: float, steps: float) -> Tensor:
    return a * float(rate) ** (step / steps)


def _staircase(step: Tensor, a: float, rate: float, steps: float) -> Tensor:
    return a * float(rate) ** (step / steps).floor()


def _polynomial(step: Tensor, a: float, b: float, steps: float, power: float) -> Tensor:
    return b + (a - b) * (1 - (step / steps).clamp(0, 1)) ** float(power)


def _piecewise(step: Tensor, values: tuple[float, ...], boundaries: tuple[float, ...]) -> Tensor:
    value = torch.full_like(step, values[0])
    for boundary, later in zip(boundaries, values[1:], strict=True):
        value = torch.where(step < boundary, value, later)
    return value


def _triangle_wave(step: Tensor, a: float, b: float, up: float, down: float) -> Tensor:
    period = up + down
    part = step / period
    part = part - part.floor()
    top = up / period
    # Without a way down the second is infinite, and never taken.
    return a + (b - a) * torch.where(part <= top, part / top, (1 - part) / (1 - top))


def _dann(step: Tensor, total_steps: float, gamma: float) -> Tensor:
    return 2 / (1 + torch.exp(-gamma * (step / total_steps).clamp(max=1))) - 1


def _cosine_decay(step: Tensor, init_value: float, decay_steps: float, alpha: float) -> Tensor:
    return init_value * (alpha + (1 - alpha) * _half_cosine((step / decay_steps).clamp(0, 1)))


def _warmup_constant(step: Tensor, init_value: float, peak_value: float, warmup_steps: float) -> Tensor:
    # A warm-up of no steps is at its peak from step 0 on; the division is then by 1 and its result not taken.
    rising = _linear(step, init_value, peak_value, max(warmup_steps, 1))
    return torch.where(step < warmup_steps, rising, peak_value)


def _warmup_cosine_decay(
    step: Tensor, init_value: float, peak_value: float, warmup_steps: float, decay_steps: float, end_value: float
) -> Tensor:
    rising = _warmup_constant(step, init_value, peak_value, warmup_steps)
    falling = _half_cosine(((step - warmup_steps) / (decay_steps - warmup_steps)).clamp(0, 1))
    return torch.where(step < warmup_steps, rising, end_value + (peak_value - end_value) * falling)


def _half_cosine(progress: Tensor) -> Tensor:
    """From 1 at progress 0 down to 0 at progress 1, along half a period of the cosine."""
    return 0.5 * (1 + torch.cos(math.pi * progress))


def pieces(things: str, number: int, boundaries: tuple[float, ...]) -> str | None:
    """What is wrong with the places where one thing takes over from another."""
    if number != len(boundaries) + 1:
        return f"{things} are one more than boundaries, got {number} and {len(boundaries)}"
    if any(one >= other for one, other in itertools.pairwise(boundaries)):
        return f"boundaries must rise, got {list(boundaries)}"
    return None


def _warmup_too_long(init_value: float, peak: float, warmup_steps: float, decay_steps: float, end: float) -> str | None:
    if warmup_steps < decay_steps:
        return None
    return (
        "decay_steps counts from step 0 and must be more than warmup_steps, got "
        f"decay_steps={decay_steps!r}, warmup_steps={warmup_steps!r}"
    )


_BETWEEN: Mapping[str, Check] = {"a": finite, "b": finite, "steps": positive}
_DECAY: Mapping[str, Check] = {"a": finite, "rate": not_negative, "steps": positive}
_DANN: Mapping[str, Check] = {"total_steps": positive, "gamma": finite}

FORMULAS: Mapping[str, Formula] = {
    "constant": Formula(closed(_constant), {"value": finite}),
    "linear": Formula(closed(_linear), _BETWEEN),
    "cosine": Formula(closed(_cosine), _BETWEEN),
    "cosine_wave": Formula(closed(_cosine_wave), _BETWEEN),
    "cosine_restarts": Formula(closed(_cosine_restarts), {"a": finite, "b": finite, "steps": whole, "growth": whole}),
    "exponential": Formula(closed(_exponential), _DECAY),
    "staircase": Formula(closed(_staircase), _DECAY),
    "polynomial": Formula(closed(_polynomial), {**_BETWEEN, "power": not_negative}),
    "piecewise": Formula(
        closed(_piecewise),
        {"values": numbers, "boundaries": numbers},
        lambda values, boundaries: pieces("values", len(values), boundaries),
    ),
    "triangle_wave": Formula(closed(_triangle_wave), {"a": finite, "b": finite, "up": positive, "down": not_negative}),
    "table": Formula(Lookup, {"values": floats}),
    "dann": Formula(closed(_dann), _DANN),
    "constant_schedule": Formula(closed(_constant), {"value": finite}),
    "linear_schedule": Formula(
        closed(_linear), {"init_value": finite, "end_value": finite, "transition_steps": positive}
    ),
    "cosine_decay_schedule": Formula(
        closed(_cosine_decay), {"init_value": finite, "decay_steps": positive, "alpha": finite}
    ),
    "warmup_constant_schedule": Formula(
        closed(_warmup_constant), {"init_value": finite, "peak_value": finite, "warmup_steps": not_negative}
    ),
    "warmup_cosine_decay_schedule": Formula(
        closed(_warmup_cosine_decay),
        {
            "init_value": finite,
            "peak_value": finite,
            "warmup_steps": not_negative,
            "decay_steps": positive,
            "end_value": finite,
        },
        _warmup_too_long,
    ),
    "dann_schedule": Formula(closed(_dann), _DANN),
}
