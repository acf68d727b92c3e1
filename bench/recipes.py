"""The contenders of the bars: what people write without the package, with `torch.optim.Adam` as it is by default."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import funcfreeze as ff
from bench.contender import batches_on
from bench.peers import by_hand, ours
from bench.peers import recipe as toggling
from bench.workloads.workload import Reversal, Workload

__all__ = ["Reversal", "gradients", "in_a_loop", "recipe", "reversal", "routed", "summed"]

CPU = torch.device("cpu")


def recipe(workload: Workload, *, step: bool = True) -> Callable[[], None]:
    """Toggle `requires_grad`, one `backward(retain_graph=True)` per loss and sign."""
    return toggling.build(workload, CPU, fused=False, step=step)


def reversal(workload: Workload) -> Callable[[], None]:
    """One loss with a reversal layer before the domain heads."""
    built = by_hand.build(workload, CPU, fused=False)
    assert callable(built), built
    return built


def summed(workload: Workload, *, step: bool = True) -> Callable[[], None]:
    """All losses added up, one backward: no routes at all."""
    return by_hand.summed(workload, CPU, fused=False, step=step)


def routed(workload: Workload, engine: str = "routed") -> Callable[[], None]:
    """One funcfreeze step with Adam."""
    step = ff.Step(workload.model, workload.losses, workload.routes, optimizer=ff.optim.adam(1e-3), engine=engine)
    return ours.contender(step, workload, CPU)


def in_a_loop(workload: Workload, *, combined: bool) -> Callable[[], None]:
    """A forward and `ff.backward`, or the backward of what `ff.combine` gives, into `.grad`."""
    model = copy.deepcopy(workload.model)
    plan, batches = ff.plan(model, workload.routes), batches_on(workload, CPU)

    def run() -> None:
        model.zero_grad()
        losses = workload.losses(model, next(batches))
        if combined:
            ff.combine(losses, plan, model).backward()  # type: ignore[no-untyped-call]  # torch's
        else:
            ff.backward(losses, plan, model)

    return run


def gradients(workload: Workload) -> Callable[[], Mapping[str, Tensor]]:
    """The merged gradients alone."""
    step = ff.Step(workload.model, workload.losses, workload.routes, optimizer=ff.optim.adam(1e-3))
    state, batches = step.init(), batches_on(workload, CPU)
    return lambda: step.gradients(state, next(batches))
