"""Exact counts of what a computation does, by dispatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

MATMULS = {"mm", "addmm", "bmm", "baddbmm"}


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def matmuls(f: Callable[[], object]) -> int:
    """How many matrix products a call makes."""
    with _Count() as count:
        f()
    return sum(count.operators[name] for name in MATMULS)


def multiply_adds(f: Callable[[], object]) -> int:
    """How many multiply-adds a call makes in matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops() // 2
