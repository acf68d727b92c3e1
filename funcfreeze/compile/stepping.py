"""The compiled step as a Step holds it: whole, and in its two halves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import optree
from torch import Tensor

from funcfreeze.compile.compiled import Compilation, Run
from funcfreeze.compile.layout import Listed
from funcfreeze.compile.options import Options
from funcfreeze.compile.through import Through, WalksInside
from funcfreeze.compile.updated import CompiledUpdate, refuse_sparse
from funcfreeze.computation.half import Half
from funcfreeze.computation.merging import after_meeting, told
from funcfreeze.computation.microbatches import Shares
from funcfreeze.computation.sharing import WithShared
from funcfreeze.computation.state import Fields, Lease, State, known_count, lease_of, listing_of, make_state
from funcfreeze.computation.targets import Moves, move
from funcfreeze.computation.updating import Updating
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.merge.deciding import Met
from funcfreeze.model.ties import tied
from funcfreeze.optim import Transform


class CompiledStep:
    """A step of which the forward, the backward and the update are one graph, or two.

    Args:
        updating: how states follow one another.
        options: how to compile.
    """

    def __init__(self, updating: Updating, options: Options) -> None:
        self.options = options
        self._updating = updating
        computation, donate = updating.computation, updating.donate
        self._whole = Compilation(computation, options, donate)
        self._parts: Compilation | None = None
        self._for_eager: set[tuple[Any, ...]] = set()
        self._gradients = Compilation(replace(computation, transform=_GIVE_BACK, finite=None), options, donate=False)
        self._update = CompiledUpdate(computation, options, donate)

    @property
    def traces(self) -> int:
        """How many graphs have been traced and compiled so far."""
        parts = 0 if self._parts is None else self._parts.traces
        return self._whole.traces + self._gradients.traces + parts + self._update.traces

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStep:
        return CompiledStep(copy.deepcopy(self._updating, memo), self.options)

    def step(self, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        """Take a step, which overwrites the tensors of the state or copies of them."""
        routing, moves = self._updating.computation.at(state).routing, self._updating.moving(state)
        with grad_mode(False), self._taken(state) as (fields, listed):
            metrics, run = self._whole(routing, listed, batch)
            losses = {name: metrics[name] for name in routing.losses if name in metrics}
            after, own = self._after(state, fields, listed, run, losses, moves)
            return after, {**metrics, **own}

    def compute(self, state: State, batch: Any) -> Half:
        """The first half of a step."""
        return self._half(self._gradients, state, batch)

    def compute_part(self, state: State, part: Any, shares: Shares) -> Half:
        """The same of a part of a batch, whose losses have these shares in their means: always the same tensors."""
        if self._parts is None:
            computation = replace(self._updating.computation, transform=_GIVE_BACK, finite=None, shares=shares)
            self._parts = Compilation(computation, self.options, donate=False)
        return self._half(self._parts, state, part)

    def compute_through(self, state: State, batch: WithShared) -> Half | None:
        """The first half of a step that walks through what is shared, or None if that is for eager code."""
        computation = self._updating.computation.at(state)
        is_plain = computation.loss_scale is None and not computation.evaluation.functional.parameter_hooks()
        through = Through.of(batch, computation.routing) if is_plain else None
        if through is None or through.key in self._for_eager:
            return None
        try:
            half = self._half(self._gradients, state, batch, through)
        except WalksInside:
            self._for_eager.add(through.key)
            return None
        functional, buffers = computation.evaluation.functional, state.fields[1]
        copies = {path: tensor if path in functional.constants else tensor.clone() for path, tensor in buffers.items()}
        with functional.holding(batch.held(state.params), copies):  # for what is computed once more
            gradients = through.walked(half.gradients)
        return half.replace(gradients=tied(gradients, self._updating.specification.tied_params))

    def _half(self, compilation: Compilation, state: State, batch: Any, through: Through | None = None) -> Half:
        routing = self._updating.computation.at(state).routing
        with grad_mode(False):
            params, buffers, optimizer, step = state.fields
            constants = self._updating.computation.evaluation.functional.constants
            apart = {path: buffer if path in constants else buffer.clone() for path, buffer in buffers.items()}
            others = {} if through is None else through.tensors
            own = {path: tensor.detach() for path, tensor in {**params, **others}.items()}
            metrics, run = compilation(routing, Listed.of(own, apart, optimizer, step), batch, through)
            for name in told(run.met):
                del metrics[name]
        specification, given_back = self._updating.specification, run.optimizer
        assert isinstance(given_back, _GivenBack)
        return Half(
            tied(given_back.gradients, specification.tied_params),
            {name: metrics.pop(name) for name in routing.losses if name in metrics},
            metrics,
            tied(
                {path: run.buffers.get(path, buffer) for path, buffer in apart.items() if path not in constants},
                specification.tied_buffers,
            ),
            dict(run.params),
            run.rows,
            run.met,
        )

    def apply(self, state: State, half: Half) -> tuple[State, dict[str, Any]]:
        """The second half of a step: the new state, and all metrics."""
        moves = self._updating.moving(state)
        with grad_mode(False), self._taken(state) as (fields, listed):
            metrics = {**half.losses, **self._updating.metrics(state, half), **told(half.met)}
            optimizer, measured, found, skip = self._update(listed, half.gradients, half.losses)
            optimizer = self._with_rules(fields[2], optimizer, listed, half.met, skip)
            buffers = listed.overwritten(listed.unless_skipped(half.buffers, found))
            written = half.written if found is None else found.kept("parameter", state.params, half.written)
            run = Run([], buffers, written, optimizer, measured, [], found)
            after, own = self._after(state, fields, listed, run, half.losses, moves)
            return after, {**metrics, **measured, **own}

    def _with_rules(self, before: Any, after: Any, listed: Listed, met: Mapping[str, Met], skip: Tensor | None) -> Any:
        """The optimizer's state after an update with what merge rules keep; None if all was overwritten in place."""
        now = before if after is None else after
        is_scaled = self._updating.computation.loss_scale is not None
        new = after_meeting(now, met, skip, is_scaled=is_scaled)
        return after if new is now else listed.layout.written(before, new)

    @contextmanager
    def _taken(self, state: State) -> Iterator[tuple[Fields, Listed]]:
        """A state's fields, whose tensors may be overwritten, with the optimizer's state fresh where it is to be.

        That is written in place where it fits, for the sake of graphs that count on addresses, and undone by an error.
        """
        listed = listing_of(state)
        if isinstance(listed, Listed) and self._updating.donate and self._updating.owns(lease_of(state)):
            fields = state.fields
        else:
            fields = self._updating.owned(state)
            listed = Listed.of(*fields)
        params, buffers, optimizer, step = fields
        fresh = self._updating.renewed(optimizer, params, state)
        if fresh is optimizer:
            yield fields, listed
            return
        kept = [tensor.clone() for tensor in _tensors(optimizer)]
        renewed = listed.layout.written(optimizer, fresh)
        try:
            if renewed is None:
                yield fields, listed
            else:
                yield (fields := (params, buffers, renewed, step)), Listed.of(*fields)
        except BaseException:
            for tensor, before in zip(_tensors(optimizer), kept, strict=True):
                tensor.copy_(before)
            raise

    def _after(
        self, state: State, fields: Fields, listed: Listed, run: Run, losses: Mapping[str, Tensor], moves: Moves
    ) -> tuple[State, dict[str, Tensor]]:
        """The state after a run that overwrote these fields as far as they could be, and the step's own metrics.

        The twins move here. In the graph they would have it compiled once more for the steps in which some rest.
        """
        updating, lease = self._updating, lease_of(state)
        finite, found = updating.computation.finite, run.found
        if finite is not None and found is not None:
            finite.refuse(found, losses, state.step)
        params, buffers, optimizer, step = fields
        step.add_(1)
        unrouted = updating.computation.evaluation.unrouted
        new = {path: value for path, value in run.params.items() if path in lease.borrowed or not updating.donate}
        for path in run.params.keys() - new.keys():
            params[path].copy_(run.params[path])
        if moves:
            left = {**buffers, **run.buffers}
            run = run._replace(buffers={**run.buffers, **move(moves, left, {**params, **new}, left, found)})
        if updating.donate:
            lease.spent = True
        else:
            lease.borrowed |= unrouted
        renewed = Lease(borrowed=(lease.borrowed & unrouted) - new.keys(), gradients=run.gradients)
        is_in_place = run.optimizer is None and not run.buffers and not new
        named = updating.specification.named(
            (
                {**params, **new} if new else params,
                {**buffers, **run.buffers} if run.buffers else buffers,
                optimizer if run.optimizer is None else run.optimizer,
                step,
            )
        )
        listing = listed if is_in_place else None
        after = make_state(named, renewed, updating.specification, listing, known_count(state, 1))
        return after, {} if found is None else found.metrics


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class _GivenBack(NamedTuple):
    """Gradients in the place of an optimizer's state."""

    gradients: dict[str, Tensor]


def _give_back(
    grads: Mapping[str, Tensor], state: object, params: object, *, step: object = None
) -> Callable[[], _GivenBack]:
    refuse_sparse(grads)
    return lambda: _GivenBack(dict(grads))


_GIVE_BACK = Transform(lambda params: (), lambda grads, state, params: (grads, state), _give_back)
"""In the optimizer's place: it moves nothing."""
