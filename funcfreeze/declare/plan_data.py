"""A plan's weights and timings as plain data, and back."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from funcfreeze.declare.routes import Weight
from funcfreeze.declare.selectors import RouteError
from funcfreeze.declare.timing import Timing
from funcfreeze.schedules.schedule import Schedule

Weights = Mapping[str, tuple[Weight, ...]]
Timings = Mapping[str, tuple[Timing, ...]]


def routes_to_data(weights: Weights, timings: Timings) -> dict[str, Any]:
    """One parameter's routes by loss; timings only where there are some."""
    timed = {loss: [timing.to_dict() for timing in given] for loss, given in timings.items()}
    plain = {"weights": {loss: list(map(number_to_data, terms)) for loss, terms in weights.items()}}
    return {**plain, "timings": timed} if timed else plain


def routes_from_data(data: Mapping[str, Any]) -> tuple[Weights, Timings]:
    """The weights and timings that `routes_to_data` wrote down.

    Raises:
        RouteError: a weight that was a function, or a timing that is none.
    """
    weights = {loss: tuple(map(number_from_data, terms)) for loss, terms in data["weights"].items()}
    timings = {loss: tuple(map(Timing.from_dict, given)) for loss, given in data.get("timings", {}).items()}
    for loss, given in timings.items():
        if len(given) != len(weights.get(loss, ())):
            seen = f"{len(given)} timings and {len(weights.get(loss, ()))} weights"
            raise RouteError(f"this is not a plan's data: loss {loss!r} has {seen} for {data['names'][0]}")
    return weights, timings


def number_to_data(weight: Weight) -> Any:
    """A number, a 0-d tensor or a schedule."""
    if isinstance(weight, Real):
        return float(weight)
    if isinstance(weight, Schedule):
        return {"schedule": weight.to_dict()}
    if isinstance(weight, Tensor):
        return {"tensor": float(weight), "dtype": str(weight.dtype).removeprefix("torch.")}
    return {"function": repr(weight)}


def number_from_data(data: Any, noun: str = "weight") -> Weight:
    """What `number_to_data` wrote down; `RouteError` for a function, named by the noun."""
    if isinstance(data, Real):
        return float(data)
    if "schedule" in data:
        return Schedule.from_dict(data["schedule"])
    if "tensor" in data:
        return torch.tensor(data["tensor"], dtype=getattr(torch, data["dtype"]))
    raise RouteError(
        f"the {noun} {data['function']} was a function, which plain data cannot hold; use a schedule of "
        "funcfreeze.schedules, or resolve the plan anew"
    )
