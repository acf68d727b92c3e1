"""All measures of all contenders of all workloads, as plain data."""

from __future__ import annotations

import datetime
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import alone, workloads
from bench.contender import Absent, Contender, Peer
from bench.counts import multiply_adds, products
from bench.machine import describe, versions
from bench.peers import DEFAULTS, OURS, PEERS, REFERENCES
from bench.timing import interleaved, median_ratio, quartiles, steps_per_run
from bench.workloads import Program, Workload
from bench.workloads.merge import SAME

MEASURES = ("time", "first-step", "memory", "multiply-adds", "matmuls")
IN_PROCESS = ("time", "multiply-adds", "matmuls")


@dataclass(frozen=True)
class Options:
    """What to measure, and how long."""

    device: str = "cpu"
    scale: str = "small"
    rounds: int = 30
    workloads: tuple[str, ...] = tuple(workloads.WORKLOADS)
    peers: tuple[str, ...] = DEFAULTS
    measures: tuple[str, ...] = MEASURES

    @property
    def command(self) -> str:
        """How to get the same measures."""
        words = ["python -m bench", f"--device {self.device}", f"--scale {self.scale}", f"--rounds {self.rounds}"]
        chosen = {"workloads": workloads.WORKLOADS, "peers": DEFAULTS, "measures": MEASURES}
        words += [
            f"--{name} {' '.join(mine)}" for name in chosen if (mine := getattr(self, name)) != tuple(chosen[name])
        ]
        return " ".join(words)


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Everything that was asked for, with machine, versions and date: the results so far, after every workload."""
    device = torch.device(options.device)
    results: dict[str, Any] = {}
    head = {
        "date": datetime.date.today().isoformat(),
        "command": options.command,
        "machine": describe(device),
        "versions": versions(),
        "scale": options.scale,
        "rounds": options.rounds,
        "peers": {name: PEERS[name].label for name in options.peers},
    }
    for name in options.workloads:
        results[name] = measure_workload(name, options, device)
        yield {**head, "workloads": dict(results)}


def measure_workload(name: str, options: Options, device: torch.device) -> dict[str, Any]:
    """One workload: contenders side by side in this process, then each in a process of its own."""
    torch.compiler.reset()  # workloads that share code must not share guards, nor be taken for dynamic shapes
    workload = workloads.make(name, options.scale)
    say(f"{name}: {workload.name}")
    results: dict[str, dict[str, Any]] = {peer: {} for peer in options.peers}
    contenders = _build(workload, options, device, results)
    if "time" in options.measures:
        _time(contenders, options.rounds, results)
    for measure in ("multiply-adds", "matmuls"):
        if measure in options.measures:
            for peer, contender in contenders.items():
                results[peer][measure] = _attempt(partial(_count, measure, PEERS[peer], contender))
    present = list(contenders)
    contenders.clear()
    gc.collect()
    apart = [measure for measure in alone.MEASURES if measure in options.measures]
    for peer in present if apart else ():
        say(f"  {peer} alone")
        results[peer] |= alone.in_fresh_process(name, peer, options.device, options.scale, apart)
    return {"name": workload.name, "tolerance": tolerance(workload), "results": results}


def tolerance(workload: Workload | Program) -> float:
    """How far updates may be apart in float64, relative to their size."""
    return SAME if isinstance(workload, Program) or workload.merge is None else workload.merge.tolerance


def _build(
    workload: Workload | Program, options: Options, device: torch.device, results: dict[str, dict[str, Any]]
) -> dict[str, Contender]:
    """Contenders that have proved, in their first two steps, that they make the update the reference makes."""
    contenders: dict[str, Contender] = {}
    reference: Mapping[str, Tensor] | None = None
    for peer in sorted(options.peers, key=lambda peer: [peer != first for first in REFERENCES]):
        say(f"  {peer}")
        built = _attempt(partial(_two_steps, PEERS[peer], workload, device))
        if isinstance(built, dict):
            results[peer] |= built
            continue
        contender, moved = built
        contenders[peer] = contender
        if contender.draws:
            results[peer]["not compared"] = "draws random numbers of its own"
        elif peer in REFERENCES and reference is None:
            reference = moved
        elif reference is not None and PEERS[peer].routed:
            results[peer]["difference"] = difference(moved, reference)
    return {peer: contenders[peer] for peer in options.peers if peer in contenders}


def _two_steps(
    peer: Peer, workload: Workload | Program, device: torch.device
) -> dict[str, Any] | tuple[Contender, Any]:
    """A contender and where two steps took it; or why it is absent."""
    contender = peer.build(workload, device)
    if isinstance(contender, Absent):
        return contender.to_dict()
    before = {path: p.detach().clone() for path, p in contender.parameters().items()}
    contender.take(2)
    after = contender.parameters()
    return contender, {path: (p.detach() - before[path]).cpu() for path, p in after.items()}


def difference(moved: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """How far two displacements are apart, relative to the size of the second."""
    apart = sum(float((by - moved.get(path, torch.zeros(()))).square().sum()) for path, by in reference.items())
    return float((apart / sum(float(by.square().sum()) for by in reference.values())) ** 0.5)


def _time(contenders: Mapping[str, Contender], rounds: int, results: dict[str, dict[str, Any]]) -> None:
    """Steps side by side; for our own also the ratios over everybody."""
    steps = {peer: steps_per_run(contender) for peer, contender in contenders.items()}
    runs = {peer: partial(contender.take, steps[peer]) for peer, contender in contenders.items()}
    say(f"  {rounds} rounds")
    times = {peer: [lasted / steps[peer] for lasted in values] for peer, values in interleaved(runs, rounds, 1).items()}
    for peer, values in times.items():
        results[peer]["time"] = {"ms": quartiles(values), "steps per run": steps[peer]}
    for own in set(OURS) & set(times):
        over = {peer: median_ratio(times, own, peer) for peer in times if peer != own}
        results[own]["time"]["over"] = over


def _count(measure: str, peer: Peer, contender: Contender) -> Any:
    """Multiply-adds or products of one step, or why they cannot be counted."""
    own = contender.measured.get(measure)
    if own is not None:
        return own()
    if peer.replayed:
        return Absent("not measurable", "a replayed CUDA graph shows no operators").to_dict()
    if contender.measured:
        return Absent("not measurable", "torch does not see what it runs").to_dict()
    found = products(contender)
    if measure == "matmuls":
        return found
    if not found["convolutions"]:
        return found["multiply_adds"]
    if not peer.compiled:
        return multiply_adds(contender)
    return Absent("not measurable", "the profiler does not say which half of a convolution's backward ran").to_dict()


def _attempt(f: Callable[[], Any]) -> Any:
    """What `f` returns, or how it failed: one contender that fails does not spoil the others' measures."""
    try:
        return f()
    except Exception as problem:
        text = str(problem).strip().splitlines()
        return {"failed": f"{type(problem).__name__}: {text[0] if text else ''}"[:300]}


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)
