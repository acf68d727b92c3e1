"""What a peer builds from a workload, and what its builders share."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import optree
import torch
from torch import Tensor, nn

import funcfreeze as ff
from bench.workloads.program import Program
from bench.workloads.workload import NOT_WRITTEN, Workload

POOL = 8
"""Batches are made beforehand and taken in turn: making them is not part of a step."""


@dataclass(frozen=True)
class Contender:
    """A workload as one peer trains it.

    Attributes:
        step: one training step on the next batch; it may return before the device is done.
        wait: returns when the device is done.
        parameters: the present values, by the torch model's paths.
        measured: what a peer can only tell itself, by the name of the measure.
        draws: whether it draws random numbers of its own, so that nobody else makes its update.
    """

    step: Callable[[], object]
    wait: Callable[[], object]
    parameters: Callable[[], Mapping[str, Tensor]]
    measured: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    draws: bool = False

    def __call__(self) -> None:
        """One step, done when this returns."""
        self.take(1)

    def take(self, steps: int) -> None:
        """Several steps in a row, as in a training loop; the last is done when this returns."""
        for _ in range(steps):
            self.step()
        self.wait()


@dataclass(frozen=True)
class Absent:
    """Why a peer, or one measure of it, is not there.

    Attributes:
        kind: "not installed", "cannot express", "not written", "not here" (this device), or "not measurable".
    """

    kind: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"absent": self.kind, "reason": self.reason}


Build = Callable[[Workload, torch.device], "Contender | Absent"]
BuildProgram = Callable[[Program, torch.device], Contender]


@dataclass(frozen=True)
class Peer:
    """One way to train.

    Attributes:
        label: what tables call it.
        builder: makes a contender of a workload; None for one that is there for merge rules alone.
        program: makes one of a whole training loop; None where nobody wrote it.
        meeting: makes one of a workload with a merge rule; None where nobody wrote it.
        requires: modules that it imports beside torch.
        cuda: whether it is there on CUDA devices only.
        compiled: whether it runs generated code, in which operators are not dispatched one by one.
        replayed: whether it replays a recording, in which no operator can be seen.
        routed: whether it makes the update that the routes declare.
    """

    label: str
    builder: Build | None
    program: BuildProgram | None = None
    meeting: Build | None = None
    requires: tuple[str, ...] = ()
    cuda: bool = False
    compiled: bool = False
    replayed: bool = False
    routed: bool = True

    @property
    def missing(self) -> tuple[str, ...]:
        """What it requires and is not installed."""
        return tuple(name for name in self.requires if find_spec(name) is None)

    def build(self, workload: Workload | Program, device: torch.device) -> Contender | Absent:
        """A contender that has taken no step yet, or why there is none."""
        if self.missing:
            return Absent("not installed", f"needs {', '.join(self.missing)}")
        if self.cuda and device.type != "cuda":
            return Absent("not here", "CUDA graphs need a CUDA device")
        made: Contender | Absent | None
        if isinstance(workload, Program):
            made = self.program and self.program(workload, device)
        elif workload.merge is None:
            made = self.builder and self.builder(workload, device)
        else:
            made = self.meeting and self.meeting(workload, device)
        return made or Absent("not written", NOT_WRITTEN)


def model_on(workload: Workload | Program, device: torch.device) -> nn.Module:
    """The contender's own copy of the model."""
    return copy.deepcopy(workload.model).to(device)


def pool(workload: Workload | Program, device: torch.device) -> list[Any]:
    """Fresh batches, the same for every contender."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return [optree.tree_map(lambda tensor: tensor.to(device), workload.batch()) for _ in range(POOL)]


def batches_on(workload: Workload | Program, device: torch.device) -> Iterator[Any]:
    """The pool, over and over."""
    return itertools.cycle(pool(workload, device))


def adam(model: nn.Module, rates: Mapping[str, float], *, fused: bool = True) -> torch.optim.Adam:
    """Adam over the parameters that are trained, fused unless told otherwise, so that optimizers do not differ."""
    groups = [
        {"params": [p for p in model.get_submodule(name).parameters() if p.requires_grad], "lr": rate}
        for name, rate in rates.items()
    ]
    return torch.optim.Adam(groups, fused=True if fused else None)


def waiter(device: torch.device) -> Callable[[], None]:
    """Waits for the device."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


@dataclass(frozen=True)
class Phase:
    """One backward of the recipe: a loss, its weight, and the paths that it may update with that weight."""

    loss: str
    weight: float
    paths: frozenset[str]

    def weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The loss as it is differentiated."""
        return losses[self.loss] if self.weight == 1.0 else self.weight * losses[self.loss]


def phases(workload: Workload) -> list[Phase]:
    """Every backward that the routes take, one for each loss and weight."""
    plan = ff.Step(workload.model, workload.losses, workload.routes, optimizer=ff.optim.sgd(0.1)).plan
    found: dict[tuple[str, float], set[str]] = {}
    for row in plan.rows:
        for loss, (weight,) in row.weights.items():
            found.setdefault((loss, float(weight)), set()).add(row.path)
    return [Phase(loss, weight, frozenset(paths)) for (loss, weight), paths in found.items()]
