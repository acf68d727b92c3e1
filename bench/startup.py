"""Start-up: CPU seconds to the first step, compiled by hand and by funcfreeze, with empty caches and with filled ones.

CPU time, since wall time is that of the machine's other work, with one thread for compilers and for operators. Every
number is of a process of its own; contenders take turns.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

from bench.alone import with_caches
from bench.run import say

PAIR = ("by-hand-compiled", "funcfreeze-compiled")

_ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}

Runs = dict[str, dict[str, list[dict[str, Any]]]]
"""By contender: what its processes found, "cold" and "warm"."""


def startup(workloads: Sequence[str], device: str, scale: str, rounds: int) -> Iterator[tuple[str, Runs]]:
    """The name of a workload and what was measured, one workload after the other."""
    for workload in workloads:
        runs: Runs = {peer: {"cold": [], "warm": []} for peer in PAIR}
        with patch.dict(os.environ, _ONE_THREAD):
            for turn in range(rounds):
                for peer in PAIR if turn % 2 else reversed(PAIR):
                    with tempfile.TemporaryDirectory() as folder:
                        for caches in ("cold", "warm"):
                            found = with_caches(folder, workload, peer, device, scale, ["first-step"])["first-step"]
                            say(f"{workload} {peer} {caches}: {found}")
                            runs[peer][caches].append(found)
        yield workload, runs


def summary(runs: Runs) -> dict[str, Mapping[str, Any]]:
    """Medians, and ours over by hand's; empty where a process failed."""
    found = {}
    for caches in ("cold", "warm"):
        seconds = {peer: [run.get("cpu seconds") for run in both[caches]] for peer, both in runs.items()}
        if not any(None in taken for taken in seconds.values()):
            medians = {peer: statistics.median(taken) for peer, taken in seconds.items()}
            by_hand, ours = (medians[peer] for peer in PAIR)
            found[f"{caches}, cpu seconds"] = {**medians, "ratio": ours / by_hand}
    return found
