"""Alternating training: members with optimizers, routes and clocks of their own, over one model and one State."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funcfreeze.alternating.members import Members, Progress
from funcfreeze.alternating.sharing import Sharing
from funcfreeze.computation.acting import Names
from funcfreeze.computation.adoption import Adoption
from funcfreeze.computation.beginning import begin
from funcfreeze.computation.finite import SKIPPED
from funcfreeze.computation.half import Half
from funcfreeze.computation.microbatches import Microbatches
from funcfreeze.computation.state import State, known_count, lease_of, make_state
from funcfreeze.declare.plans import Plans
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.model.attributes import attributes_kept
from funcfreeze.model.mapping import Model
from funcfreeze.step import Step

Compile = bool | Mapping[str, Any] | None


@dataclass(frozen=True, eq=False, repr=False)
class Alternation:
    """A step made of steps, as `alternate` builds it: `state, metrics = step(state, batch)`.

    Attributes:
        members: name -> `Step`, in the order in which they run.
        plan: member -> its `Plan`; printing it shows one table.
        engine: of all members.
        compile: of all members.
        donate: whether a call reuses the storage of the state it is given, which is spent then.
    """

    members: Mapping[str, Step]
    plan: Plans
    engine: str
    compile: Compile
    donate: bool
    _members: Members
    _sharing: Sharing | None

    def __repr__(self) -> str:
        return f"alternate({', '.join(self.members)}; engine={self.engine!r}, donate={self.donate})"

    def init(
        self,
        copy: bool = True,
        *,
        optimizer: Mapping[str, torch.optim.Optimizer] | None = None,
        step: int | None = None,
    ) -> State:
        """A state from the module's present values, with an optimizer state and a clock for each member.

        Args:
            copy: False adopts the module's storage, which steps then overwrite.
            optimizer: member -> a running optimizer of torch.optim over its parameters, whose state is taken. A member
                without one starts afresh.
            step: the number of calls taken so far, and of every member without a running optimizer the number of its
                steps at that call.

        Raises:
            ValueError: a running optimizer is not its member's; or there is no such member.
        """
        running = optimizer or {}
        self._known(running)
        turns = self._members.turns
        counts = {name: None if name in running or step is None else turns[name].before(step) for name in self.members}
        first = next(iter(self.members.values()))
        asked = [member.computation.evaluation.asked for member in self.members.values()]
        if self._sharing is not None:
            asked.append(self._sharing.evaluation.asked)
        if not any("targets" in names for names in asked):
            first.computation.evaluation.targets.warn_of_still_statistics(stacklevel=3)
        base = begin(first.computation, first.specification, copy, None, step)
        states = {
            name: begin(member.computation, member.specification, copy, running.get(name), counts[name])
            for name, member in self.members.items()
        }
        with grad_mode(False):
            return self._members.begun(base, states, copy)

    def __call__(self, state: State, batch: Any) -> tuple[State, dict[str, dict[str, Any]]]:
        """Run the members whose turn it is, one after another, each on the state that the one before left.

        Returns:
            The new state, and each member's metrics by its name; a member that did not run is absent.

        Raises:
            RuntimeError, ValueError, TypeError, RouteError: as a `Step` does. What a member raises has a note that
                names it. The state that was passed in then holds what the members before it made, and stays usable;
                with `donate=False` it is as it was.
        """
        with grad_mode(False):
            return self._called(state, batch)

    def _called(self, state: State, batch: Any) -> tuple[State, dict[str, dict[str, Any]]]:
        progress = self._members.start(state)
        metrics: dict[str, dict[str, Any]] = {}
        names = [*self._members.on_turn(progress.calls)]
        if self._sharing is not None:
            progress = self._members.owned(progress)
        given, after = self._given(progress, names, batch)
        before = progress
        progress, kept = self._members.moved(before, after)
        try:
            for name in names:
                progress = self._members.owned(progress)
                with self._members.telling(name, state, progress):
                    own, metrics[name] = self.members[name](self._members.seen_by(name, progress), given(name))
                progress = progress.after(name, own)
        except BaseException:
            if not progress.ran:
                self._members.undone(before, kept)
            raise
        skipped = [seen[SKIPPED] for name, seen in metrics.items() if kept and SKIPPED in seen and self._asks(name)]
        if skipped and len(skipped) == sum(map(self._asks, names)):  # what is shared came to nothing, then
            progress = self._members.unless(skipped, progress, kept)
        return self._members.ended(state, progress), metrics

    def _asks(self, name: str) -> bool:
        return self._sharing is not None and self._sharing.asks(name)

    def _given(self, progress: Progress, names: Sequence[str], batch: Any) -> tuple[Callable[[str], Any], Progress]:
        """What each member of a call is given as its batch, and the state after what they share was computed."""
        sharing = self._sharing
        if sharing is None or not any(map(sharing.asks, names)):
            return lambda name: batch, progress
        if isinstance(batch, Microbatches):
            raise ValueError(
                "what is shared is computed for a whole batch, and this one is Microbatches; leave shared= out, or "
                "give the batch whole"
            )
        states = {name: self._members.seen_by(name, progress) for name in names}
        shared, after = sharing.run(progress, states, batch)
        return lambda name: shared.given_to(name, batch) if sharing.asks(name) else batch, after

    def compute(self, state: State, batch: Any, *, member: str, per_loss: bool = False) -> Half:
        """The first half of a member's step, whether or not it is its turn; see `Step.compute`.

        What members share is computed for it alone.
        """
        one, progress = self._one(member), self._members.start(state)
        given, after = self._given(progress, [member], batch)
        half = one.compute(self._members.seen_by(member, after), given(member), per_loss=per_loss)
        written = {path: tensor for path, tensor in after.params.items() if tensor is not progress.params[path]}
        return half.replace(written={**written, **half.written}) if written else half

    def apply_gradients(self, state: State, half: Half, *, member: str) -> tuple[State, dict[str, Any]]:
        """The second half of a member's step, and its metrics; see `Step.apply_gradients`.

        The member's clock advances. `state.step` does not: it counts calls, in which members take their turns.
        """
        with grad_mode(False):
            one, progress = self._one(member), self._members.owned(self._members.start(state))
        with self._members.telling(member, state, progress):
            after, metrics = one.apply_gradients(self._members.seen_by(member, progress), half)
        return self._members.ended(state, progress.after(member, after), counted=False), metrics

    def gradients(self, state: State, batch: Any, *, member: str) -> dict[str, Tensor]:
        """A member's merged gradients by path; see `Step.gradients`."""
        with attributes_kept(self._one(member).functional.modules):
            given, after = self._given(self._members.start(state), [member], batch)
        return self._one(member).gradients(self._members.seen_by(member, after), given(member))

    def per_loss_gradients(self, state: State, batch: Any, *, member: str) -> dict[str, dict[str, Tensor]]:
        """A member's gradients by loss; see `Step.per_loss_gradients`."""
        with attributes_kept(self._one(member).functional.modules):
            given, after = self._given(self._members.start(state), [member], batch)
        return self._one(member).per_loss_gradients(self._members.seen_by(member, after), given(member))

    def call(self, state: State, f: Callable[..., Any], *args: Any, targets: Names = None) -> Any:
        """`f(model, *args)` with the state's tensors in the model; see `Step.call`."""
        first, member = next(iter(self.members.items()))
        return member.call(self.seen_by(first, state), f, *args, targets=targets)

    def export(
        self,
        state: State,
        *,
        optimizer: Mapping[str, torch.optim.Optimizer] | None = None,
        targets: Names = None,
    ) -> Model:
        """Write the state's parameters and buffers into the model, and return it. The state stays usable.

        Args:
            state: what is written; read, and not kept.
            optimizer: member -> an optimizer of torch.optim over its parameters, which takes over the member's state.
            targets: as in `Step.export`.
        """
        running = optimizer or {}
        self._known(running)
        for name, taking in running.items():
            self.members[name].export(self.seen_by(name, state), optimizer=taking)
        first, member = next(iter(self.members.items()))
        return member.export(self.seen_by(first, state), targets=targets)

    def adopt(self, state: State) -> tuple[State, Adoption]:
        """Another alternation's or a lone Step's state, as far as it fits; see `Step.adopt`.

        Every member takes over what the state has for a member of its name, its clock among that. Of a lone Step's
        state the alternation takes parameters, buffers and the count of steps.
        """
        if not isinstance(state, State):
            raise TypeError(f"adopt(state) takes another State, got {type(state).__name__}")
        with grad_mode(False):
            return self._members.adopted(state)

    @property
    def sharing(self) -> Sharing | None:
        """What the members share, if they do."""
        return self._sharing

    @property
    def traces(self) -> int:
        """How many graphs the members have had traced and compiled so far."""
        return sum(member.traces for member in self.members.values())

    @property
    def module(self) -> nn.Module:
        """The model as one module."""
        return next(iter(self.members.values())).module

    @property
    def model(self) -> Model:
        """The model as it was given."""
        return next(iter(self.members.values())).model

    def seen_by(self, member: str, state: State) -> State:
        """What a member sees of a state: the state of a lone `Step`, with the same tensors."""
        seen, specification = (
            self._members.seen_by(member, self._members.start(state)),
            self.members[member].specification,
        )
        return make_state(specification.named(seen.fields), lease_of(seen), specification, count=known_count(seen))

    def _one(self, member: str) -> Step:
        self._known((member,))
        return self.members[member]

    def _known(self, names: Any) -> None:
        if not isinstance(names, Mapping | tuple):
            raise TypeError(f"optimizers go by member, as in {{{next(iter(self.members))!r}: adam}}; got {names!r}")
        if unknown := [repr(name) for name in names if name not in self.members]:
            raise ValueError(f"no member is called {', '.join(unknown)}; the members are {', '.join(self.members)}")
