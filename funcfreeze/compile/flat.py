"""Tracing a step to one flat graph of aten operators, which a compiler can look up in its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import CompileContext, TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from funcfreeze.compile.layout import Listed
from funcfreeze.compile.outside import Outside
from funcfreeze.declare.schedules import calling


@dataclass(frozen=True)
class StandIns:
    """Fake tensors for a graph's inputs and a state, of the mode in which Dynamo compiles."""

    mode: FakeTensorMode
    inputs: list[Any]
    state: list[Tensor]


def stand_ins_of(inputs: Sequence[Any], state: Listed) -> StandIns:
    """Fakes for the inputs as Dynamo wants their sizes, and for the state's tensors, whose sizes are fixed.

    Inputs in the state's memory get fakes in memory of their own, as they will be copied at every call.
    """
    mode = detect_fake_mode()
    contexts = TracingContext.get().tensor_to_context
    assert mode is not None, "called outside of a compilation"

    def fake(given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        context = contexts.get(given)  # type: ignore[no-untyped-call]
        made = mode.from_tensor(given, symbolic_context=context, source=context.tensor_source if context else None)
        if state.shares(given):
            with mode:
                made = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=made.device)
        return made.detach()

    fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in state.tensors]
    return StandIns(mode, [fake(given) for given in inputs], fakes)


@contextmanager
def tracing(mode: FakeTensorMode, outside: Outside, has_lstm: bool) -> Iterator[None]:
    """Settings for the time of a trace.

    The backward stays in this thread, where all this holds. Saved-tensor hooks, which activation checkpointing is made
    of, work; torch turns them off in a trace. oneDNN's LSTM cannot be looked into; without an LSTM oneDNN stays,
    convolutions take their layouts from it.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(calling(outside.scheduled))
        if mode.shape_env is not None:  # sizes and numbers known only at run time need not appear in what is returned
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        before = torch._C._autograd._saved_tensors_hooks_set_tracing(False)
        stack.callback(torch._C._autograd._saved_tensors_hooks_set_tracing, before)
        if has_lstm:
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
        stack.enter_context(mode)
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(outside)
        yield


class Flat(NamedTuple):
    """A flat graph, and tensors that it takes after its other inputs, the same at every call."""

    graph: GraphModule
    constants: list[Tensor]


def flatten(f: Callable[..., list[Any]], given: Sequence[Any], outside: Sequence[Tensor], static: int) -> Flat:
    """The graph of a function; tensors that it met outside become inputs after those given.

    Args:
        f: the function.
        given: stand-ins for its inputs.
        outside: stand-ins for tensors that it meets; grows while it is called.
        static: so many of the inputs are marked as Dynamo marks a module's parameters, in all that the compiler wants
            to see for that: CUDA graphs then use their memory where it is, and do not copy it.
    """
    module = make_fx(f)(*given)
    constants = _lift(module, outside)
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        node._dynamo_source = None
        if index < static:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    for node in module.graph.nodes:
        node.meta.pop("stack_trace", None)  # would be part of the cache's key
    (output,) = module.graph.find_nodes(op="output")
    output.args = (tuple(output.args[0]),)
    module.recompile()
    module.meta["dynamo_compile_id"] = CompileContext.current_compile_id()
    module._param_name_to_source = {}  # type: ignore[assignment]  # Dynamo sets it, nn.Module types it
    return Flat(module, constants)


def _lift(module: GraphModule, outside: Sequence[Tensor]) -> list[Tensor]:
    """Make inputs of the tensors that a graph holds: first those met outside, then others, which are returned."""
    graph = module.graph
    users: dict[int, list[Node]] = {id(tensor): [] for tensor in outside}
    held = [*outside]
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(module, node.target)
        if id(value) not in users:
            users[id(value)] = []
            held.append(value)
        users[id(value)].append(node)
    *_, last = graph.find_nodes(op="placeholder")
    for index, tensor in enumerate(held):
        with graph.inserting_after(last):
            last = graph.placeholder(f"outside_{index}")
        for node in users[id(tensor)]:
            node.replace_all_uses_with(last)
            graph.erase_node(node)
    for name in {node.target for nodes in users.values() for node in nodes}:
        delattr(module, name)
    return held[len(outside) :]
