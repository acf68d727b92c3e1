"""How one state goes through the members of an alternation: each member sees of it what a lone step would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcfreeze.compile.layout import Listed
from funcfreeze.computation.adoption import Adoption
from funcfreeze.computation.back_door import form_of
from funcfreeze.computation.specification import check_fits
from funcfreeze.computation.state import (
    Fields,
    Lease,
    State,
    Whole,
    count_of,
    known_count,
    known_to_fit,
    lease_of,
    listing_of,
    make_state,
    renew,
)
from funcfreeze.computation.updating import apart_from, copied_leaf, owned
from funcfreeze.declare.timing import Timing
from funcfreeze.optim.skip import choose
from funcfreeze.optim.transform import lines
from funcfreeze.step import Step


class Noted(NamedTuple):
    """What an alternation notes of a state that it makes.

    Attributes:
        counts: member -> the number of its steps, where nobody has to ask the device for it.
        listings: member -> its tensors as its compiled step knows them; empty where they are to be listed anew.
    """

    counts: Mapping[str, int | None]
    listings: Mapping[str, Listed]


@dataclass(frozen=True)
class Progress:
    """A state under way through a call.

    Attributes:
        calls: the number of calls before this one.
        counts: member -> the number of its steps, where it is known.
        params: path -> tensor.
        buffers: path -> tensor, those of targets among them.
        optimizers: member -> its optimizer's state.
        step: the count of calls, on the device.
        clocks: member -> the count of its steps.
        lease: who may write to the tensors.
        listings: member -> its tensors as its compiled step knows them.
        ran: the members that ran.
    """

    calls: int
    counts: Mapping[str, int | None]
    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizers: Mapping[str, Any]
    step: Tensor
    clocks: Mapping[str, Tensor]
    lease: Lease
    listings: Mapping[str, Listed]
    ran: tuple[str, ...] = ()

    def after(self, name: str, state: State) -> Progress:
        """After a member's step, which left this state."""
        is_in_place = self.listings.get(name) is not None and listing_of(state) is self.listings[name]
        return replace(
            self,
            params=state.params,
            buffers=state.fields[1],
            optimizers={**self.optimizers, name: state.optimizer},
            clocks={**self.clocks, name: state.step},
            counts={**self.counts, name: known_count(state)},
            lease=lease_of(state),
            listings=self.listings if is_in_place else {},
            ran=(*self.ran, name),
        )


@dataclass(frozen=True, eq=False)
class Members:
    """The members, and the states that go through them.

    Attributes:
        steps: by name, in the order in which they run.
        turns: when each runs.
        donate: whether a call may overwrite the state that it is given.
    """

    steps: Mapping[str, Step]
    turns: Mapping[str, Timing]
    donate: bool

    def on_turn(self, calls: int) -> Iterator[str]:
        """The members whose turn it is."""
        return (name for name, turns in self.turns.items() if calls in turns.counts)

    def begun(self, base: State, states: Mapping[str, State], copy: bool) -> State:
        """The first state: parameters and buffers of one, optimizers and clocks of all.

        Args:
            base: the state that a member alone would begin with.
            states: by member, with parameters in the module's memory.
            copy: whether parameters that some member may update are copied.
        """
        routed = self._routed
        own = base.params.keys() - lease_of(base).borrowed
        params = {
            path: tensor.clone() if copy and path in routed and path not in own else tensor
            for path, tensor in base.params.items()
        }
        optimizers = {name: apart_from(params, state.optimizer) for name, state in states.items()}
        clocks = {name: state.step for name, state in states.items()}
        fields = self._first.specification.named((params, base.fields[1], optimizers, base.step))
        lease = Lease(borrowed=params.keys() - routed if copy else set())
        noted = Noted({name: known_count(state) for name, state in states.items()}, {})
        return make_state((*fields, clocks), lease, self, noted, known_count(base))

    def start(self, state: State) -> Progress:
        """What a call begins with. Nothing of the state is changed.

        Raises:
            TypeError, ValueError, RuntimeError: the state does not fit; tells everything that does not, by member.
        """
        state = self._checked(state)
        noted, lease = listing_of(state), lease_of(state)
        counts, listings = noted if isinstance(noted, Noted) else ({}, {})
        lease.gradients = ()
        private = Lease(borrowed=set(lease.borrowed), borrowed_optimizer=lease.borrowed_optimizer)
        params, buffers, optimizers, step = state.fields
        return Progress(count_of(state), counts, params, buffers, optimizers, step, state.clocks, private, listings)

    def owned(self, progress: Progress) -> Progress:
        """With what members are going to overwrite owned; for compiled ones listed, the same tensors for each."""
        lease = progress.lease
        if not self.donate:
            return progress
        if not self._compiled:
            if not lease.borrowed_optimizer:
                return progress
            own = {name: optree.tree_map(copied_leaf, kept) for name, kept in progress.optimizers.items()}
            return replace(progress, optimizers=own, lease=Lease(borrowed=lease.borrowed))
        if progress.listings and not lease.borrowed_optimizer and lease.borrowed.isdisjoint(self._routed):
            return progress
        copied = lease.borrowed & self._routed
        fields = progress.params, progress.buffers, progress.optimizers, progress.step
        named = owned(fields, copied, lease.borrowed_optimizer)
        clocks = {name: clock.clone() for name, clock in progress.clocks.items()}
        listings = {
            name: Listed.of(named[0], named[1], named[2][name], clocks[name])
            for name, member in self.steps.items()
            if member.compiled is not None
        }
        renewed = Lease(borrowed=lease.borrowed - copied)
        return replace(progress, **_named(named), clocks=clocks, lease=renewed, listings=listings)

    def moved(self, before: Progress, after: Progress) -> tuple[Progress, dict[str, Tensor]]:
        """After something that left other buffers, and what these were.

        Compiled members take tensors that stay where they are, so these buffers are written over the others.
        """
        if after is before:
            return after, {}
        new = {path: value for path, value in after.buffers.items() if value is not before.buffers[path]}
        if not before.listings or any(form_of(value) != form_of(before.buffers[path]) for path, value in new.items()):
            return replace(after, listings={}), {path: before.buffers[path] for path in new}
        kept = {path: before.buffers[path].clone() for path in new}
        for path, value in new.items():
            before.buffers[path].copy_(value)

        listings = before.listings if after.params is before.params else {}
        return replace(after, buffers=before.buffers, listings=listings), kept

    def undone(self, before: Progress, kept: Mapping[str, Tensor]) -> None:
        """Write back what `moved` has written over."""
        for path, value in kept.items():
            if before.buffers[path] is not value:
                before.buffers[path].copy_(value)

    def unless(self, skipped: Sequence[Tensor], progress: Progress, kept: Mapping[str, Tensor]) -> Progress:
        """With these buffers as they were, if all of these steps were skipped; nothing waits for the device."""
        found = torch.stack([*skipped]).all().to(torch.float32)
        new = {path: choose(found, old, progress.buffers[path], f"buffer {path}") for path, old in kept.items()}
        if not progress.listings:
            return replace(progress, buffers={**progress.buffers, **new})
        for path, value in new.items():
            progress.buffers[path].copy_(value)
        return progress

    def seen_by(self, name: str, progress: Progress) -> State:
        """What a member sees of the state, the tensors of targets among its buffers, as it computes with them."""
        own = progress.params, progress.buffers, progress.optimizers[name], progress.clocks[name]
        listed, count = progress.listings.get(name), progress.counts.get(name)
        return make_state(own, progress.lease, self.steps[name].specification, listed, count)

    def fields(self, progress: Progress, step: Tensor) -> Whole:
        """The fields of the alternation's state.

        Args:
            progress: after some of the members.
            step: the count of calls.
        """
        own = progress.params, progress.buffers, dict(progress.optimizers), step
        named: Any = self._first.specification.named(own)
        return (*named, dict(progress.clocks))

    @contextmanager
    def telling(self, name: str, state: State, progress: Progress) -> Iterator[None]:
        """Inside, what a member raises is noted to be its, and the state goes on with what the others made."""
        try:
            yield
        except BaseException as error:  # an interrupt too: their tensors are overwritten already
            made = ""
            if self.donate and progress.ran:
                lease_of(state).spent = True  # for all who share its tensors
                renew(state, self.fields(progress, progress.step), progress.lease, self, progress.calls)
                made = f"; the state that was passed in holds what {', '.join(progress.ran)} made, and is not spent"
            error.add_note(f"raised by the member {name!r} of an alternation{made}")
            raise

    def ended(self, state: State, progress: Progress, counted: bool = True) -> State:
        """The state that a call returns.

        Args:
            state: the one that was passed in.
            progress: after all members.
            counted: whether it was a call, in which members took their turns.
        """
        calls, step = progress.calls + counted, progress.step
        if counted:
            with torch.inference_mode(False), torch.no_grad():
                step = step + 1
        lease = progress.lease
        if not progress.ran:
            lease = lease_of(state)  # nothing was copied: the two are spent together
        elif self.donate:
            lease_of(state).spent = True
        else:  # what no member that ran may update both states hold now: neither may write to it
            updated = {path for name in progress.ran for path in self.steps[name].plan.routed}
            shares_optimizer = len({*progress.ran}) < len(self.steps)
            for one in (lease_of(state), lease):
                one.borrowed |= progress.params.keys() - updated
                one.borrowed |= self._first.functional.constants.keys()
                one.borrowed_optimizer |= shares_optimizer
        return make_state(self.fields(progress, step), lease, self, Noted(progress.counts, progress.listings), calls)

    def adopted(self, state: State) -> tuple[State, Adoption]:
        """Another state taken over, member by member."""
        parts = {name: step.adopt(_of_member(state, name)) for name, step in self.steps.items()}
        states = {name: taken for name, (taken, _) in parts.items()}
        first = next(iter(states.values()))
        optimizers = {name: taken.optimizer for name, taken in states.items()}
        clocks = {name: taken.step.clone() for name, taken in states.items()}
        told = [_by_member(name, adoption, name == next(iter(parts))) for name, (_, adoption) in parts.items()]
        others = tuple(f"optimizer.{name}" for name in state.clocks if name not in self.steps)
        alone = () if state.clocks else ("optimizer",)
        adoption = Adoption(
            tuple(line for one in told for line in one.kept),
            tuple(line for one in told for line in one.afresh),
            (*(line for one in told for line in one.left), *others, *alone),
        )
        fields: Whole = first.params, first.buffers, optimizers, state.step.clone(), first.targets, clocks
        return make_state(fields, lease_of(first), self), adoption

    @cached_property
    def _first(self) -> Step:
        return next(iter(self.steps.values()))

    @cached_property
    def _compiled(self) -> bool:
        return any(member.compiled is not None for member in self.steps.values())

    @cached_property
    def _routed(self) -> set[str]:
        return {path for step in self.steps.values() for path in step.plan.routed}

    def _checked(self, state: object) -> State:
        """The state, if it fits all members."""
        if not isinstance(state, State):
            return check_fits(state, self._first.specification)  # says what it is
        clocks = state.clocks  # raises if the state is spent
        if known_to_fit(state) is self:
            return state
        problems = [*self._problems(state)]
        if problems:
            raise ValueError(lines("this State is not the alternation's:", problems))
        optimizers, told = {}, []
        for name, member in self.steps.items():
            fields = state.params, state.buffers, state.optimizer[name], clocks[name], state.targets
            try:
                optimizers[name] = check_fits(make_state(fields, lease_of(state)), member.specification).optimizer
            except ValueError as error:
                told.append(f"member {name!r}: {error}")
        if told:
            raise ValueError(lines("this State is not the alternation's:", told))
        whole = state.params, state.buffers, optimizers, state.step, state.targets, clocks
        return make_state(whole, lease_of(state), self)

    def _problems(self, state: State) -> Iterator[str]:
        """What is wrong with a state before any member looks at it."""
        kept = state.optimizer if isinstance(state.optimizer, dict) else {}
        if not state.clocks:
            yield ("it has no clocks: it is a lone Step's. alternation.adopt(state) takes it over as far as it fits")
            return
        for field, names in (("clocks", state.clocks), ("optimizer", kept)):
            yield from (f"{field}[{name!r}]: the State does not have it" for name in self.steps if name not in names)
            yield from (f"{field}[{name!r}]: no member is called so" for name in names if name not in self.steps)
        if missing := [name for name in self._first.specification.targets if name not in state.targets]:
            yield (
                f"targets: the members have {', '.join(missing)}, the State does not, since it was made before they "
                "were declared; alternation.adopt(state) makes them"
            )


def _named(fields: Fields) -> dict[str, Any]:
    return dict(zip(("params", "buffers", "optimizers", "step"), fields, strict=True))


def _of_member(state: State, name: str) -> State:
    """What a state has for a member, as a lone step's: of another's optimizer nothing."""
    has = name in state.clocks
    optimizer = state.optimizer[name] if has else {}
    clock = state.clocks[name] if has else torch.zeros_like(state.step)
    return make_state((state.params, state.buffers, optimizer, clock, state.targets), lease_of(state))


def _by_member(name: str, adoption: Adoption, is_first: bool) -> Adoption:
    """What became of a member's part: what is of the optimizer by its name, what is of the model once."""

    def told(lines: Sequence[str]) -> tuple[str, ...]:
        own = (line.replace("optimizer.", f"optimizer.{name}.", 1) for line in lines if line.startswith("optimizer"))
        return (*(line for line in lines if is_first and not line.startswith("optimizer")), *own)

    return Adoption(told(adoption.kept), told(adoption.afresh), told(adoption.left))
