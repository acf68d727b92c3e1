"""The second half of a step: who owns what it overwrites, and the state that comes of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.computation.back_door import form_of, form_problem, refuse_late_writes
from funcfreeze.computation.computation import Computation, not_sharing
from funcfreeze.computation.finite import lost
from funcfreeze.computation.half import Half
from funcfreeze.computation.merging import after_meeting, told, without_rules
from funcfreeze.computation.renewal import refuse_other_state, renewed
from funcfreeze.computation.specification import Specification
from funcfreeze.computation.state import Fields, Lease, State, count_of, known_count, lease_of, make_state
from funcfreeze.computation.targets import Moves, following_buffers, move, moved_by
from funcfreeze.declare.names import is_own
from funcfreeze.declare.selectors import closest
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.model.memory import memory_of
from funcfreeze.model.ties import by_first_names, tied
from funcfreeze.optim.transform import lines, misfits


@dataclass(frozen=True, eq=False)
class Updating:
    """How the states of a step follow one another.

    Attributes:
        computation: what the step computes.
        specification: what its states look like.
        donate: whether the storage of a state is reused for the next.
    """

    computation: Computation
    specification: Specification
    donate: bool

    def __post_init__(self) -> None:
        computation, initial = self.computation, self.specification.optimizer
        own = initial if computation.loss_scale is None else initial["optimizer"]
        refuse_other_state(without_rules(own), computation.timetable.resets, computation.evaluation.plan.routed)

    def update(self, state: State, half: Half) -> tuple[State, dict[str, Any]]:
        """The new state, and all metrics. Everything that can fail comes before the first write.

        Raises:
            FloatingPointError: not all is finite, and that is to raise; the state given is as it was.
        """
        gradients, computation = half.gradients, self.computation
        lease, routed = lease_of(state), set(computation.evaluation.plan.routed)
        if not self.donate:
            refuse_late_writes(state.params, half.written)
        copied = lease.borrowed & gradients.keys() if self.donate else routed
        params = {
            path: p.clone() if path in copied else p.detach() if p.requires_grad else p
            for path, p in state.params.items()
        } | dict(half.written)
        owned = self.donate and not lease.borrowed_optimizer
        optimizer = state.optimizer if owned else optree.tree_map(copied_leaf, state.optimizer)
        optimizer = self.renewed(optimizer, params, state)
        step = state.step + 1
        moves = self.moving(state)
        moved = moved_by(moves)
        twins = self.twins(state, moved)
        finite, buffers = computation.finite, dict(half.buffers)
        metrics = {**half.losses, **self.metrics(state, half)}
        flag = None if finite is None else lost(half.losses, step.device)
        optimizer, measured, found, skip = computation.optimize(gradients, optimizer, params, state.step, flag)
        optimizer = after_meeting(optimizer, half.met, skip, is_scaled=computation.loss_scale is not None)
        metrics |= {**measured, **told(half.met)}
        if finite is not None and found is not None:
            finite.refuse(found, half.losses, state.step)
            metrics |= found.metrics
            buffers = found.kept("buffer", state.fields[1], half.buffers)
            params |= found.kept("parameter", state.params, half.written)
        # a half keeps what it has, and the forward may have put somebody else's tensor in a buffer's place
        buffers = {**twins, **buffers, **{path: buffers[path].clone() for path in following_buffers(moves)}}
        buffers |= move(moves, buffers, params, buffers, found)
        if self.donate:
            lease.spent = True
        else:  # both states hold these now: neither may write to them
            lease.borrowed |= (params.keys() - routed) | (twins.keys() - moved)
        kept = [gradient for gradient in gradients.values() if gradient.is_cpu]
        held = Lease(borrowed=lease.borrowed - copied - half.written.keys() - moved, gradients=kept)
        fields = self.specification.named((params, buffers, optimizer, step))
        return make_state(fields, held, self.specification, count=known_count(state, 1)), metrics

    def moving(self, state: State) -> Moves:
        """The targets that move in the step of a state. Their schedules are called, which may raise."""
        targets = self.computation.evaluation.targets
        return targets.moving(count_of(state), state.step) if targets.by_name else ()

    def twins(self, state: State, moved: Set[str]) -> dict[str, Tensor]:
        """The parameters of all targets, copied where they move and somebody else may hold them."""
        constants = self.computation.evaluation.functional.constants
        if not constants:
            return {}
        tensors = state.fields[1]
        copied = moved & lease_of(state).borrowed if self.donate else moved
        return {path: tensors[path].clone() if path in copied else tensors[path] for path in constants}

    def renewed(self, optimizer: Any, params: Mapping[str, Tensor], state: State) -> Any:
        """The optimizer's state, with what is fresh at the count of a state; the very same if nothing is."""
        computation, timetable = self.computation, self.computation.timetable
        paths = timetable.thawing(count_of(state)) if timetable.resets else []
        if not paths:
            return optimizer
        thawing = {path: params[path] for path in paths}
        return renewed(computation.transform, optimizer, thawing, is_scaled=computation.loss_scale is not None)

    def metrics(self, state: State, half: Half) -> dict[str, Any]:
        """What `losses` returned beside the losses, apart from what the next update overwrites."""
        if not half.metrics:
            return {}
        overwritten = state.params, state.fields[1], half.buffers, half.written
        return not_sharing(half.metrics, [tensor for tensors in overwritten for tensor in tensors.values()])

    def apart(self, state: State, half: Half) -> Half:
        """The half in memory of its own, and with all names of tied tensors."""
        if not self.donate:
            refuse_late_writes(state.params, half.written)
        params = [*state.params.values(), *half.written.values()]
        memories = {memory_of(param) for param in params} - {None}
        with grad_mode(False):
            gradients, *rows = (
                {path: g.clone() if memory_of(g) in memories else g for path, g in row.items()}
                for row in (half.gradients, *half.per_loss.values())
            )
            written = {path: value.clone() for path, value in half.written.items()}
            metrics = self.metrics(state, half)
        return Half(
            tied(gradients, self.specification.tied_params),
            half.losses,
            metrics,
            tied(half.buffers, self.specification.tied_buffers),
            written,
            {name: tied(row, self.specification.tied_params) for name, row in zip(half.per_loss, rows, strict=True)},
            half.met,
        )

    def checked(self, state: State, half: object) -> Half:
        """A half that a user may have changed, by the first names of tied tensors and without a graph.

        Raises:
            TypeError: not a `Half`.
            ValueError: everything in it that does not fit the state.
        """
        if not isinstance(half, Half):
            seen = "a pair; a step returns that at once" if isinstance(half, tuple) else type(half).__name__
            raise TypeError(f"apply_gradients(state, half) takes what step.compute(state, batch) gives, got {seen}")
        spec = self.specification
        others = [
            f"{name} is a mapping, got {type(given).__name__}"
            for name, given in half.fields.items()
            if not isinstance(given, Mapping)
        ]
        if others:
            raise TypeError(lines("the fields of a Half are mappings by name or path:", others))
        named: dict[str, Any] = dict.fromkeys(
            [*state.params, *(name for name in half.gradients if name not in spec.tied_params)]
        )
        given = by_first_names(half.gradients, tied(named, spec.tied_params))
        problems = [*self._problems(given, state), *self._form_problems(half, state)]
        if problems:
            raise ValueError(lines("this Half does not fit the State:", problems))
        kept = {memory_of(leaf) for leaf in optree.tree_leaves(state.optimizer) if isinstance(leaf, Tensor)} - {None}
        with grad_mode(False):
            return half.replace(
                gradients={
                    path: gradient.clone() if memory_of(gradient) in kept else gradient.detach()
                    for path, gradient in given.items()
                    if gradient is not None
                },
                written={path: value.clone() for path, value in half.written.items()},
            )

    def _problems(self, given: Mapping[str, Any], state: State) -> Iterator[str]:
        """What is wrong with gradients."""
        plan, timetable = self.computation.evaluation.plan, self.computation.timetable
        resting: Set[str] = frozenset()
        if timetable.is_timed:
            now = plan.at(count_of(state))
            resting = frozenset(plan.routed) - frozenset(now.routed)
        for path, gradient in given.items():
            if path not in state.params:
                yield f"gradients[{path!r}]: there is no such parameter{closest(str(path), plan.paths)}"
            elif gradient is not None and path not in plan.routed:
                yield f"gradients[{path!r}]: no loss may update this parameter; leave it out, or give it a route"
            elif gradient is not None and path in resting:
                yield f"gradients[{path!r}]: none of its routes is active at count {count_of(state)}; leave it out"
            elif gradient is not None and not isinstance(gradient, Tensor):
                yield f"gradients[{path!r}] is a tensor, or None where it is untouched; got {type(gradient).__name__}"
            elif gradient is not None:
                yield from (
                    f"gradients[{path!r}]: {what}" for what in misfits(gradient, state.params[path], "gradient")
                )

    def _form_problems(self, half: Half, state: State) -> Iterator[str]:
        """What is wrong with buffers and written parameters; a forward may change the shapes of buffers."""
        for name in filter(is_own, half.metrics):
            yield f"metrics[{name!r}]: such names are kept for metrics that a step adds itself; rename it"
        wanted = state.fields[1].keys() - self.computation.evaluation.functional.constants.keys()
        for path in sorted(wanted ^ half.buffers.keys()):
            has, has_not = ("State", "Half") if path in wanted else ("Half", "State")
            yield f"buffer {path}: the {has} has it, the {has_not} does not"
        for path, value in half.buffers.items():
            if not isinstance(value, Tensor):
                yield f"buffer {path} is a tensor, got {type(value).__name__}"
        for path, value in half.written.items():
            if path not in state.params:
                yield f"written[{path!r}]: there is no such parameter{closest(str(path), state.params)}"
            elif path not in self.computation.evaluation.unrouted:
                yield f"written[{path!r}]: a loss may update this parameter; its update belongs into `gradients`"
            elif not isinstance(value, Tensor):
                yield f"written[{path!r}] is a tensor, got {type(value).__name__}"
            elif form_of(value) != form_of(state.params[path]):
                yield form_problem(path, state.params[path], value)

    def owns(self, lease: Lease) -> bool:
        """Whether all that a step overwrites may be overwritten."""
        return not lease.borrowed_optimizer and lease.borrowed <= self.computation.evaluation.unrouted

    def owned(self, state: State) -> Fields:
        """The state's fields, copied where somebody else may hold them, or where two of them share their memory."""
        lease, routed = lease_of(state), set(self.computation.evaluation.plan.routed)
        copied = lease.borrowed & routed if self.donate else routed
        return owned(state.fields, copied, not self.donate or lease.borrowed_optimizer)


def owned(fields: Fields, copied: Collection[str], copies_optimizer: bool) -> Fields:
    """Fields that may be overwritten: no two of their tensors share memory, and buffers and step are copies.

    Args:
        fields: of a state.
        copied: the paths of parameters that are copied in any case.
        copies_optimizer: whether all of the optimizer's state is.
    """
    memories: set[int] = set()

    def mine(tensor: Tensor, copy: bool) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor
        memory = tensor.untyped_storage().data_ptr()
        shared = memory in memories and tensor.numel() > 0
        memories.add(memory)
        return tensor.clone() if copy or shared else tensor.detach()

    params = {path: mine(tensor, path in copied) for path, tensor in fields[0].items()}
    optimizer = optree.tree_map(
        lambda leaf: mine(leaf, copies_optimizer) if isinstance(leaf, Tensor) else leaf, fields[2]
    )
    buffers = {path: mine(tensor, True) for path, tensor in fields[1].items()}
    return params, buffers, optimizer, mine(fields[3], True)


def borrowed_in(params: Mapping[str, Tensor], states: Iterable[State]) -> set[str]:
    """The paths of parameters that one of these states, from which they come, has borrowed."""
    known = {id(state.params[path]) for state in states for path in lease_of(state).borrowed & state.params.keys()}
    return {path for path, tensor in params.items() if id(tensor) in known}


def apart_from(params: Mapping[str, Tensor], optimizer: Any) -> Any:
    """The optimizer's state, with copies of what shares memory with parameters, which steps overwrite."""
    memories = {memory_of(param) for param in params.values()} - {None}

    def apart(leaf: Any) -> Any:
        shares = isinstance(leaf, Tensor) and leaf.numel() > 0 and memory_of(leaf) in memories
        return leaf.clone() if shares else leaf

    return optree.tree_map(apart, optimizer)


def copied_leaf(leaf: Any) -> Any:
    """A leaf of an optimizer's state, with memory of its own."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
