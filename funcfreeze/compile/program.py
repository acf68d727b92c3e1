"""One trace of a step: from the tensors of a state and a batch to what the step returns, as one graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from funcfreeze.compile.backends import compiler
from funcfreeze.compile.guards import Guarded
from funcfreeze.compile.layout import Layout
from funcfreeze.compile.options import Options
from funcfreeze.compile.tracing import Outside, in_trace, stand_ins
from funcfreeze.compile.watch import Watch
from funcfreeze.computation import Computation, Computed

KEPT_BYTES = 2**18
"""Gradients of this size on the CPU stay allocated until the next step starts; see `Lease.gradients`."""


class Output(NamedTuple):
    """The place of a tensor among the outputs of the graph."""

    place: int


@dataclass(frozen=True)
class Returned:
    """What a step returns, with an `Output` for every tensor that the graph computes.

    Attributes:
        losses: by name.
        metrics: what came beside them.
        buffers: those that were not overwritten in place, by path.
        optimizer: the optimizer's new state, or None if all of it was overwritten in place.
        gradients: large gradients on the CPU, kept only to keep their memory.
    """

    losses: dict[str, Any]
    metrics: dict[str, Any]
    buffers: dict[str, Any]
    optimizer: Any
    gradients: list[Any]


class Program:
    """A step traced for what `watch` saw, for states of one layout and batches of one structure.

    Args:
        computation: what the step computes.
        layout: how a state's tensors are listed.
        structure: of the batch, whose leaves that are no tensors are constants of the trace.
        constants: those leaves, by position.
        watch: what the trace may read from Python.
        options: how to compile.
        traced: called once for every compilation.
    """

    def __init__(
        self,
        computation: Computation,
        layout: Layout,
        structure: optree.PyTreeSpec,
        constants: dict[int, Any],
        watch: Watch,
        options: Options,
        traced: Callable[[], None],
    ) -> None:
        self.layout, self.structure, self.constants, self.watch = layout, structure, constants, watch
        self._computation = computation
        self._compile = compiler(options)
        self._traced = traced
        self._guarded = Guarded(self._build, options.dynamic)
        self._state: Sequence[Tensor] = ()

    def __call__(self, state: Sequence[Tensor], leaves: Sequence[Tensor]) -> Returned:
        """Take a step: overwrites the tensors of the state.

        Args:
            state: as the layout lists them, owned by the caller.
            leaves: the batch's tensors.
        """
        self._state = state
        try:
            returned: Returned = self._guarded(leaves)
        finally:
            self._state = ()
        return returned

    def _build(self, inputs: Sequence[Any], leaves: Sequence[int]) -> Callable[[Sequence[Any]], Returned]:
        """Trace the step on stand-ins, then compile it for such inputs, the state's tensors, and those outside."""
        self._traced()
        fakes = stand_ins(inputs, self._state)
        outside = Outside(self.watch)
        count = len(self._state)
        outputs: list[Tensor] = []
        returned: list[Returned] = []

        def dry(state: list[Tensor], batch: list[Tensor]) -> None:
            made, found = self._run(state, batch)
            returned.append(made)
            outputs.extend(found)

        def traced(*given: Any) -> list[Tensor]:
            state, beside = list(given[len(inputs) : len(inputs) + count]), given[len(inputs) + count :]
            with in_trace(outside.standing_for(beside), fakes.mode):
                return self._run(state, [given[leaf] for leaf in leaves])[1]

        with fakes.mode_active(), in_trace(outside.noticing(fakes.mode), fakes.mode):
            try:
                dry(list(fakes.state), [fakes.inputs[leaf] for leaf in leaves])
            finally:
                effects = self.watch.side_effects(outside.was_read)
                self.watch.undo()
        outside.refuse(effects)
        given = [*inputs, *fakes.state, *outside.stand_ins]
        static = range(len(inputs), len(inputs) + count)
        try:
            run = self._compile(_one_call(traced, len(given), len(outputs), static), given)
        finally:
            self.watch.undo()
        (made,) = returned

        def call(given: Sequence[Any]) -> Returned:
            computed = run(*given, *self._state, *outside.tensors)
            return _filled(made, computed)

        return call

    def _run(self, tensors: list[Tensor], leaves: list[Tensor]) -> tuple[Returned, list[Tensor]]:
        """The step itself, on whatever stands for the tensors: it overwrites parameters, optimizer state and count."""
        params, buffers, optimizer, step = self.layout.fields(tensors)
        rest = iter(leaves)
        batch = optree.tree_unflatten(
            self.structure,
            [
                self.constants[index] if index in self.constants else next(rest)
                for index in range(self.structure.num_leaves)
            ],
        )
        computed = self._computation.gradients(params, buffers, optimizer, step, batch)
        outputs: list[Tensor] = []

        def output(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            outputs.append(leaf.clone())  # a metric may be a view of a parameter, which is overwritten below
            return Output(len(outputs) - 1)

        with torch.no_grad():
            losses, metrics = (
                {name: _mapped(output, value) for name, value in group.items()}
                for group in (computed.losses, computed.metrics)
            )
            changed = _write_buffers(buffers, computed)
            after = self._computation.optimize(computed.gradients, optimizer, params, step)
            after = self.layout.written(optimizer, after, output)
            step.add_(1)
            buffers_out = {path: output(buffer) for path, buffer in changed.items()}
            kept = [_kept(gradient, outputs) for gradient in computed.gradients.values() if _is_large(gradient)]
        return Returned(losses, metrics, buffers_out, after, kept), outputs


def _mapped(f: Callable[[Any], Any], value: Any) -> Any:
    return f(value) if isinstance(value, Tensor) else optree.tree_map(f, value, none_is_leaf=True)


def _write_buffers(buffers: dict[str, Tensor], computed: Computed) -> dict[str, Tensor]:
    """The buffers that the state takes over.

    On CUDA they are overwritten instead, so that their addresses stay what a CUDA graph has recorded.
    """
    changed = dict(computed.buffers)
    for path, buffer in computed.buffers.items():
        held = buffers[path]
        if held.device.type == "cuda" and (held.shape, held.dtype) == (buffer.shape, buffer.dtype):
            held.copy_(changed.pop(path))
    return changed


def _is_large(gradient: Tensor) -> bool:
    return (
        gradient.device.type == "cpu"
        and gradient.layout == torch.strided
        and gradient.numel() * gradient.element_size() >= KEPT_BYTES
    )


def _kept(gradient: Tensor, outputs: list[Tensor]) -> Output:
    outputs.append(gradient)
    return Output(len(outputs) - 1)


def _filled(returned: Returned, computed: Sequence[Tensor]) -> Returned:
    def fill(leaf: Any) -> Any:
        return computed[leaf.place] if type(leaf) is Output else leaf

    def filled(value: Any) -> Any:
        return (
            fill(value)
            if type(value) is Output
            else optree.tree_map(fill, value, is_leaf=_is_output, none_is_leaf=True)
        )

    return Returned(
        {name: fill(value) for name, value in returned.losses.items()},
        {name: filled(value) for name, value in returned.metrics.items()},
        {path: fill(value) for path, value in returned.buffers.items()},
        None if returned.optimizer is None else filled(returned.optimizer),
        [fill(value) for value in returned.gradients],
    )


def _is_output(value: Any) -> bool:
    return type(value) is Output


def _one_call(f: Callable[..., list[Tensor]], inputs: int, outputs: int, static: Sequence[int]) -> GraphModule:
    """A graph of a single call, which the compiler looks into.

    The inputs in `static` are marked so that CUDA graphs use their memory where it is, and do not copy it.
    """
    graph = Graph()
    given = [graph.placeholder(f"input_{index}") for index in range(inputs)]
    for index in static:
        given[index].meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    call = graph.call_function(f, tuple(given))
    graph.output(tuple(graph.call_function(operator.getitem, (call, index)) for index in range(outputs)))
    return GraphModule({}, graph)
