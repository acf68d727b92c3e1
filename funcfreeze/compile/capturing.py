"""Capturing: Dynamo captures `losses`, guards what it read, and calls what was made of the graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import is_
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import GraphModule

from funcfreeze.compile.captured import Captured, captured
from funcfreeze.compile.compiled import Run, note_on_torch
from funcfreeze.compile.graph import read_graph
from funcfreeze.compile.hooks import Hooks
from funcfreeze.compile.layout import Layout, Listed
from funcfreeze.compile.options import Options
from funcfreeze.compile.private import DynamoConfigured, leave_unguarded
from funcfreeze.compile.problems import NEEDS_VALUES, Moved, explained, is_the_users, raised_by
from funcfreeze.compile.program import Program, compile_step
from funcfreeze.compile.readings import Readings
from funcfreeze.compile.stand_ins import StandIns
from funcfreeze.compile.through import Through, WalksInside
from funcfreeze.computation.back_door import raise_misuse
from funcfreeze.computation.computation import Computation
from funcfreeze.computation.sharing import taken_apart
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.gradients.returned import exchanged
from funcfreeze.model.attributes import attributes_kept
from funcfreeze.model.own_code import with_own_code

GRAD = torch.autograd.grad


@dataclass
class Call:
    """One call under way: the state it is to overwrite, whether the compiled graph was called, and what it gave."""

    state: Listed
    is_running: bool = False
    run: Run | None = None


class Capturing:
    """A computation, captured and compiled as often as it has to be. One call at a time.

    Args:
        computation: what a step computes.
        eager: the same as eager code computes it, for the errors that users know.
        options: how to compile.
        donate: whether a step overwrites the state it is given, or copies of it.
        state: the first state.
    """

    def __init__(
        self, computation: Computation, eager: Computation, options: Options, donate: bool, state: Listed
    ) -> None:
        self._programs: list[tuple[Expected, Program]] = []
        self._options = options
        self._computation = computation
        self._eager = eager
        self._donate = donate
        self._layouts: list[Layout] = []
        functional, routing = computation.evaluation.functional, computation.routing
        self._hooks, self._readings = Hooks(functional), Readings(computation)
        params, buffers, _, _ = state.layout.fields(state.tensors)
        grad = {path for path, required in zip(routing.paths, routing.requires_grad, strict=True) if required}
        self._stand_ins = StandIns(functional, params, buffers, grad)
        self._call: Call | None = None
        self._problems: dict[int, list[str]] = {}
        self._moves: list[Hashable] = []
        # everyone has globals of their own, too, where Dynamo puts what it calls
        self._captured: Callable[..., Captured] = torch.compile(
            with_own_code(captured), fullgraph=True, dynamic=options.dynamic, backend=_backend_of(weakref.ref(self))
        )

    def __call__(self, state: Listed, batch: Any, through: Through | None = None) -> tuple[dict[str, Any], Run]:
        """Take a step that overwrites the state's tensors; returns the metrics, losses among them, and the rest."""
        with grad_mode(True), DynamoConfigured():
            self._stand_ins.follow(state)
            call = Call(state)
            try:
                found, reassigned = self._called(call, batch, through)
            except Exception as error:
                cause = raised_by(error)
                if isinstance(cause, WalksInside):
                    raise cause from None
                self._raise(cause, call, batch)
            if through is not None:
                raise_misuse(through.hooked(self._stand_ins.tensors))
        run = _run_of(call)
        metrics = _with_values(found, self._stand_ins)
        buffers = state.overwritten({**run.buffers, **state.unless_skipped(reassigned, run.found)})
        return {**found.losses, **metrics, **run.measured}, run._replace(buffers=buffers)

    def _called(self, call: Call, batch: Any, through: Through | None) -> tuple[Captured, dict[str, Tensor]]:
        """What Dynamo gives, and the buffers that the forward put in the place of others."""
        evaluation = self._computation.evaluation
        module, losses, declared = evaluation.functional.module, evaluation.losses, evaluation.plan.losses
        norms, targets = evaluation.frozen_norms, evaluation.targets
        stores = self._stand_ins.stores
        own, shared = taken_apart(batch)
        if through is not None:
            shared = {"shared": through.shown(self._stand_ins.tensors)}
        evaluation.refuse_unmet(shared)
        named = {**evaluation.named, **shared}
        moved: Hashable = None
        while True:
            key = self._key(call.state.layout, moved)
            stores.look()
            around, self._call = self._call, call
            give_back_flags = norms.hold()
            try:
                targets.set_modes()
                stores.put()
                traces = self.traces
                found = self._captured(losses, module, own, named, declared, norms.norms, key)
                if self.traces != traces:  # raised now, it would come after the state was overwritten
                    self._problems[traces] = self._stand_ins.problems()
                return found, self._stand_ins.reassigned(_run_of(call).buffers)
            except Moved as other:  # going back to what was there before finds the program for that again
                moved = other.found
            finally:
                give_back_flags()
                stores.take_back()
                self._call = around

    def _raise(self, error: Exception, call: Call, batch: Any) -> NoReturn:
        """Raise what the user should see of an error: their own where an eager call raises it, too."""
        if call.is_running:
            raise error
        if is_the_users(error):
            with attributes_kept(self._computation.evaluation.functional.modules):
                self._eager.gradients(*call.state.layout.fields(call.state.tensors), batch)
        found = explained(error)
        if isinstance(error, AttributeError | ImportError | TypeError | AssertionError):
            note_on_torch(found)
        raise found from found.__cause__

    def _key(self, layout: Layout, moved: Hashable) -> str:
        """Stands for what a program takes for granted and Dynamo does not guard.

        Args:
            layout: of the state.
            moved: what another program found in this call that it was not made for, or None.
        """
        if layout not in self._layouts:  # looks for the same one first
            self._layouts.append(layout)
        if moved is not None and moved not in self._moves:
            self._moves.append(moved)
        number = 0 if moved is None else 1 + self._moves.index(moved)
        return f"{self._layouts.index(layout)} {self._hooks.number()} {self._readings.number()} {number}"

    def build(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., list[Any]]:
        """What Dynamo is to call for a graph that it captured."""
        call, stand_ins = self._call, self._stand_ins
        assert call is not None, "called outside of a step"
        stand_ins.look_again()
        if self._computation is not self._eager and any(module.graph.find_nodes(op="call_function", target=GRAD)):
            raise WalksInside
        forward = read_graph(module, inputs, stand_ins.places)
        expected = Expected(stand_ins, forward.places, inputs)
        placeholders = module.graph.find_nodes(op="placeholder")
        leave_unguarded([placeholders[index] for index in expected.stand_ins_at])
        raise_misuse(self._computation.evaluation.functional.problems_with_new_ones())
        try:
            program = compile_step(
                self._computation, forward, stand_ins, call.state, inputs, self._options, self._donate
            )
        except NEEDS_VALUES as error:
            error.add_note(forward.value_from)
            raise
        self._programs.append((expected, program))
        return _runs(weakref.ref(self), len(self._programs) - 1)

    def run(self, number: int, given: Sequence[Any]) -> list[Any]:
        """Call what was built, with the inputs of its graph."""
        call, (expected, program) = self._call, self._programs[number]
        assert call is not None, "called outside of a step"
        if not expected.are(given):
            raise Moved((number, tuple(map(self._stand_ins.known_as, given))))
        raise_misuse(self._problems.get(number, ()))
        call.is_running = True
        call.run = run = program(call.state, given)
        return run.outputs

    @property
    def traces(self) -> int:
        """How many times it has been traced and compiled so far."""
        return len(self._programs)


def _run_of(call: Call) -> Run:
    assert call.run is not None, "the captured graph did not run"
    return call.run


def _runs(owner: weakref.ref[Capturing], number: int) -> Callable[..., list[Any]]:
    """What Dynamo calls, and keeps for good: it must not keep its owner, and tensors with that."""

    def run(*given: Any) -> list[Any]:
        step = owner()
        assert step is not None, "whoever compiled is gone"
        return step.run(number, given)

    return run


class Expected:
    """The tensors of the module among a graph's inputs, as they have to come at every call.

    Dynamo guards that they are alike, and not the same; that is left out for stand-ins.
    """

    def __init__(self, stand_ins: StandIns, places: Sequence[str | None], inputs: Sequence[Any]) -> None:
        self._stand_ins = stand_ins
        self._paths = [(index, path) for index, path in enumerate(places) if path is not None]
        self._is_expected = [path is not None for path in places]
        self._others = [index for index, path in enumerate(places) if path is None]
        self._own = {index for index, path in self._paths if inputs[index] is stand_ins.own.get(path)}
        self._exchanges = -1
        self._tensors: list[Tensor] = []

    def are(self, given: Sequence[Any]) -> bool:
        """Whether they are among these inputs where they should be, and no stand-in where it should not be."""
        stand_ins = self._stand_ins
        if self._exchanges != stand_ins.exchanges:
            self._exchanges = stand_ins.exchanges
            self._tensors = [
                (stand_ins.own if index in self._own else stand_ins.tensors)[path] for index, path in self._paths
            ]
        are = all(map(is_, compress(given, self._is_expected), self._tensors))
        return are and not any(map(stand_ins.stands_in, map(given.__getitem__, self._others)))

    @property
    def stand_ins_at(self) -> list[int]:
        """Where stand-ins are expected."""
        return [index for index, _ in self._paths if index not in self._own]


def _backend_of(owner: weakref.ref[Capturing]) -> Callable[[GraphModule, list[Any]], Callable[..., list[Any]]]:
    """The backend that Dynamo calls, and keeps for good, too."""

    def backend(module: GraphModule, inputs: list[Any]) -> Callable[..., list[Any]]:
        step = owner()
        assert step is not None, "whoever compiles is gone"
        return step.build(module, inputs)

    return backend


def _with_values(found: Captured, stand_ins: StandIns) -> Mapping[str, Any]:
    """The metrics, with values in the place of stand-ins that they hold."""
    values = {id(tensor): value for tensor, value in found.held if id(tensor) in stand_ins.places}
    if not values:
        return found.metrics
    return {
        name: exchanged(
            metric, lambda t: values.get(id(t), t), lambda t: id(t) in stand_ins.places, "memory of a parameter"
        )
        for name, metric in found.metrics.items()
    }
