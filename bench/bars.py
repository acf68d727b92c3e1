"""What is promised and can only be timed, measured side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import funcfreeze as ff
from bench import recipes, workloads
from bench.contender import Contender
from bench.memory import peak_bytes
from bench.overhead import overhead
from bench.peers import PEERS
from bench.table import millions, three
from bench.timing import interleaved, median_ratio, medians
from bench.workloads import Program, Workload
from funcfreeze.gradients import routed

Measures = dict[str, Any]


def whole_step(workload: Workload, rounds: int) -> Measures:
    """A whole step with Adam: the recipe, one plain summed loss, funcfreeze."""
    contenders = {
        "recipe": recipes.recipe(workload),
        "summed": recipes.summed(workload),
        "routed": recipes.routed(workload),
    }
    if workload.name == "adversarial MLP":
        contenders["reversal"] = recipes.reversal(workload)
    times = interleaved(contenders, rounds)
    return {
        "ms": medians(times),
        "recipe / routed": median_ratio(times, "recipe", "routed"),
        "routed / summed": median_ratio(times, "routed", "summed"),
    }


def gradients_only(workload: Workload, rounds: int) -> Measures:
    """Losses and gradients without an optimizer, against the backward of the plain sum."""
    contenders = {
        "summed": recipes.summed(workload, step=False),
        "routed": recipes.gradients(workload),
        "recipe": recipes.recipe(workload, step=False),
    }
    times = interleaved(contenders, rounds)
    return {"ms": medians(times), "routed / summed": median_ratio(times, "routed", "summed")}


def outside_the_engine(workload: Workload, rounds: int) -> Measures:
    """The part of a gradient that is neither the model's forward nor autograd's engine, once the plan is cached."""
    spent: dict[str, float] = {"forward": 0.0, "engine": 0.0}

    def timed(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return f(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    step = ff.Step(workload.model, timed("forward", workload.losses), workload.routes, optimizer=ff.optim.adam(1e-3))
    state, original = step.init(), routed.walk
    parts, totals = [], []
    routed.walk = timed("engine", original)
    try:
        for turn in range(rounds + 2):
            batch = workload.batch()
            spent.update(forward=0.0, engine=0.0)
            start = time.perf_counter()
            step.gradients(state, batch)
            total = time.perf_counter() - start
            if turn > 1:
                totals.append(total)
                parts.append(1 - (spent["forward"] + spent["engine"]) / total)
    finally:
        routed.walk = original
    return {"ms": statistics.median(totals) * 1e3, "part outside": statistics.median(parts)}


def memory(workload: Workload) -> Measures:
    """Peak bytes of a whole step, counted exactly, against one plain summed loss and the recipe."""
    batch = workload.batch()
    fixed = replace(workload, batch=lambda: batch)
    peaks = {}
    for name, make in (("summed", recipes.summed), ("recipe", recipes.recipe), ("routed", recipes.routed)):
        run = make(fixed)
        run()
        peaks[name] = peak_bytes(run)
    return {
        "bytes": peaks,
        "routed / summed": peaks["routed"] / peaks["summed"],
        "recipe / summed": peaks["recipe"] / peaks["summed"],
    }


def doors(workload: Workload, rounds: int) -> Measures:
    """`ff.combine(...).backward()` against `ff.backward(...)`, forward included: time, and peak bytes."""
    batch = workload.batch()
    fixed = replace(workload, batch=lambda: batch)
    contenders = {name: recipes.in_a_loop(fixed, combined=name == "combine") for name in ("backward", "combine")}
    times = interleaved(contenders, rounds)
    peaks = {name: peak_bytes(run) for name, run in contenders.items()}
    return {
        "ms": medians(times),
        "combine / backward": median_ratio(times, "combine", "backward"),
        "bytes": peaks,
        "combine / backward, bytes": peaks["combine"] / peaks["backward"],
    }


def whole_program(program: Program, rounds: int) -> Measures:
    """A step of a whole training program, by hand and ours, eager and compiled.

    The bars: ours takes at most 1.05 of the time of the eager loop by hand, and compiled at most 0.9 of it.
    """
    peers = "by-hand", "by-hand-compiled", "funcfreeze", "funcfreeze-compiled"
    times = interleaved({peer: _built(peer, program) for peer in peers}, rounds)
    return {
        "ms": medians(times),
        "funcfreeze / by hand": median_ratio(times, "funcfreeze", "by-hand"),
        "funcfreeze, compiled / by hand": median_ratio(times, "funcfreeze-compiled", "by-hand"),
        "funcfreeze, compiled / by hand, compiled": median_ratio(times, "funcfreeze-compiled", "by-hand-compiled"),
    }


def _built(peer: str, program: Program) -> Contender:
    built = PEERS[peer].build(program, recipes.CPU)
    assert isinstance(built, Contender), built
    return built


def listing(data: Mapping[str, Any]) -> str:
    """The bars as lines to read: what was measured, then one line a number or a group of numbers."""
    machine, versions = data["machine"], data["versions"]
    parts = [
        f"{machine['processor']}, {machine['threads']} threads, torch {versions['torch']}; {data['date']}; "
        f"{data['rounds']} rounds"
    ]
    for title, found in data["measures"].items():
        width = max(map(len, found))
        parts += ["", title, *(f"  {_unit(name):{width}}  {_shown(name, value)}" for name, value in found.items())]
    return "\n".join(parts) + "\n"


def _unit(name: str) -> str:
    return "MB" if name == "bytes" else name


def _shown(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return "   ".join(f"{part} {_shown(name, number)}" for part, number in value.items())
    return millions(value) if name == "bytes" else three(value)


def measure(rounds: int) -> dict[str, Measures]:
    """All bars."""
    heads = workloads.many_heads(16)
    return {
        "whole step, adversarial MLP, signed weights": whole_step(workloads.adversarial(), rounds),
        "whole step, adversarial MLP, 3 losses": whole_step(workloads.confusion(), rounds),
        "whole step, 16 losses on one trunk": whole_step(heads, rounds),
        "gradients, 16 losses on one trunk": gradients_only(heads, rounds),
        "planning, 48-layer transformer, 3 losses": outside_the_engine(workloads.transformer(), max(4, rounds // 3)),
        "memory, adversarial MLP, signed weights": memory(workloads.adversarial(size=8192)),
        "memory, adversarial MLP, 3 losses": memory(workloads.confusion(size=8192)),
        "memory, 16 losses on one trunk": memory(workloads.many_heads(16, size=8192)),
        "combine, adversarial MLP, signed weights": doors(workloads.adversarial(), rounds),
        "combine, adversarial MLP, 3 losses": doors(workloads.confusion(), rounds),
        "combine, 16 losses on one trunk": doors(heads, rounds),
        "combine, ResNet-18": doors(workloads.resnet(), max(4, rounds // 3)),
        "combine, actor-critic": doors(workloads.actor_critic(), rounds),
        "program, WGAN-GP": whole_program(workloads.wgan_gp(), rounds),
        "program, BYOL": whole_program(workloads.byol(), rounds),
        "program, SAC": whole_program(workloads.sac(), rounds),
        "overhead of a compiled step": {
            f"microseconds, {name}, {count} parameters, {what}": taken
            for name, make in (("sgd", ff.optim.sgd), ("adam", ff.optim.adam))
            for count in (4, 400)
            for what, taken in overhead(count, make(1e-3)).items()
        },
    }
