"""One call of the user's losses, on the user's module with the state's tensors in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcfreeze.computation.back_door import buffer_problem, parameter_problem, raise_misuse, write_problem
from funcfreeze.computation.inner_gradients import refuse_constants
from funcfreeze.computation.naming import Asked
from funcfreeze.computation.sharing import taken_apart
from funcfreeze.computation.statistics import FrozenNorms
from funcfreeze.computation.targets import Targets
from funcfreeze.declare.plan import Plan
from funcfreeze.gradients.graph import leaves_below
from funcfreeze.model.attributes import let_go_of_graphs, nodes_made
from funcfreeze.model.functional import FunctionalModule, constant_problem, marks_of
from funcfreeze.model.memory import memory_of
from funcfreeze.model.watching import Watch, by_memory

Losses = Callable[..., Any]
"""`losses(model, batch)` -> a mapping name -> scalar, or that and a mapping of metrics. See `naming` for the rest."""


@dataclass
class Seen:
    """What the calls so far have shown.

    Attributes:
        watched: whether one was watched operator by operator.
        written: the parameters that `losses` writes to, which no loss may update. They are cloned for every call then.
    """

    watched: bool = False
    written: set[str] = field(default_factory=set)


class Beside(NamedTuple):
    """What a call gives beside the losses.

    Attributes:
        metrics: as `losses` returned them.
        buffers: every buffer as the call left it.
        written: the new values of parameters that the call wrote to.
    """

    metrics: Mapping[str, Any]
    buffers: dict[str, Tensor]
    written: dict[str, Tensor]


NOTHING = Beside({}, {}, {})


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The user's losses over a model.

    Attributes:
        functional: the model.
        losses: the user's function.
        plan: which loss may update which parameters.
        frozen_norms: those that keep their running statistics.
        targets: averaged twins of parts of the model.
        asked: what `losses` asks for by keyword.
        seen: what the calls so far have shown.
    """

    functional: FunctionalModule
    losses: Losses
    plan: Plan
    frozen_norms: FrozenNorms
    targets: Targets
    asked: Asked
    seen: Seen = field(default_factory=Seen)

    @cached_property
    def named(self) -> dict[str, Any]:
        """What `losses` is given by keyword."""
        return {"targets": self.targets.modules} if "targets" in self.asked and self.targets.by_name else {}

    def refuse_unmet(self, others: Collection[str] = ()) -> None:
        """Refuse to call what asks for something by name that nobody gives.

        Args:
            others: the names of what is given beside the twins.

        Raises:
            ValueError: naming it.
        """
        unmet = [*self.asked.unmet({*self.named, *others})]
        if unmet:
            raise ValueError("\n".join(unmet))

    def warn_of_still_statistics(self) -> None:
        """Warn where `losses` calls no twin and one has statistics of its own."""
        if "targets" not in self.asked:
            self.targets.warn_of_still_statistics(stacklevel=4)

    @cached_property
    def unrouted(self) -> frozenset[str]:
        """The parameters that no loss may update. A forward may write to them, as momentum encoders do."""
        return frozenset(self.plan.paths) - frozenset(self.plan.routed)

    def leaves(self, params: Mapping[str, Tensor]) -> list[Tensor]:
        """The state's parameters in the plan's order, cloned where `losses` is known to write to them."""
        written = self.seen.written
        return [params[path].clone() if path in written else params[path] for path in self.plan.paths]

    def watch(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Watch:
        """What looks at every operator of one call: for tensors of the module that are not the state's, and for writes.

        Args:
            params: the state's parameters.
            buffers: its buffers, and the twins' parameters among them.
        """
        guarded = by_memory({**params, **{path: buffers[path] for path in self.functional.constants}})
        held = self.functional.present_buffers()
        own_buffers = {path: tensor for path, tensor in held.items() if path not in self.functional.of_twins}
        own = {**by_memory(own_buffers), **by_memory(self.functional.present_parameters())}
        return Watch({memory: path for memory, path in own.items() if memory not in guarded}, guarded)

    def call(
        self,
        leaves: Sequence[Tensor],
        buffers: Mapping[str, Tensor],
        batch: Any,
        finally_do: list[Callable[[], None]],
        watch: Watch | None = None,
    ) -> tuple[Any, Beside | None]:
        """Call `losses` once; returns the losses, and what comes beside them, if anything does.

        Buffers are cloned, so that an exception leaves the given ones as they were. The module holds all tensors until
        after the backward. What that runs of the module once more (activation checkpointing) finds
        the buffers as the call left them, and updates only copies.

        Args:
            leaves: what stands for the parameters, in the plan's order.
            buffers: the state's buffers.
            batch: what `losses` is given.
            finally_do: takes what must be called after the backward.
            watch: what looks at every operator, if anything does.

        Raises:
            RuntimeError: `losses` read or wrote something that it may not, or differentiated at a constant.
        """
        given = dict(zip(self.plan.paths, leaves, strict=True))
        for path, hook in self.functional.parameter_hooks():
            if given[path].requires_grad:
                handle = given[path].register_hook(hook)  # type: ignore[no-untyped-call]  # torch's
                finally_do.append(handle.remove)  # what is shared with others gets theirs from them
        constants = {path: buffers[path] for path in self.functional.constants}
        cloned = {path: tensor if path in constants else tensor.clone() for path, tensor in buffers.items()}
        held = {**given, **constants}
        marks = marks_of(held)
        finally_do.append(self._held(given, cloned, watch))
        losses, metrics = split(self._returned(batch, given, watch))
        raise_misuse(self.frozen_norms.problems())
        if watch is not None:
            raise_misuse(self._misuse(watch, losses, buffers))
        left = self.functional.left(held, marks, self.unrouted)
        undone = self.unrouted & watch.written if watch is not None else frozenset()
        written = {path: given[path] for path in undone | self.seen.written} | left.written
        # what is undone later, what may share another tensor's memory, what a recomputation may write to once more:
        # but a write that nobody expected is in the state's own memory already
        late = {path for path in left.written if path not in undone | self.seen.written}
        for path, value in written.items():
            apart = path not in late or memory_of(value) != marks[path][1]
            written[path] = value.detach().clone() if apart else value.detach()
        if watch is not None:
            self.seen.watched = True
        self.seen.written.update(written)
        self.functional.hold_copies(left.buffers)
        return losses, Beside(metrics, left.buffers, written) if metrics or buffers or written else None

    def _held(
        self, given: Mapping[str, Tensor], buffers: Mapping[str, Tensor], watch: Watch | None
    ) -> Callable[[], None]:
        """Put tensors into the module; what is returned ends that, and lets nothing stay there of a graph."""
        release, since = self.functional.hold(given, buffers), nodes_made()
        give_back_flags = self.frozen_norms.hold()
        self.targets.set_modes()

        def end() -> None:
            try:
                if watch is not None:
                    watch.undo()
                let_go_of_graphs(self.functional.modules, since)
            finally:
                give_back_flags()
                release()

        return end

    def _returned(self, batch: Any, given: Mapping[str, Tensor], watch: Watch | None) -> Any:
        """What `losses` returns."""
        module, (own, shared) = self.functional.module, taken_apart(batch)
        self.refuse_unmet(shared)
        try:
            if watch is None:
                return self.losses(module, own, **self.named, **shared)
            with watch:
                return self.losses(module, own, **self.named, **shared)
        except KeyError as error:
            if "targets" in self.named and error.args and error.args[0] not in self.targets.by_name:
                error.add_note(f"the names in `targets` are {', '.join(self.targets.by_name)}")
            raise
        except RuntimeError as error:
            refuse_constants(error, given, self.plan.routed)
            raise

    def _misuse(self, watch: Watch, losses: Any, buffers: Mapping[str, Tensor]) -> Iterator[str]:
        """What is wrong with what was seen.

        Args:
            watch: what has seen it.
            losses: as `losses` returned them.
            buffers: as they were before the call.
        """
        for path in watch.seen:
            if path in self.functional.parameters:
                yield parameter_problem(path, _ending_in(path, watch, losses))
            elif path in watch.written or not _equal(self.functional.buffer(path), buffers[path]):
                yield buffer_problem(path)
        yield from map(write_problem, sorted(watch.written & set(self.plan.routed) - watch.seen.keys()))
        yield from map(constant_problem, sorted(watch.written & self.functional.constants.keys()))


def _equal(one: Tensor | None, other: Tensor) -> bool:
    """Whether the values are the same. BatchNorm's kernel bumps no version of its statistics."""
    return one is not None and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _ending_in(path: str, watch: Watch, losses: Any) -> list[str]:
    """The losses whose graph ends in the module's own parameter of that name."""
    given = losses.items() if isinstance(losses, Mapping) else ()
    return [
        str(name)
        for name, loss in given
        if isinstance(loss, Tensor) and any(watch.own_name(leaf) == path for leaf in leaves_below(loss))
    ]


def split(returned: Any) -> tuple[Any, Mapping[str, Any]]:
    """What `losses` returned as losses and metrics.

    Raises:
        TypeError: neither a mapping nor a pair of mappings.
    """
    if not isinstance(returned, tuple):
        return returned, {}
    if len(returned) != 2 or not isinstance(returned[1], Mapping):
        shown = ", ".join(type(part).__name__ for part in returned)
        raise TypeError(
            f"`losses` returns a mapping of losses, or a pair of that and a mapping of metrics; got ({shown})"
        )
    return returned
