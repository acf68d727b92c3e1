"""torch's schedulers in our own formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import lr_scheduler as torchs
from torch.optim.lr_scheduler import LRScheduler

from funcfreeze.schedules.formulas import whole
from funcfreeze.schedules.named import (
    cosine,
    cosine_restarts,
    cosine_wave,
    exponential,
    join,
    linear,
    piecewise,
    polynomial,
    staircase,
    triangle_wave,
)
from funcfreeze.schedules.schedule import Schedule

Arguments = Mapping[str, Any]


def formula_of(built: LRScheduler, lr: float, arguments: Arguments) -> Schedule | None:
    """The schedule that a scheduler follows, or None if there is no formula for it.

    Args:
        built: the scheduler, not yet stepped.
        lr: the rate it was given.
        arguments: all that it was given, with the defaults.
    """
    write = _FORMULAS.get(type(built))
    return None if write is None else write(lr, arguments, built)


def _length(arguments: Arguments, what: str) -> int:
    try:
        return whole(what, arguments[what])
    except ValueError as error:
        raise ValueError(f"{error}; or with steps= what torch makes of it is written out") from error


def _constant(lr: float, given: Arguments, built: LRScheduler) -> Schedule:
    return piecewise([lr * given["factor"], lr], [_length(given, "total_iters")])


def _linear(lr: float, given: Arguments, built: LRScheduler) -> Schedule:
    return linear(lr * given["start_factor"], lr * given["end_factor"], _length(given, "total_iters"))


def _exponential(lr: float, given: Arguments, built: LRScheduler) -> Schedule:
    return exponential(lr, given["gamma"])


def _step(lr: float, given: Arguments, built: LRScheduler) -> Schedule:
    return staircase(lr, given["gamma"], _length(given, "step_size"))


def _multi_step(lr: float, given: Arguments, built: LRScheduler) -> Schedule:
    counts = vars(built)["milestones"]  # how often each is given, since what is given may be used up
    # torch looks for the step among them: what no step can be is not found.
    places = sorted(place for place in counts if place >= 0 and place == int(place))
    powers = [sum(counts[place] for place in places[: index + 1]) for index in range(len(places))]
    return piecewise([lr, *(lr * given["gamma"] ** power for power in powers)], places)


def _polynomial(lr: float, given: Arguments, built: LRScheduler) -> Schedule:
    return polynomial(lr, 0.0, _length(given, "total_iters"), given["power"])


def _cosine(lr: float, given: Arguments, built: LRScheduler) -> Schedule:
    return cosine_wave(lr, given["eta_min"], _length(given, "T_max"))


def _restarts(lr: float, given: Arguments, built: LRScheduler) -> Schedule:
    return cosine_restarts(lr, given["eta_min"], given["T_0"], given["T_mult"])


def _cyclic(lr: float, given: Arguments, built: LRScheduler) -> Schedule | None:
    low, high = (float(vars(built)[bounds][0]) for bounds in ("base_lrs", "max_lrs"))
    up = float(given["step_size_up"])
    down = up if given["step_size_down"] is None else float(given["step_size_down"])
    if given["scale_fn"] is not None:
        return None
    if given["mode"] == "triangular":
        return triangle_wave(low, high, up, down)
    shrinking = staircase(1.0, 0.5, up + down) if given["mode"] == "triangular2" else exponential(1.0, given["gamma"])
    return low + triangle_wave(0.0, high - low, up, down) * shrinking


def _one_cycle(lr: float, given: Arguments, built: LRScheduler) -> Schedule | None:
    group, total = built.optimizer.param_groups[0], vars(built)["total_steps"]
    start, top, end = (float(group[rate]) for rate in ("initial_lr", "max_lr", "min_lr"))
    between = cosine if given["anneal_strategy"] == "cos" else linear
    warm = float(given["pct_start"] * total)
    ends = [0.0, warm - 1, *([2 * warm - 2] if given["three_phase"] else []), float(total - 1)]
    rates = [start, top, *([start] if given["three_phase"] else []), end]
    if any(one >= other for one, other in itertools.pairwise(ends)):
        return None  # a phase without a length, of which torch makes something of its own
    phases = zip(itertools.pairwise(rates), itertools.pairwise(ends), strict=True)
    return join([between(*around, last - first) for around, (first, last) in phases], ends[1:-1])


_FORMULAS: Mapping[type[LRScheduler], Callable[[float, Arguments, LRScheduler], Schedule | None]] = {
    torchs.ConstantLR: _constant,
    torchs.LinearLR: _linear,
    torchs.ExponentialLR: _exponential,
    torchs.StepLR: _step,
    torchs.MultiStepLR: _multi_step,
    torchs.PolynomialLR: _polynomial,
    torchs.CosineAnnealingLR: _cosine,
    torchs.CosineAnnealingWarmRestarts: _restarts,
    torchs.CyclicLR: _cyclic,
    torchs.OneCycleLR: _one_cycle,
}
"""By the very class: a subclass may do otherwise."""
