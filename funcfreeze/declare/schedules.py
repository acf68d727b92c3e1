"""Schedules: frozen values that give a number for every step, for learning rates and route weights alike.

The names and the arguments are optax's, plus the one of domain-adversarial training. A schedule is plain data: it
prints as it was written, compares by value, goes to a dict and back, and can be scaled by a number.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def _constant(step: Tensor, value: float) -> Tensor:
    return torch.full_like(step, value)


def _linear(step: Tensor, init_value: float, end_value: float, transition_steps: float) -> Tensor:
    return init_value + (end_value - init_value) * (step / transition_steps).clamp(0, 1)


def _cosine_decay(step: Tensor, init_value: float, decay_steps: float, alpha: float) -> Tensor:
    return init_value * (alpha + (1 - alpha) * _half_cosine(step / decay_steps))


def _warmup_constant(step: Tensor, init_value: float, peak_value: float, warmup_steps: float) -> Tensor:
    # A warm-up of no steps is at its peak from step 0 on; the division is then by 1 and its result not taken.
    rising = _linear(step, init_value, peak_value, max(warmup_steps, 1))
    return torch.where(step < warmup_steps, rising, peak_value)


def _warmup_cosine_decay(
    step: Tensor, init_value: float, peak_value: float, warmup_steps: float, decay_steps: float, end_value: float
) -> Tensor:
    rising = _warmup_constant(step, init_value, peak_value, warmup_steps)
    falling = _half_cosine((step - warmup_steps) / (decay_steps - warmup_steps))
    return torch.where(step < warmup_steps, rising, end_value + (peak_value - end_value) * falling)


def _dann(step: Tensor, total_steps: float, gamma: float) -> Tensor:
    return 2 / (1 + torch.exp(-gamma * (step / total_steps).clamp(max=1))) - 1


def _half_cosine(progress: Tensor) -> Tensor:
    """From 1 at progress 0 down to 0 at progress 1, along half a period of the cosine."""
    return 0.5 * (1 + torch.cos(math.pi * progress.clamp(0, 1)))


_FORMULAS: Mapping[str, Callable[..., Tensor]] = {
    "constant_schedule": _constant,
    "linear_schedule": _linear,
    "cosine_decay_schedule": _cosine_decay,
    "warmup_constant_schedule": _warmup_constant,
    "warmup_cosine_decay_schedule": _warmup_cosine_decay,
    "dann_schedule": _dann,
}


@dataclass(frozen=True, repr=False)
class Schedule:
    """A number for every step, written down; made by the functions below, scaled by `*` and negated by `-`.

    Called with a step (an int or a 0-d integer tensor) it gives a 0-d float64 tensor on the step's device, and never
    waits for that device.

    >>> weight = -0.3 * dann_schedule(800)
    >>> weight
    -0.3 * dann_schedule(total_steps=800, gamma=10.0)
    >>> weight(400)
    tensor(-0.2960, dtype=torch.float64)
    >>> Schedule.from_dict(weight.to_dict()) == weight
    True
    >>> Schedule("dan_schedule", ())
    Traceback (most recent call last):
        ...
    ValueError: no schedule is named 'dan_schedule'; there are constant_schedule, linear_schedule, ...
    """

    name: str
    arguments: tuple[tuple[str, float], ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in _FORMULAS:
            raise ValueError(f"no schedule is named {self.name!r}; there are {', '.join(_FORMULAS)}")
        given = [name for name, _ in self.arguments]
        expected = [*inspect.signature(_FORMULAS[self.name]).parameters][1:]
        if given != expected:
            raise ValueError(f"{self.name} takes {', '.join(expected)}; got {', '.join(given) or 'nothing'}")
        for name, value in (*self.arguments, ("scale", self.scale)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{self.name}: {name} must be a finite number, got {value!r}")
        _check_lengths(self.name, dict(self.arguments))

    def __call__(self, step: int | Tensor) -> Tensor:
        at = torch.as_tensor(step).to(torch.float64)
        return self.scale * _FORMULAS[self.name](at, **dict(self.arguments))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments)
        return f"{'' if self.scale == 1 else f'{self.scale!r} * '}{self.name}({arguments})"

    def __mul__(self, factor: float) -> Schedule:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return replace(self, scale=self.scale * factor)

    def __rmul__(self, factor: float) -> Schedule:
        return self * factor

    def __neg__(self) -> Schedule:
        return self * -1

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain data, for JSON and checkpoints."""
        return {"name": self.name, "arguments": dict(self.arguments), "scale": self.scale}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_dict` wrote down."""
        missing = [key for key in ("name", "arguments", "scale") if key not in data]
        if missing:
            raise ValueError(f"a schedule's dict has name, arguments and scale; {', '.join(missing)} missing: {data!r}")
        return cls(data["name"], tuple(data["arguments"].items()), data["scale"])


Check = Callable[[Any], Any]
"""Gives a schedule's value back, or raises on one that is no number."""

Caller = Callable[[Callable[[Any], Any], Check], Any]

_calling: ContextVar[Caller | None] = ContextVar("calling", default=None)


def value_at(schedule: Callable[[Any], Any], step: Any, check: Check) -> Any:
    """A schedule's checked value at a step: of the schedules above, and of any other function of the step."""
    call = _calling.get()
    return check(schedule(step)) if call is None or isinstance(schedule, Schedule) else call(schedule, check)


@contextmanager
def calling(call: Caller) -> Iterator[None]:
    """Inside, `value_at` leaves functions that are no data to `call`: a tracer cannot see what they read."""
    token = _calling.set(call)
    try:
        yield
    finally:
        _calling.reset(token)


def _check_lengths(name: str, arguments: Mapping[str, float]) -> None:
    """Lengths are positive; only a warm-up may have none, and it ends before the decay does."""
    for length in ("transition_steps", "decay_steps", "total_steps"):
        if arguments.get(length, 1) <= 0:
            raise ValueError(f"{name}: {length} must be more than 0, got {arguments[length]!r}")
    warmup = arguments.get("warmup_steps", 0)
    if warmup < 0:
        raise ValueError(f"{name}: warmup_steps must be at least 0, got {warmup!r}")
    if warmup >= arguments.get("decay_steps", math.inf):
        raise ValueError(
            f"{name}: decay_steps counts from step 0 and must be more than warmup_steps, got "
            f"decay_steps={arguments['decay_steps']!r}, warmup_steps={warmup!r}"
        )


def constant_schedule(value: float) -> Schedule:
    """The same value at every step.

    >>> constant_schedule(0.5)(7)
    tensor(0.5000, dtype=torch.float64)
    """
    return Schedule("constant_schedule", (("value", value),))


def linear_schedule(init_value: float, end_value: float, transition_steps: float) -> Schedule:
    """In a straight line from `init_value` at step 0 to `end_value` at `transition_steps`, and constant after it.

    >>> linear_schedule(0.0, 1.0, 10)(4)
    tensor(0.4000, dtype=torch.float64)
    >>> linear_schedule(0.0, 1.0, 0)
    Traceback (most recent call last):
        ...
    ValueError: linear_schedule: transition_steps must be more than 0, got 0
    """
    return Schedule(
        "linear_schedule",
        (("init_value", init_value), ("end_value", end_value), ("transition_steps", transition_steps)),
    )


def cosine_decay_schedule(init_value: float, decay_steps: float, alpha: float = 0.0) -> Schedule:
    """Along half a cosine from `init_value` down to `alpha * init_value` at `decay_steps`, and constant after it.

    >>> cosine_decay_schedule(2.0, 10)(5)
    tensor(1., dtype=torch.float64)
    """
    return Schedule(
        "cosine_decay_schedule", (("init_value", init_value), ("decay_steps", decay_steps), ("alpha", alpha))
    )


def warmup_constant_schedule(init_value: float, peak_value: float, warmup_steps: float) -> Schedule:
    """In a straight line from `init_value` to `peak_value` at `warmup_steps`, and constant after it.

    >>> warmup_constant_schedule(0.0, 1.0, 10)(25)
    tensor(1., dtype=torch.float64)
    """
    return Schedule(
        "warmup_constant_schedule",
        (("init_value", init_value), ("peak_value", peak_value), ("warmup_steps", warmup_steps)),
    )


def warmup_cosine_decay_schedule(
    init_value: float, peak_value: float, warmup_steps: float, decay_steps: float, end_value: float = 0.0
) -> Schedule:
    """Up to `peak_value` at `warmup_steps` in a straight line, then down to `end_value` at `decay_steps` by a cosine.

    Both lengths count from step 0, as in optax.

    >>> warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=30)(20)
    tensor(0.5000, dtype=torch.float64)
    >>> warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=10)
    Traceback (most recent call last):
        ...
    ValueError: warmup_cosine_decay_schedule: decay_steps counts from step 0 and must be more than warmup_steps, ...
    """
    return Schedule(
        "warmup_cosine_decay_schedule",
        (
            ("init_value", init_value),
            ("peak_value", peak_value),
            ("warmup_steps", warmup_steps),
            ("decay_steps", decay_steps),
            ("end_value", end_value),
        ),
    )


def dann_schedule(total_steps: float, gamma: float = 10.0) -> Schedule:
    """The weight of a domain-adversarial loss: 0 at step 0, rising to almost 1 at `total_steps`, constant after it.

    It is 2 / (1 + exp(-gamma * p)) - 1 with p the fraction of training that is done, from Ganin et al.,
    "Domain-Adversarial Training of Neural Networks", JMLR 17(59), 2016 (https://arxiv.org/abs/1505.07818).

    >>> dann_schedule(800)(0), dann_schedule(800)(800)
    (tensor(0., dtype=torch.float64), tensor(0.9999, dtype=torch.float64))
    """
    return Schedule("dann_schedule", (("total_steps", total_steps), ("gamma", gamma)))
