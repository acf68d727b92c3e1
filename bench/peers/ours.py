"""funcfreeze: eager, compiled, and recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import funcfreeze as ff
from bench.contender import Contender, batches_on, model_on, waiter
from bench.workloads.merge import RADIUS, Merge
from bench.workloads.program import Program
from bench.workloads.workload import Workload

RULES: Mapping[str, Callable[..., ff.merge.Rule]] = {
    "sum": ff.merge.sum,
    "mean": ff.merge.mean,
    "pcgrad": partial(ff.merge.pcgrad, order="declared"),  # so that updates can be compared
    "mgda": ff.merge.mgda,
    "imtl-g": ff.merge.imtl_g,
    "cagrad": partial(ff.merge.cagrad, RADIUS),
    "aligned-mtl": ff.merge.aligned_mtl,
    "graddrop": ff.merge.graddrop,
    "upgrad": ff.merge.upgrad,
}


def rule(merge: Merge) -> ff.merge.Rule:
    """The rule that a workload names."""
    return RULES[merge.rule]().looking_at(merge.at)


def transform(workload: Workload) -> ff.optim.Transform:
    """Adam at the workload's rates."""
    if set(workload.rates) == {""}:
        return ff.optim.adam(workload.rates[""])
    return ff.optim.partition({name: ff.optim.adam(rate) for name, rate in workload.rates.items()})


def contender(step: ff.Step, workload: Workload, device: torch.device, *, draws: bool = False) -> Contender:
    """A step, its state, and the batches."""
    batches = batches_on(workload, device)
    state = step.init()

    def run() -> None:
        nonlocal state
        state, _ = step(state, next(batches))

    return Contender(run, waiter(device), lambda: state.params, draws=draws)


def build(workload: Workload, device: torch.device, *, compile: bool | Mapping[str, Any] = False) -> Contender:
    """`ff.Step` as the README writes it."""
    model = model_on(workload, device)
    merge = None if workload.merge is None else rule(workload.merge)
    step = ff.Step(model, workload.losses, workload.routes, optimizer=transform(workload), merge=merge, compile=compile)
    return contender(step, workload, device, draws=merge is not None and merge.is_random)


def program(program: Program, device: torch.device, *, compile: bool | Mapping[str, Any] = False) -> Contender:
    """The step as it was written; a step of the bench is as many calls of it as are in the program's own period."""
    batches = batches_on(program, device)
    step = program.ours(model_on(program, device), compile)
    state = step.init()

    def run() -> None:
        nonlocal state
        for _ in range(program.calls):
            state, _ = step(state, next(batches))

    def parameters() -> dict[str, Tensor]:
        averages = {
            f"targets.{name}.{path}": tensor
            for name, target in state.targets.items()
            for path, tensor in target.items()
        }
        return {**state.params, **averages}

    return Contender(run, waiter(device), parameters)
