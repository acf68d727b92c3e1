"""Hyperparameters: what is accepted as a number, a learning rate or a weight decay, and these at a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from funcfreeze.schedules.calling import value_at

Rate = float | Tensor
LearningRate = Rate | Callable[[Any], Rate]
"""A learning rate or a weight decay: a number, a 0-d tensor, or a schedule of the step."""


def check_number(owner: str, name: str, value: object, *, low: float = 0.0, below: float = math.inf) -> float:
    """The value, if it is a number in [low, below).

    >>> check_number("adam", "betas[1]", 1.0, below=1.0)
    Traceback (most recent call last):
        ...
    ValueError: adam: betas[1] must be at least 0 and less than 1, got 1.0
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}: {value!r}")
    if not low <= value < below:  # NaN is on neither side
        bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"less than {below:g}"] * (below < math.inf)
        raise ValueError(f"{owner}: {name} must be {' and '.join(bounds) or 'finite'}, got {value!r}")
    return value


def check_rate(owner: str, name: str, value: LearningRate) -> None:
    """Raises unless it is a number, a 0-d tensor (neither of them negative) or a schedule.

    >>> check_rate("sgd", "lr", -1.0)
    Traceback (most recent call last):
        ...
    ValueError: sgd: lr must be at least 0, got -1.0
    """
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{owner}: a tensor {name} must be 0-d, got shape {tuple(value.shape)}")
        if not value >= 0:
            raise ValueError(f"{owner}: {name} must be at least 0, got {value!r}")
    elif isinstance(value, LRScheduler) or (isinstance(value, type) and issubclass(value, LRScheduler)):
        scheduler = value if isinstance(value, type) else type(value)
        raise TypeError(
            f"{owner}: {name} is a scheduler of torch's; make a schedule of its class: "
            f"funcfreeze.schedules.from_torch({scheduler.__name__}, lr=..., ...)"
        )
    elif not callable(value) or isinstance(value, type):
        check_number(owner, name, value)


def check_state_dtype(owner: str, state_dtype: object) -> None:
    """Raises unless it is None or a real floating point dtype.

    >>> check_state_dtype("adam", torch.int32)
    Traceback (most recent call last):
        ...
    TypeError: adam: state_dtype must be a floating point dtype such as torch.float32, or None; got torch.int32
    """
    if state_dtype is None or (isinstance(state_dtype, torch.dtype) and state_dtype.is_floating_point):
        return
    raise TypeError(
        f"{owner}: state_dtype must be a floating point dtype such as torch.float32, or None; got {state_dtype!r}"
    )


def rate_at(owner: str, name: str, value: LearningRate, step: int | Tensor | None) -> Rate:
    """The rate at this step: a schedule's value, or the rate as it is.

    >>> rate_at("sgd", "lr", lambda step: 1 / (step + 1), None)
    Traceback (most recent call last):
        ...
    TypeError: sgd: lr is a schedule and must be told the step: update(grads, state, params, step=...)
    """
    if not callable(value):
        return value
    if step is None:
        raise TypeError(
            f"{owner}: {name} is a schedule and must be told the step: update(grads, state, params, step=...)"
        )
    rate: Rate = value_at(value, step, partial(_checked, owner, name))
    return rate


def _checked(owner: str, name: str, value: Any) -> Rate:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    wanted = f"{owner}: the {name} schedule must give a number or a 0-d tensor"
    if isinstance(value, Tensor):
        raise ValueError(f"{wanted}, got shape {tuple(value.shape)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{wanted}, got {type(value).__name__}: {value!r}")
    return value


def rate_near(rate: Rate, tensor: Tensor) -> Rate:
    """The rate where the tensor's device can read it: 0-d CPU tensors mix with everything, others only with their own.

    Moves only between two devices of which one is an accelerator, so a model on one device never waits for it.
    """
    if isinstance(rate, Tensor) and rate.device.type != "cpu" and rate.device != tensor.device:
        return rate.to(tensor.device)
    return rate
