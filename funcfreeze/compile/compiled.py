"""The compiled step: Dynamo captures `losses`, guards what it read, and calls what was made of the graph."""

from __future__ import annotations

import copy
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from funcfreeze.compile.captured import Captured, captured
from funcfreeze.compile.graph import read_graph
from funcfreeze.compile.layout import Layout, Listed
from funcfreeze.compile.options import Options
from funcfreeze.compile.problems import Moved, NotAsDeclared, explained
from funcfreeze.compile.program import Run, compile_step
from funcfreeze.compile.stand_ins import StandIns
from funcfreeze.computation.computation import Computation
from funcfreeze.gradients.hooks import handles_made
from funcfreeze.gradients.returned import exchanged

_NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Returned:
    """What a compiled step gives.

    Attributes:
        losses: by name.
        metrics: what came beside them.
        buffers: those that could not be overwritten in place, by path.
        optimizer: the optimizer's new state, or None if all of it was overwritten in place.
        gradients: large gradients on the CPU, kept only to keep their memory.
    """

    losses: Mapping[str, Any]
    metrics: Mapping[str, Any]
    buffers: Mapping[str, Tensor]
    optimizer: Any
    gradients: list[Tensor]


@dataclass
class Call:
    """One call under way: the state it is to overwrite, and what the graph gave."""

    state: Listed
    run: Run | None = None


class CompiledStep:
    """A computation, compiled as often as it has to be.

    Args:
        computation: what a step computes.
        options: how to compile.
        donate: whether a step overwrites the state it is given, or copies of it.

    Attributes:
        options: how to compile.
        traces: how many times it has been traced and compiled so far.
    """

    def __init__(self, computation: Computation, options: Options, donate: bool) -> None:
        self.traces = 0
        self.options = options
        self._computation = computation
        self._donate = donate
        self._lock = threading.RLock()
        self._layouts: list[Layout] = []
        self._stand_ins: StandIns | None = None
        self._call: Call | None = None
        self._moves = 0
        number = next(_NUMBERS)
        # Dynamo keeps what it compiled with the code object, and which sizes it saw change with its name and line:
        # everyone gets a code object, a name and a line of their own
        code = captured.__code__.replace(co_name=f"captured_{number}", co_firstlineno=number)
        own = types.FunctionType(code, captured.__globals__)
        self._captured: Callable[..., Captured] = torch.compile(
            own, fullgraph=True, dynamic=options.dynamic, backend=_backend_of(weakref.ref(self))
        )

    def __call__(self, state: Listed, batch: Any) -> Returned:
        """Take a step that overwrites the state's tensors."""
        functional = self._computation.evaluation.functional
        with self._lock, functional.alone, torch.enable_grad(), _dynamo_configured():
            stand_ins = self._stand_ins_for(state)
            try:
                with stand_ins.held():
                    call, found = self._called(state, batch)
                    reassigned = stand_ins.reassigned()
            except NotAsDeclared:
                self._computation.gradients(*state.layout.fields(state.tensors), batch)  # raises and says what is wrong
                raise RuntimeError("`losses` returned something else when it was called again") from None
        run = call.run
        assert run is not None, "the captured graph did not run"
        metrics = _with_values(found, stand_ins)
        return Returned(found.losses, metrics, state.overwritten(reassigned), run.optimizer, run.gradients)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStep:
        return CompiledStep(
            copy.deepcopy(self._computation, memo), self.options, self._donate
        )  # compiled anew when it is called

    def _called(self, state: Listed, batch: Any) -> tuple[Call, Captured]:
        evaluation = self._computation.evaluation
        module, losses, declared = evaluation.functional.module, evaluation.losses, evaluation.plan.losses
        self._call = call = Call(state)
        try:
            return call, self._captured(losses, module, batch, declared, self._key(state.layout))
        except Exception as error:
            inner = _inner(error)
            if isinstance(inner, Moved):
                self._moves += 1
                return self._called(state, batch)
            raise explained(inner) from inner.__cause__
        finally:
            self._call = None

    def _key(self, layout: Layout) -> str:
        """Stands for what a program takes for granted and Dynamo does not guard."""
        for index, known in enumerate(self._layouts):
            if known is layout or known == layout:
                return f"{index} {self._moves}"
        self._layouts.append(layout)
        return f"{len(self._layouts) - 1} {self._moves}"

    def _stand_ins_for(self, state: Listed) -> StandIns:
        if self._stand_ins is None:
            params, buffers, _, _ = state.layout.fields(state.tensors)
            routing = self._computation.routing
            grad = {path for path, required in zip(routing.paths, routing.requires_grad, strict=True) if required}
            self._stand_ins = StandIns(self._computation.evaluation.functional, params, buffers, grad)
        self._stand_ins.follow(state.own)
        return self._stand_ins

    def build(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., list[Any]]:
        """What Dynamo is to call for a graph that it captured."""
        call, stand_ins = self._call, self._stand_ins
        assert call is not None and stand_ins is not None, "called outside of a step"
        forward = read_graph(module, inputs, stand_ins.places)
        expected = [(index, inputs[index]) for index, path in enumerate(forward.places) if path is not None]
        program = compile_step(self._computation, forward, call.state, inputs, self.options, self._donate)
        self.traces += 1
        owner = weakref.ref(self)

        def run(*given: Any) -> list[Any]:
            step = owner()
            assert step is not None and step._call is not None, "called outside of a step"
            if not all(given[index] is tensor for index, tensor in expected):
                raise Moved
            step._call.run = ran = program(step._call.state, given)
            return ran.outputs

        return run


def _backend_of(owner: weakref.ref[CompiledStep]) -> Callable[[GraphModule, list[Any]], Callable[..., list[Any]]]:
    """The backend that Dynamo calls, and keeps for good: it must not keep its owner, and the model with that."""

    def backend(module: GraphModule, inputs: list[Any]) -> Callable[..., list[Any]]:
        step = owner()
        assert step is not None, "whoever compiles is gone"
        return step.build(module, inputs)

    return backend


def _inner(error: Exception) -> Exception:
    """The error that was raised, not as Dynamo wraps it."""
    from torch._dynamo.exc import BackendCompilerFailed

    return error.inner_exception if isinstance(error, BackendCompilerFailed) else error


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


@contextmanager
def _dynamo_configured() -> Iterator[None]:
    """Inside, this thread's compilations trace `torch.autograd.grad` and recurrent layers, which Dynamo does on demand.

    The settings are made when a compilation starts: making them takes longer than all else that a call does.
    """
    handler, thread = torch._dynamo.callback_handler, threading.get_ident()
    patch = None

    def start(_: Any) -> None:
        nonlocal patch
        if threading.get_ident() == thread:
            patch = torch._dynamo.config.patch(trace_autograd_ops=True, allow_rnn=True)
            patch.__enter__()

    def end(_: Any) -> None:
        nonlocal patch
        if patch is not None and threading.get_ident() == thread:
            patch.__exit__(None, None, None)
            patch = None

    handler.register_start_callback(start)
    handler.register_end_callback(end)
    try:
        yield
    finally:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)
