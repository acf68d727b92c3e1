"""Schedules by name: for learning rates, the weights of losses, and whatever else is a number that changes."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from funcfreeze.schedules.schedule import Schedule


def constant(value: float) -> Schedule:
    """The same value at every step.

    >>> constant(0.5)(7)
    tensor(0.5000, dtype=torch.float64)
    >>> constant(float("nan"))
    Traceback (most recent call last):
        ...
    ValueError: constant: value must be a finite number, got nan
    """
    return Schedule("constant", (("value", value),))


def linear(a: float, b: float, steps: float) -> Schedule:
    """In a straight line from `a` at step 0 to `b` at step `steps`, and constant after it.

    >>> import torch
    >>> linear(0, 1, 10)(torch.tensor([0, 4, 10, 99]))
    tensor([0.0000, 0.4000, 1.0000, 1.0000], dtype=torch.float64)
    >>> linear(0, 1, 0)
    Traceback (most recent call last):
        ...
    ValueError: linear: steps must be more than 0, got 0
    """
    return Schedule("linear", (("a", a), ("b", b), ("steps", steps)))


def cosine(a: float, b: float, steps: float) -> Schedule:
    """Along half a cosine from `a` at step 0 to `b` at step `steps`, and constant after it.

    It is b + (a - b) * (1 + cos(pi * step / steps)) / 2, from Loshchilov and Hutter, "SGDR", ICLR 2017
    (https://arxiv.org/abs/1608.03983), equation 5, without restarts.

    >>> import torch
    >>> cosine(2.0, 0.0, 10)(torch.tensor([0, 5, 10, 99]))
    tensor([2., 1., 0., 0.], dtype=torch.float64)
    """
    return Schedule("cosine", (("a", a), ("b", b), ("steps", steps)))


def cosine_wave(a: float, b: float, steps: float) -> Schedule:
    """Along half a cosine from `a` at step 0 to `b` at step `steps`, back to `a` in as many, and so on.

    This is what torch's `CosineAnnealingLR` does once it is stepped past its `T_max`.

    >>> import torch
    >>> cosine_wave(2.0, 0.0, 10)(torch.tensor([0, 5, 10, 15, 20]))
    tensor([2.0000, 1.0000, 0.0000, 1.0000, 2.0000], dtype=torch.float64)
    """
    return Schedule("cosine_wave", (("a", a), ("b", b), ("steps", steps)))


def cosine_restarts(a: float, b: float, steps: int, growth: int = 1) -> Schedule:
    """Half a cosine from `a` towards `b` in `steps` steps, then from `a` again, each time `growth` times as long.

    Warm restarts, from Loshchilov and Hutter, "SGDR", ICLR 2017 (https://arxiv.org/abs/1608.03983), equation 5.

    >>> import torch
    >>> cosine_restarts(2.0, 0.0, 2, growth=2)(torch.arange(8))
    tensor([2.0000, 1.0000, 2.0000, 1.7071, 1.0000, 0.2929, 2.0000, 1.9239], dtype=torch.float64)
    >>> cosine_restarts(2.0, 0.0, 2.5)
    Traceback (most recent call last):
        ...
    ValueError: cosine_restarts: steps must be a whole number of at least 1, got 2.5
    """
    return Schedule("cosine_restarts", (("a", a), ("b", b), ("steps", steps), ("growth", growth)))


def exponential(a: float, rate: float, steps: float = 1) -> Schedule:
    """From `a` at step 0, times `rate` in every `steps` steps, smoothly: a * rate ** (step / steps).

    It is optax's `exponential_decay(a, steps, rate)`. It never ends; `join` it to what comes after.

    >>> import torch
    >>> exponential(0.1, 0.5, 10)(torch.tensor([0, 10, 20]))
    tensor([0.1000, 0.0500, 0.0250], dtype=torch.float64)
    """
    return Schedule("exponential", (("a", a), ("rate", rate), ("steps", steps)))


def staircase(a: float, rate: float, steps: float) -> Schedule:
    """From `a` at step 0, times `rate` at every `steps`-th step: a * rate ** floor(step / steps).

    >>> import torch
    >>> staircase(0.1, 0.5, 10)(torch.tensor([0, 9, 10, 20]))
    tensor([0.1000, 0.1000, 0.0500, 0.0250], dtype=torch.float64)
    """
    return Schedule("staircase", (("a", a), ("rate", rate), ("steps", steps)))


def polynomial(a: float, b: float, steps: float, power: float = 1.0) -> Schedule:
    """From `a` at step 0 to `b` at step `steps`, and constant after it: b + (a - b) * (1 - step / steps) ** power.

    >>> import torch
    >>> polynomial(1.0, 0.0, 10, power=2)(torch.tensor([0, 5, 10, 99]))
    tensor([1.0000, 0.2500, 0.0000, 0.0000], dtype=torch.float64)
    """
    return Schedule("polynomial", (("a", a), ("b", b), ("steps", steps), ("power", power)))


def piecewise(values: Sequence[float], boundaries: Sequence[float]) -> Schedule:
    """The first value before the first boundary, the second from it on, and so on.

    >>> import torch
    >>> piecewise([0.1, 0.01], [100])(torch.tensor([99, 100]))
    tensor([0.1000, 0.0100], dtype=torch.float64)
    >>> piecewise([0.1, 0.01], [])
    Traceback (most recent call last):
        ...
    ValueError: piecewise: values are one more than boundaries, got 2 and 0
    """
    return Schedule("piecewise", (("values", values), ("boundaries", boundaries)))


def triangle_wave(a: float, b: float, up: float, down: float) -> Schedule:
    """In a straight line from `a` to `b` in `up` steps, back in `down` steps, and so on.

    From Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (https://arxiv.org/abs/1506.01186).

    >>> import torch
    >>> triangle_wave(0.0, 1.0, 2, 4)(torch.arange(8))
    tensor([0.0000, 0.5000, 1.0000, 0.7500, 0.5000, 0.2500, 0.0000, 0.5000], dtype=torch.float64)
    """
    return Schedule("triangle_wave", (("a", a), ("b", b), ("up", up), ("down", down)))


def table(values: Sequence[float]) -> Schedule:
    """A number for each step, written out; after the last one, that.

    For a schedule that has no formula. Where the step is on another device, the table is copied there once.

    >>> import torch
    >>> table([0.1, 0.2, 0.4])(torch.tensor([0, 1, 2, 3]))
    tensor([0.1000, 0.2000, 0.4000, 0.4000], dtype=torch.float64)
    """
    return Schedule("table", (("values", values),))


def join(schedules: Sequence[Schedule | float], boundaries: Sequence[float]) -> Schedule:
    """One schedule until the first boundary, from there on the next, and so on; each counts from its own start.

    It is optax's `join_schedules`. A number is a constant schedule.

    >>> import torch
    >>> warm_up = join([linear(0, 1, 10), cosine(1, 0, 100)], [10])
    >>> warm_up(torch.tensor([0, 5, 10, 60, 110]))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
    >>> join([linear(0, 1, 10), 1.0, cosine(1, 0, 100)], [10])
    Traceback (most recent call last):
        ...
    ValueError: join: schedules are one more than boundaries, got 3 and 1
    """
    parts: object = schedules
    if isinstance(schedules, Sequence):
        parts = tuple(constant(part) if isinstance(part, Real) else part for part in schedules)
    return Schedule("join", (("schedules", parts), ("boundaries", boundaries)))


def dann(total_steps: float, gamma: float = 10.0) -> Schedule:
    """The weight of a domain-adversarial loss: 0 at step 0, rising to almost 1 at `total_steps`, constant after it.

    It is 2 / (1 + exp(-gamma * p)) - 1 with p the fraction of training that is done, from Ganin et al.,
    "Domain-Adversarial Training of Neural Networks", JMLR 17(59), 2016 (https://arxiv.org/abs/1505.07818).

    >>> dann(800)(0), dann(800)(800)
    (tensor(0., dtype=torch.float64), tensor(0.9999, dtype=torch.float64))
    """
    return Schedule("dann", (("total_steps", total_steps), ("gamma", gamma)))
