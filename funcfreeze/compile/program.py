"""One trace of a step: from the tensors of a state and a batch to what the step returns, as one graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch._guards import CompileContext
from torch.fx import Graph, GraphModule

from funcfreeze.compile.backends import compiler
from funcfreeze.compile.form import Form
from funcfreeze.compile.guards import Guarded
from funcfreeze.compile.layout import Layout, Listed
from funcfreeze.compile.options import Options
from funcfreeze.compile.reading import PLAIN
from funcfreeze.compile.tracing import Outside, RecurrentLayers, in_trace, no_randomness_of_python, stand_ins
from funcfreeze.compile.watch import Watch
from funcfreeze.computation.computation import Computation, Computed
from funcfreeze.model.containers import flatten

KEPT_BYTES = 2**18
"""Gradients of this size on the CPU stay allocated until the next step starts; see `Lease.gradients`."""


class Output(int):
    """The place of a tensor among the outputs of the graph: no container, so that trees can hold it."""


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
    """A step traced for what `watch` saw, for states of one layout and batches of one form.

    Args:
        computation: what the step computes.
        layout: how a state's tensors are listed.
        form: of the batch, whose leaves that are no tensors are constants of the trace.
        watch: what the trace may read from Python.
        options: how to compile.
        static: whether states are overwritten in place, so that their tensors stay where they are.
        traced: called once for every compilation.
    """

    def __init__(
        self,
        computation: Computation,
        layout: Layout,
        form: Form,
        watch: Watch,
        options: Options,
        static: bool,
        traced: Callable[[], None],
    ) -> None:
        self.layout, self.form, self.watch = layout, form, watch
        self._computation = computation
        self._compile = compiler(options)
        self._static = static
        self._cuda_graphs = options.cuda_graphs
        self._traced = traced
        self._guarded = Guarded(self._build, options.dynamic)
        self._state: Listed | None = None
        self._device: AbstractContextManager[object] = nullcontext()

    def __call__(self, state: Listed, leaves: Sequence[Tensor]) -> Returned:
        """Take a step: overwrites the tensors of the state.

        Args:
            state: as the layout lists it, owned by the caller.
            leaves: the batch's tensors.
        """
        self._state = state
        device = torch.get_default_device()  # Dynamo hides it from what it calls
        self._device = nullcontext() if device.type == "cpu" else device
        try:
            returned: Returned = self._guarded(leaves)
        finally:
            self._state = None
        return returned

    def _build(self, inputs: Sequence[Any], leaves: Sequence[int]) -> Callable[[Sequence[Any]], Returned]:
        """Trace the step on stand-ins, then compile it for such inputs, the state's tensors, and those outside."""
        self._traced()
        assert self._state is not None, "called outside of a step"
        tensors = self._state.tensors
        fakes = stand_ins(inputs, tensors)
        outside, recurrent = Outside(self.watch), RecurrentLayers()
        with (
            fakes.mode_active(),
            in_trace(outside.noticing(fakes.mode), fakes.mode),
            recurrent,
            self._device,
            no_randomness_of_python(self.watch.generators),
        ):
            try:
                returned, outputs = self._run(list(fakes.state), [fakes.inputs[leaf] for leaf in leaves])
            finally:
                effects = self.watch.side_effects(outside.was_read)
                self.watch.undo()
        outside.refuse(effects)
        start, end = len(inputs), len(inputs) + len(tensors)

        def traced(*given: Any) -> list[Tensor]:
            with in_trace(outside.standing_for(given[end:]), fakes.mode), recurrent.again(), self._device:
                again, tensors = self._run(list(given[start:end]), [given[leaf] for leaf in leaves])
            _check_constants(returned, again)
            return tensors

        given = [*inputs, *fakes.state, *outside.stand_ins]
        try:
            static = range(start, end) if self._static else range(0)
            run = self._compile(_one_call(traced, len(given), len(outputs), static), given)
        finally:
            self.watch.undo()

        def call(given: Sequence[Any]) -> Returned:
            state = self._state
            assert state is not None, "called outside of a step"
            if not self._cuda_graphs:
                return _filled(returned, run(*given, *state.tensors, *outside.tensors(state)))
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch's
            computed = run(*given, *state.tensors, *outside.tensors(state))
            return _filled(returned, [tensor.clone() for tensor in computed])  # the next replay overwrites them

        return call

    def _run(self, tensors: list[Tensor], leaves: list[Tensor]) -> tuple[Returned, list[Tensor]]:
        """The step itself, on whatever stands for the tensors: it overwrites parameters and the optimizer's state.

        Not the count of steps: a compiler would write that first, before anything can fail.
        """
        params, buffers, optimizer, step = self.layout.fields(tensors)
        batch = self.form.batch(iter(leaves))
        computed = self._computation.traced_gradients(params, buffers, optimizer, step, batch)
        outputs: list[Tensor] = []

        def output(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return _plain(leaf)
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
            buffers_out = {path: output(buffer) for path, buffer in changed.items()}
            kept = [_kept(gradient, outputs) for gradient in computed.gradients.values() if _is_large(gradient)]
        return Returned(losses, metrics, buffers_out, after, kept), outputs


def _mapped(f: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (Tensor, Output)):
        return f(value)
    leaves, structure = flatten(value)
    return structure.unflatten(map(f, leaves))


def _plain(leaf: Any) -> Any:
    """A metric that is no tensor: a constant of the trace."""
    if not isinstance(leaf, PLAIN):
        raise TypeError(
            f"a metric holds {type(leaf).__name__}: a compiled step returns tensors, numbers and strings in dicts, "
            "lists, tuples, dataclasses and mappings; return its tensors, or build the Step with compile=False"
        )
    return leaf


def _check_constants(one: Returned, other: Returned) -> None:
    """Refuse metrics that are Python numbers and differ from one trace to the next."""
    for name, value in one.metrics.items():
        if flatten(value)[0] != flatten(other.metrics[name])[0]:
            raise RuntimeError(
                f"the metric {name!r} is a Python number that differs each time it is computed; a compiled step would "
                "always return the first. Make it a tensor, or build the Step with compile=False"
            )


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
        return computed[leaf] if type(leaf) is Output else leaf

    return Returned(
        {name: fill(value) for name, value in returned.losses.items()},
        {name: _mapped(fill, value) for name, value in returned.metrics.items()},
        {path: fill(value) for path, value in returned.buffers.items()},
        None if returned.optimizer is None else optree.tree_map(fill, returned.optimizer, none_is_leaf=True),
        [fill(value) for value in returned.gradients],
    )


def _one_call(f: Callable[..., list[Tensor]], inputs: int, outputs: int, static: Sequence[int]) -> GraphModule:
    """A graph of a single call, which the compiler looks into.

    The inputs in `static` are marked as Dynamo marks a module's parameters, in all that the compiler wants to see for
    that: CUDA graphs then use their memory where it is, and do not copy it.
    """
    graph = Graph()
    given = [graph.placeholder(f"input_{index}") for index in range(inputs)]
    for index, node in enumerate(given):
        node._dynamo_source = None
        if index in static:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    call = graph.call_function(f, tuple(given))
    graph.output(tuple(graph.call_function(operator.getitem, (call, index)) for index in range(outputs)))
    module = GraphModule({}, graph)
    module.meta["dynamo_compile_id"] = CompileContext.current_compile_id()
    module._param_name_to_source = {}  # type: ignore[assignment]  # Dynamo sets it, nn.Module types it
    return module
