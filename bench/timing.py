"""Timing side by side: rounds in which every contender runs once, in turn; medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of every run, by contender. The order turns around every other round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warmup, rounds):
        for name in contenders if turn % 2 else reversed(contenders):
            start = time.perf_counter()
            contenders[name]()
            if turn >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def steps_per_run(step: Callable[[], object], wanted: float = 10.0, most: int = 50) -> int:
    """How many steps last about so many milliseconds: very short runs are noise, and no loop waits after each step."""
    lasted = statistics.median(interleaved({"": step}, rounds=3, warmup=2)[""])
    return max(1, min(most, round(wanted / max(lasted, 1e-3))))


def quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median, the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each contender."""
    return {name: statistics.median(values) for name, values in times.items()}


def median_ratio(times: Mapping[str, list[float]], over: str, under: str) -> float:
    """The median of the ratios of runs in the same round, which a slow phase of the machine spoils least."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))
