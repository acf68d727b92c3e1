"""What a step computes, counted: multiply-adds, matrix products, convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}
"""The operators in which every matrix product ends, and where their factors begin among the arguments."""

CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")


def multiply_adds(step: Callable[[], object]) -> int:
    """Multiply-adds in matrix products and convolutions, by dispatch: of eager code, differentiated once."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


def products(step: Callable[[], object]) -> dict[str, int]:
    """Matrix products (with their multiply-adds) and convolutions that a step executes, by torch's profiler.

    Generated code calls the same operators for them, so eager and compiled steps are counted alike.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        step()
    found = {"matmuls": 0, "multiply_adds": 0, "convolutions": 0}
    for event in profiler.events():
        if not _last(event):
            continue
        if event.name in PRODUCTS:
            first = PRODUCTS[event.name]
            left, right = event.input_shapes[first : first + 2]
            found["matmuls"] += 1
            found["multiply_adds"] += math.prod(left) * right[-1]
        found["convolutions"] += event.name in CONVOLUTIONS
    return found


def _last(event: Any) -> bool:
    """Whether no other product happens within it: under vmap, one of wrapped tensors calls the one that is done."""
    return not any(_counted(child) or not _last(child) for child in event.cpu_children)


def _counted(event: Any) -> bool:
    return event.name in PRODUCTS or event.name in CONVOLUTIONS
