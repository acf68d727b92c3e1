"""What a step computes, on plain tensors: losses and merged gradients, then the update. Eager and traced alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from funcfreeze.computation.finite import Finite, Found
from funcfreeze.computation.half import Half
from funcfreeze.computation.loss_scale import LossScale, scale_in, unscale
from funcfreeze.computation.merging import states_in
from funcfreeze.computation.microbatches import Shares, times
from funcfreeze.computation.sharing import WithShared
from funcfreeze.computation.state import State, count_of
from funcfreeze.declare.names import OWN, own_name_problems
from funcfreeze.declare.plan import raise_problems
from funcfreeze.gradients import Engine, Routing, Timetable
from funcfreeze.gradients.law import Evaluate, OtherLeaf, Outcome, SeparateOutcome
from funcfreeze.gradients.meeting import Apart, meet
from funcfreeze.gradients.returned import check_losses, exchanged
from funcfreeze.gradients.sums import plus
from funcfreeze.merge.deciding import Met
from funcfreeze.model.memory import memory_of
from funcfreeze.model.watching import Watch, by_memory
from funcfreeze.optim import Transform
from funcfreeze.optim.reals import add_
from funcfreeze.optim.skip import find_non_finite, update_unless
from funcfreeze.optim.transform import apart, in_place_options

Gave = TypeVar("Gave", Outcome, SeparateOutcome)


class Differentiated(NamedTuple):
    """Merged gradients by path, touched parameters only, and the present losses by name, detached and unweighted.

    Of a part of a batch `rows` are, for each loss, what rules are to be shown of it; else `met` is what they were.
    """

    gradients: dict[str, Tensor]
    losses: Mapping[str, Tensor]
    rows: Mapping[str, Mapping[str, Tensor]]
    met: Mapping[str, Met]


class Optimized(NamedTuple):
    """What an update gives.

    Attributes:
        optimizer: the optimizer's new state.
        measured: what it has measured, as metrics.
        found: what is not finite, if that is looked for.
        skip: whether the step is skipped, 0-d, where merge rules that keep a state have to know.
    """

    optimizer: Any
    measured: Mapping[str, Tensor]
    found: Found | None
    skip: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Computation:
    """The user's losses over a model, differentiated by an engine and handed to an optimizer.

    Attributes:
        evaluation: the losses over the model.
        timetable: which loss may update which parameters, at every count.
        engine: what differentiates.
        transform: the optimizer, with the loss scale around it.
        loss_scale: what every loss starts its backward with, if anything but 1.
        finite: what has to be finite, if anything has to.
        shares: what losses are multiplied with for their gradients, where a batch comes in parts.
        now: which loss may update which parameters at the count that this is for; None where routes are not timed.
    """

    evaluation: Evaluation
    timetable: Timetable
    engine: Engine
    transform: Transform
    loss_scale: LossScale | None
    finite: Finite | None = None
    shares: Shares | None = None
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
        watch = self.evaluation.watch(params, buffers) if watched else None
        outcome, losses = self._run(self.engine.merged, params, buffers, optimizer, step, batch, watch)
        beside: Beside = outcome.rest or NOTHING
        self._refuse_other_leaves(outcome.other_leaves, params)
        _check_beside(losses, beside, params)
        gradients = self._unscaled(_touched(self.routing.paths, outcome.gradients), optimizer)
        rows = self._rows(outcome.apart, optimizer)
        half = Half(gradients, losses, beside.metrics, beside.buffers, beside.written, rows, outcome.met)
        return self.met(half, optimizer, step) if self.shares is None else half

    def differentiated(
        self, evaluate: Evaluate, params: Mapping[str, Tensor], optimizer: Any, step: Tensor
    ) -> Differentiated:
        """The merged gradients of a forward that somebody else calls, in a compiler's trace."""
        seed, part = self._seed(optimizer), PartOfBatch(self.routing, self.shares)
        with torch.no_grad():
            outcome = self.engine.merged(part.weighted(evaluate), list(params.values()), self.routing, step, seed)
        gradients = self._unscaled(_touched(self.routing.paths, outcome.gradients), optimizer)
        rows, losses = self._rows(outcome.apart, optimizer), part.unweighted(outcome.losses)
        if self.shares is not None:
            return Differentiated(gradients, losses, rows, {})
        half = self.met(Half(gradients, losses, {}, {}, {}, rows, outcome.met), optimizer, step)
        return Differentiated(dict(half.gradients), losses, {}, half.met)

    def separately(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: Any, step: Tensor, batch: Any
    ) -> Half:
        """The same with each loss's weighted gradients apart, and their sums as the merged ones."""
        watch = self.evaluation.watch(params, buffers)
        outcome, losses = self._run(self.engine.separate, params, buffers, optimizer, step, batch, watch)
        beside: Beside = outcome.rest or NOTHING
        _check_beside(losses, beside, params)
        pairs = zip(self.routing.losses, outcome.gradients, strict=True)
        rows = {loss: self._unscaled(_touched(self.routing.paths, row), optimizer) for loss, row in pairs}
        ruled = {self.routing.paths[leaf] for leaf in self.routing.ruled}
        merged: dict[str, Tensor] = {}
        for row in rows.values() if outcome.crossed is None else ():
            summed = {path: g for path, g in row.items() if path not in ruled}
            merged |= {path: plus(merged[path], g) if path in merged else g for path, g in summed.items()}
        met: Mapping[str, Met] = {}
        if outcome.crossed is not None:
            met = outcome.crossed.met
            merged = self._unscaled(_touched(self.routing.paths, outcome.crossed.gradients), optimizer)
        half = Half(merged, losses, beside.metrics, beside.buffers, beside.written, rows, met)
        return self.met(half, optimizer, step, keeps_rows=True) if self.shares is None else half

    def met(self, half: Half, optimizer: Any, step: Tensor, *, keeps_rows: bool = False) -> Half:
        """A half with what the merge rules make of the losses' gradients where they meet.

        Args:
            half: with each loss's gradients, at least where a rule decides, in `per_loss`.
            optimizer: the optimizer's state, which rules have theirs beside.
            step: the number of steps taken so far.
            keeps_rows: whether the losses' gradients were asked for.
        """
        routing = self.routing
        if not routing.places:
            return half
        leaf = {routing.paths[index]: index for index in routing.ruled}
        apart = [
            {leaf[path]: g for path, g in half.per_loss.get(loss, {}).items() if path in leaf}
            for loss in routing.losses
        ]
        states = states_in(optimizer, is_scaled=self.loss_scale is not None)
        kept = half.per_loss if keeps_rows else {}
        found = half.replace(per_loss=kept)
        del half  # rules let go of the gradients they have read
        with torch.no_grad():
            merged, met = meet(routing, apart, found.losses, step, states)
        both = {**found.gradients, **{routing.paths[index]: gradient for index, gradient in merged.items()}}
        return found.replace(
            gradients={path: both[path] for path in routing.paths if path in both}, met={**found.met, **met}
        )

    def _rows(self, apart: Apart, optimizer: Any) -> dict[str, dict[str, Tensor]]:
        """For each loss the gradients that were kept apart, by path."""
        paths = self.routing.paths
        return {
            loss: self._unscaled({paths[leaf]: gradient for leaf, gradient in row.items()}, optimizer)
            for loss, row in zip(self.routing.losses, apart, strict=False)
        }

    def _run(
        self,
        differentiate: Callable[..., Gave],
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        optimizer: Any,
        step: Tensor,
        batch: Any,
        watch: Watch | None,
    ) -> tuple[Gave, Mapping[str, Tensor]]:
        """What an engine gives, with the state's tensors in the module until it is done; and the losses."""
        finally_do: list[Callable[[], None]] = []
        routing = batch.in_routing(self.routing) if isinstance(batch, WithShared) else self.routing
        part = PartOfBatch(routing, self.shares)
        try:
            with torch.no_grad():  # whatever requires grad around a step, it carries no graph
                outcome = differentiate(
                    part.weighted(lambda leaves: self.evaluation.call(leaves, buffers, batch, finally_do, watch)),
                    self.evaluation.leaves(params),
                    routing,
                    step,
                    self._seed(optimizer),
                )
                return outcome, part.unweighted(outcome.losses)
        finally:
            for end in finally_do:
                end()

    def optimize(
        self,
        gradients: Mapping[str, Tensor],
        optimizer: Any,
        params: Mapping[str, Tensor],
        step: Tensor,
        lost: Tensor | None = None,
    ) -> Optimized:
        """Overwrite the parameters that have a gradient, unless the step is skipped.

        Everything that can fail comes before the first write.

        Args:
            gradients: by path, touched parameters only.
            optimizer: the optimizer's state, which may be overwritten.
            params: path -> tensor, at least all routed parameters.
            step: the number of steps taken so far, 0-d int64.
            lost: whether one of the losses is not finite (see `finite.lost`), where that is looked at.
        """
        own = {path: params[path] for path in self.evaluation.plan.routed}
        found = None
        measured: dict[str, Tensor] = {}
        if self.finite is not None and lost is not None:
            found = self.finite.look(gradients, lost, step.device)
        skip = None if found is None else found.skip
        told = skip if skip is not None or self.loss_scale is None else self._overflow(gradients, optimizer)
        for_scale = {} if found is None or self.loss_scale is None else {"found": found}
        transform = self.transform
        if transform.measuring is not None:
            transform = transform.measuring(lambda name, value: _note(measured, name, value))
        if transform.in_place is not None:
            options = {"step": step, **for_scale} if for_scale else in_place_options(step, skip)
            commit = transform.in_place(gradients, optimizer, own, **options)
            return Optimized(commit(), measured, found, told)
        if skip is None or for_scale:
            updates, optimizer = transform.update(gradients, optimizer, own, step=step, **for_scale)
        else:
            updates, optimizer = update_unless(skip, transform, gradients, optimizer, own, step)
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
            add_(own[path], update)
        return Optimized(optimizer, measured, found, told)

    def _overflow(self, gradients: Mapping[str, Tensor], optimizer: Any) -> Tensor | None:
        """Whether a loss scale skips the step, for rules that keep a state."""
        if not gradients or not states_in(optimizer, is_scaled=True):
            return None
        return find_non_finite(gradients.values(), scale_in(optimizer).device)

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


@dataclass(frozen=True, eq=False)
class PartOfBatch:
    """The losses of a part of a batch, whose gradients are a part of the whole batch's.

    Attributes:
        routing: names the losses.
        shares: loss -> its weight in this part; None where the batch is whole.
        seen: the losses without their weights.
    """

    routing: Routing
    shares: Shares | None
    seen: dict[str, Tensor] = field(default_factory=dict)

    def weighted(self, evaluate: Evaluate) -> Evaluate:
        """The losses times their weights."""
        if self.shares is None:
            return evaluate
        shares = self.shares

        def times_shares(leaves: list[Tensor]) -> tuple[Any, Any]:
            returned, rest = evaluate(leaves)
            ordered = zip(self.routing.losses, check_losses(returned, self.routing), strict=True)
            losses = {name: times(loss, shares[name]) for name, loss in ordered}
            self.seen.update({name: returned[name].detach() for name, loss in losses.items() if loss is not None})
            return losses, rest

        return times_shares

    def unweighted(self, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The losses as they were, for those that an engine gives."""
        return losses if self.shares is None else {name: self.seen[name] for name in losses}


def _note(measured: dict[str, Tensor], name: str, value: Tensor) -> None:
    measured.setdefault(OWN + name, value)  # of several in a row the first has seen the gradients as they came


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
    clash = losses.keys() & metrics.keys()
    both = f"{', '.join(sorted(clash))}: both a loss and a metric have this name, and the step returns both; rename "
    raise_problems([*([f"{both}the metric"] if clash else []), *own_name_problems("metric", metrics)])
