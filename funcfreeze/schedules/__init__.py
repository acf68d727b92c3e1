"""Schedules: frozen values that give a number for every step, for learning rates and route weights alike."""

from funcfreeze.schedules.named import (
    constant,
    cosine,
    cosine_restarts,
    cosine_wave,
    dann,
    exponential,
    join,
    linear,
    piecewise,
    polynomial,
    staircase,
    table,
    triangle_wave,
)
from funcfreeze.schedules.schedule import Schedule
from funcfreeze.schedules.torch_scheduler import from_torch

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cosine_restarts",
    "cosine_wave",
    "dann",
    "exponential",
    "from_torch",
    "join",
    "linear",
    "piecewise",
    "polynomial",
    "staircase",
    "table",
    "triangle_wave",
]
