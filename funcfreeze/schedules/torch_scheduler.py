"""torch's learning rate schedulers as schedules: formulas where there is one, else written out in a table."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from funcfreeze.schedules.formulas import finite, whole
from funcfreeze.schedules.named import table
from funcfreeze.schedules.schedule import Schedule
from funcfreeze.schedules.torch_formulas import formula_of
from funcfreeze.schedules.torch_refused import refuse, right_line

Value = TypeVar("Value")


def from_torch(
    scheduler: type[LRScheduler],
    /,
    lr: float | None = None,
    *misplaced: Any,
    steps: int | None = None,
    **arguments: Any,
) -> Schedule:
    """The rates that a scheduler of torch sets, from a rate of `lr` on: `from_torch(StepLR, lr=0.1, step_size=30)`.

    At step 0 that is the rate after the scheduler was made, at step k the one after k calls of its `step()`: it is
    stepped once in each training step. One that is stepped once an epoch takes its lengths in steps here.

    `ConstantLR`, `LinearLR`, `ExponentialLR`, `StepLR`, `MultiStepLR`, `PolynomialLR`, `CosineAnnealingLR` (past
    `T_max` too, where torch goes up again), `CosineAnnealingWarmRestarts`, `CyclicLR` and `OneCycleLR` become formulas.
    torch computes most of them as a running product, whose rounding errors add up; those of a formula do not.
    `OneCycleLR` ends with `total_steps`: torch's raises when it is stepped further, here the last rate holds.

    All others are run once, now, for as many `steps` as you give, and written out: `LambdaLR`, `MultiplicativeLR`,
    your own. After the last of them its rate holds, so give the length of the training. With `steps`, those above are
    written out too. A class that itself takes an argument `steps` is given it.

    What a scheduler does beside the rate is not taken over. Where it cycles the momentum a warning says so, unless you
    pass `cycle_momentum=False`.

    Args:
        scheduler: the class.
        lr: the optimizer's rate. `OneCycleLR` and `CyclicLR` have their own and need none.
        misplaced: nothing; the scheduler's arguments go by keyword, and there is no optimizer.
        steps: for how many steps the rates are written out.
        arguments: the scheduler's own, without the optimizer.

    Raises:
        TypeError: this is no class of a scheduler, or it does not take these arguments.
        ValueError: torch refuses the arguments, or the scheduler cannot be a function of the step alone.

    >>> from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
    >>> from_torch(StepLR, lr=0.1, step_size=30)
    staircase(a=0.1, rate=0.1, steps=30)
    >>> from_torch(LambdaLR, lr=0.5, lr_lambda=lambda step: 1 / (1 + step), steps=3)
    table(values=(0.5, 0.25, 0.16666666666666666))
    >>> from_torch(StepLR, lr=0.1, stepsize=30)
    Traceback (most recent call last):
        ...
    TypeError: from_torch(StepLR): StepLR.__init__() got an unexpected keyword argument 'stepsize'
    >>> from_torch(ReduceLROnPlateau, lr=0.1)
    Traceback (most recent call last):
        ...
    ValueError: from_torch(ReduceLROnPlateau): its step() takes a metric, and a schedule is a function of the step
    alone; keep the rate in a tensor, ...
    """
    refuse(scheduler, lr, misplaced, arguments)
    name = f"from_torch({scheduler.__name__})"
    rate = _rate(name, scheduler, lr, arguments)
    if steps is not None:
        steps = _of(name, lambda: whole("steps", steps))
        if "steps" in inspect.signature(scheduler).parameters:
            arguments["steps"] = steps
    built = _built(name, scheduler, rate, arguments)
    if vars(built).get("cycle_momentum"):
        warnings.warn(
            f"{name} cycles the momentum too; a schedule is of the rate alone, and the momentum stays what the "
            "optimizer is given. Pass cycle_momentum=False to agree",
            stacklevel=2,
        )
    if steps is not None:
        return _written_out(name, built, steps)
    bound = inspect.signature(scheduler).bind(built.optimizer, **arguments)
    bound.apply_defaults()
    formula = _of(name, lambda: formula_of(built, rate, bound.arguments))
    if formula is None and scheduler is OneCycleLR:
        return _written_out(name, built, vars(built)["total_steps"])
    if formula is None:
        raise ValueError(
            f"{name}: what it sets is no formula that is known here; say for how many steps of training to write it "
            f"out: {right_line(scheduler, rate, arguments, 'steps=...')}"
        )
    if scheduler is not OneCycleLR:
        _written_out(name, built, 3)  # finds what torch refuses only when it is stepped
    return formula


def _rate(name: str, scheduler: type[LRScheduler], lr: Any, arguments: Mapping[str, Any]) -> float:
    if lr is not None:
        return _of(name, lambda: float(finite("lr", lr)))
    if issubclass(scheduler, OneCycleLR | CyclicLR):
        return 1.0  # they set one of their own
    raise TypeError(f"{name}: lr is missing, the rate of the optimizer; write {right_line(scheduler, ..., arguments)}")


def _built(name: str, scheduler: type[LRScheduler], lr: float, arguments: Mapping[str, Any]) -> LRScheduler:
    make: Callable[..., LRScheduler] = scheduler  # takes more than the base class does
    return _of(name, lambda: make(torch.optim.SGD([nn.Parameter(torch.zeros((), device="cpu"))], lr=lr), **arguments))


def _written_out(name: str, built: LRScheduler, steps: int) -> Schedule:
    """The rate at each step, by stepping it."""
    (group,) = built.optimizer.param_groups
    built.optimizer.step()  # or torch warns of the wrong order

    def rates() -> Iterator[float]:
        for step in range(steps):
            if step > 0:
                built.step()
            yield float(group["lr"])

    return _of(name, lambda: table([*rates()]))


def _of(name: str, make: Callable[[], Value]) -> Value:
    """What it gives; what it raises says whose it is."""
    try:
        return make()
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
