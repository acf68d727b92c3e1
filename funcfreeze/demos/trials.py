"""Both runs for several seeds, and what may be said about the difference between them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from funcfreeze.demos.adversarial import WEIGHTS, Point, Settings, train
from funcfreeze.demos.threads import one_thread

MEASURES: Mapping[str, Callable[[Point], float]] = {
    "source_accuracy": lambda point: point.source_accuracy,
    "target_accuracy": lambda point: point.target_accuracy,
    "domain_probe": lambda point: point.domain_probe,
}

Curve = tuple[Point, ...]
"""One run's measurements, from early to late."""

Watch = Callable[[int, str, int, Mapping[str, float]], None]
"""`watch(seed, run, step, losses)`, called after every step."""


@dataclass(frozen=True)
class Trials:
    """What came out.

    Attributes:
        seeds: the seeds.
        curves: run -> one curve for each seed.
    """

    seeds: tuple[int, ...]
    curves: Mapping[str, tuple[Curve, ...]]

    def outcome(self, run: str, measure: str) -> list[float]:
        """One number for each seed, measured after the last step."""
        return [MEASURES[measure](curve[-1]) for curve in self.curves[run]]

    def best(self, run: str, measure: str) -> tuple[float, int]:
        """The best mean over the seeds at any point of the training, and after how many steps it was reached."""
        moments = zip(*self.curves[run], strict=True)
        return max((statistics.fmean(map(MEASURES[measure], points)), points[0].step) for points in moments)


def run_trials(settings: Settings, seeds: Sequence[int], watch: Watch, folder: Path | None = None) -> Trials:
    """Train every run for every seed. All runs of a seed have the same data, initial values and batches.

    With a folder each has checkpoints of its own, and goes on from there.
    """
    curves: dict[str, list[Curve]] = {run: [] for run in WEIGHTS}
    with one_thread():
        for seed in seeds:
            for run, weight in WEIGHTS.items():
                own = None if folder is None else folder / f"{run}-{seed}"
                curves[run].append(train(seed, weight, settings, partial(watch, seed, run), own))
    return Trials(tuple(seeds), {run: tuple(found) for run, found in curves.items()})


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds (n - 1), None for a single one.

    >>> spread([1.0, 3.0]), spread([1.0])
    (1.4142135623730951, None)
    """
    return statistics.stdev(values) if len(values) > 1 else None


def mean_and_spread(values: Sequence[float]) -> str:
    """In the usual notation.

    >>> mean_and_spread([0.25, 0.75]), mean_and_spread([0.5])
    ('0.500 ± 0.354', '0.500')
    """
    deviation = spread(values)
    return f"{statistics.fmean(values):.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def compare(name: str, before: Sequence[float], after: Sequence[float]) -> str:
    """What may be said about a difference, in words: it counts if it is larger than the spread over the seeds.

    >>> compare("accuracy", [0.5, 0.6], [0.8, 0.9])
    'accuracy: 0.550 -> 0.850, a change of +0.300, beyond the spread of the seeds (0.071)'
    >>> compare("accuracy", [0.5, 0.6], [0.5, 0.7])
    'accuracy: 0.550 -> 0.600, a change of +0.050, within the spread of the seeds (0.141): no difference shown'
    >>> compare("accuracy", [0.5], [0.6])
    'accuracy: 0.500 -> 0.600, a change of +0.100 on one seed, which shows no spread to compare it with'
    """
    first, last = statistics.fmean(before), statistics.fmean(after)
    said = f"{name}: {first:.3f} -> {last:.3f}, a change of {last - first:+.3f}"
    spreads = [deviation for deviation in (spread(before), spread(after)) if deviation is not None]
    if not spreads:
        return f"{said} on one seed, which shows no spread to compare it with"
    if abs(last - first) > max(spreads):
        return f"{said}, beyond the spread of the seeds ({max(spreads):.3f})"
    return f"{said}, within the spread of the seeds ({max(spreads):.3f}): no difference shown"
