"""What a step computes, on plain tensors: losses and merged gradients, then the update. Eager and traced alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from funcfreeze.computation.back_door import (
    earlier_step_problem,
    form_of,
    form_problem,
    parameter_problem,
    raise_misuse,
)
from funcfreeze.computation.evaluation import NOTHING, Beside, Evaluation
from funcfreeze.computation.half import Half
from funcfreeze.computation.loss_scale import LossScale, scale_in, unscale
from funcfreeze.computation.state import State, count_of
from funcfreeze.declare.selectors import RouteError
from funcfreeze.gradients import Engine, Routing, Timetable
from funcfreeze.gradients.law import Evaluate, OtherLeaf, Outcome, SeparateOutcome
from funcfreeze.gradients.returned import exchanged
from funcfreeze.gradients.sums import plus
from funcfreeze.model.memory import memory_of
from funcfreeze.model.watching import Watch, by_memory
from funcfreeze.optim import Transform
from funcfreeze.optim.transform import apart

Gave = TypeVar("Gave", Outcome, SeparateOutcome)


class Differentiated(NamedTuple):
    """Merged gradients by path, touched parameters only, and the present losses by name, detached and unweighted."""

    gradients: dict[str, Tensor]
    losses: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Computation:
    """The user's losses over a model, differentiated by an engine and handed to an optimizer.

    Attributes:
        evaluation: the losses over the model.
        timetable: which loss may update which parameters, at every count.
        engine: what differentiates.
        transform: the optimizer.
        loss_scale: a factor on every loss's backward pass.
        now: which loss may update which parameters at the count that this is for; None where routes are not timed.
    """

    evaluation: Evaluation
    timetable: Timetable
    engine: Engine
    transform: Transform
    loss_scale: LossScale | None
    now: Routing | None = None

    def at(self, state: State) -> Computation:
        """What it computes at the count of a state, with the routes that are active then."""
        return replace(self, now=self.timetable.at(count_of(state))) if self.timetable.is_timed else self

    @property
    def routing(self) -> Routing:
        """Which loss may update which parameters."""
        return self.now or self.timetable.at(None)

    def gradients(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: Any, step: Tensor, batch: Any
    ) -> Half:
        """The merged gradients and all that the forward gives. Buffers are cloned for it, not written to.

        Raises:
            RouteError: a loss and a metric have one name, or what `losses` returned does not fit the declaration.
            RuntimeError: `losses` uses the model's tensors as it must not.
        """
        watched = not (self.evaluation.seen.watched and self.engine.finds_other_leaves)
        watch = self.evaluation.watch(params) if watched else None
        outcome = self._run(self.engine.merged, params, buffers, optimizer, step, batch, watch)
        beside: Beside = outcome.rest or NOTHING
        self._refuse_other_leaves(outcome.other_leaves, params)
        _check_beside(outcome.losses, beside, params)
        gradients = self._unscaled(_touched(self.routing.paths, outcome.gradients), optimizer)
        return Half(gradients, outcome.losses, beside.metrics, beside.buffers, beside.written)

    def differentiated(
        self, evaluate: Evaluate, params: Mapping[str, Tensor], optimizer: Any, step: Tensor
    ) -> Differentiated:
        """The merged gradients of a forward that somebody else calls, in a compiler's trace."""
        seed = self._seed(optimizer)
        with torch.no_grad():
            outcome = self.engine.merged(evaluate, list(params.values()), self.routing, step, seed)
        gradients = self._unscaled(_touched(self.routing.paths, outcome.gradients), optimizer)
        return Differentiated(gradients, outcome.losses)

    def separately(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: Any, step: Tensor, batch: Any
    ) -> Half:
        """The same with each loss's weighted gradients apart, and their sums as the merged ones."""
        watch = self.evaluation.watch(params)
        outcome = self._run(self.engine.separate, params, buffers, optimizer, step, batch, watch)
        beside: Beside = outcome.rest or NOTHING
        _check_beside(outcome.losses, beside, params)
        pairs = zip(self.routing.losses, outcome.gradients, strict=True)
        rows = {loss: self._unscaled(_touched(self.routing.paths, row), optimizer) for loss, row in pairs}
        merged: dict[str, Tensor] = {}
        for row in rows.values():
            merged |= {path: plus(merged[path], g) if path in merged else g for path, g in row.items()}
        return Half(merged, outcome.losses, beside.metrics, beside.buffers, beside.written, rows)

    def _run(
        self,
        differentiate: Callable[..., Gave],
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        optimizer: Any,
        step: Tensor,
        batch: Any,
        watch: Watch | None,
    ) -> Gave:
        """What an engine gives, with the state's tensors in the module until it is done."""
        finally_do: list[Callable[[], None]] = []
        try:
            with torch.no_grad():  # whatever requires grad around a step, it carries no graph
                return differentiate(
                    lambda leaves: self.evaluation.call(leaves, buffers, batch, finally_do, watch),
                    self.evaluation.leaves(params),
                    self.routing,
                    step,
                    self._seed(optimizer),
                )
        finally:
            for end in finally_do:
                end()

    def optimize(
        self, gradients: Mapping[str, Tensor], optimizer: Any, params: Mapping[str, Tensor], step: Tensor
    ) -> Any:
        """Overwrite the parameters that have a gradient, and return the optimizer's new state.

        Everything that can fail comes before the first write.

        Args:
            gradients: by path, touched parameters only.
            optimizer: the optimizer's state, which may be overwritten.
            params: path -> tensor, at least all routed parameters.
            step: the number of steps taken so far, 0-d int64.
        """
        own = {path: params[path] for path in self.evaluation.plan.routed}
        if self.transform.in_place is not None:
            commit = self.transform.in_place(gradients, optimizer, own, step=step)
            return commit()
        updates, optimizer = self.transform.update(gradients, optimizer, own, step=step)
        present = {path: update for path, update in updates.items() if update is not None}
        problems = [
            f"{path}: the update has shape {tuple(update.shape)}, the parameter "
            + (f"has shape {tuple(own[path].shape)}" if path in own else "is not among those that may be updated")
            for path, update in present.items()
            if path not in own or update.shape != own[path].shape
        ]
        if problems:
            raise ValueError("\n".join(["the optimizer's updates do not fit the parameters:", *problems]))
        for path, update in apart(present, own.values()).items():
            own[path].add_(update)
        return optimizer

    def _seed(self, optimizer: Any) -> Tensor | None:
        """The cotangent that every loss starts with; None is one."""
        return None if self.loss_scale is None else scale_in(optimizer)

    def _unscaled(self, gradients: dict[str, Tensor], optimizer: Any) -> dict[str, Tensor]:
        return gradients if self.loss_scale is None else unscale(gradients, scale_in(optimizer))

    def _refuse_other_leaves(self, found: Sequence[OtherLeaf], params: Mapping[str, Tensor]) -> None:
        """Refuse losses whose graph ends in the module's own parameters, where the state's should be."""
        if not found:
            return
        own = {id(tensor): path for path, tensor in self.evaluation.functional.present_parameters().items()}
        named = [(own[id(leaf.tensor)], leaf) for leaf in found if id(leaf.tensor) in own]
        raise_misuse(
            parameter_problem(path, leaf.losses)
            for path, leaf in named
            if path not in self.evaluation.unrouted or memory_of(params[path]) != memory_of(leaf.tensor)
        )
        stale = by_memory(params)  # what stood for a parameter in an earlier step is in its memory still
        raise_misuse(
            earlier_step_problem(stale[memory], leaf.losses)
            for leaf in found
            if leaf.is_old and id(leaf.tensor) not in own and (memory := memory_of(leaf.tensor) or 0) in stale
        )


def not_sharing(metrics: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """The metrics, with those that share memory with a parameter copied: the step is about to overwrite parameters."""
    if not metrics:
        return {}
    memories = {memory_of(param) for param in params} - {None}

    def shares(metric: Tensor) -> bool:
        return memory_of(metric) in memories

    def copied(metric: Tensor) -> Tensor:
        return metric.clone() if shares(metric) else metric

    return {name: exchanged(metric, copied, shares, "memory of a parameter") for name, metric in metrics.items()}


def _touched(paths: Sequence[str], gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {path: gradient for path, gradient in zip(paths, gradients, strict=True) if gradient is not None}


def _check_beside(losses: Mapping[str, Tensor], beside: Beside, params: Mapping[str, Tensor]) -> None:
    raise_misuse(
        form_problem(path, params[path], value)
        for path, value in beside.written.items()
        if form_of(value) != form_of(params[path])
    )
    _check_names(losses, beside.metrics)


def _check_names(losses: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> None:
    if clash := losses.keys() & metrics.keys():
        raise RouteError(
            f"{', '.join(sorted(clash))}: both a loss and a metric have this name, and the step returns both; rename "
            "the metric"
        )
