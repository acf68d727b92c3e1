"""All of torch that the compiled step uses and torch does not promise to keep, each with its reason.

When a new release of torch breaks the compiled step, it breaks here. `compiled.TESTED` is the newest that was tried.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from logging import Logger
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import config, exc
from torch._dynamo.callback import callback_handler
from torch._guards import CompileContext, TracingContext, detect_fake_mode
from torch._guards import tracing as tracing_context
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.nn.modules import module as of_modules
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from funcfreeze.compile.options import Backend, Options

__all__ = [
    "CHECKPOINT",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "TorchDispatchMode",
    "exc",
    "make_fx",
    "tree_map_only",
]
# `exc`: what Dynamo raises; torch documents none of it. The three other exceptions: an operator, a size or a branch
# needs a value that only a run knows; there is no common public base class.
# `TorchDispatchMode`, `tree_map_only`: torch's documentation shows them, from a module with an underscore.
# `make_fx`: documented as a prototype, under `torch.fx.experimental`.

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
"""Dynamo's operator for activation checkpointing. Public would be a way to have it traced as it is written."""

FUNCTION = torch.ops.higher_order.autograd_function_apply
"""Dynamo's operator for an `autograd.Function`."""

HOOKS_ARE_FUNCTIONS = "register_hook" not in torch._ops._higher_order_ops
"""Whether Dynamo makes such a function of a hook on an activation, as it did before torch 2.13."""

OUTSIDE_CUDA_GRAPHS = [tag for name, tag in torch.Tag.__members__.items() if name == "cudagraph_unsafe"]
"""The tag of an operator that must run at every step, in releases that have it."""

_DEFAULTS = {
    # Inductor would check every input's sizes at every call: guards have looked at the batch, a state is checked once.
    "size_asserts": False,
    # Inductor would turn convolutions to channels-last, but their backward wants the layout that was traced. With both
    # in one graph, each activation and weight is then kept in both: ResNet-18 on a CPU took 1.5 times as long and 1.35
    # times the memory. A model that was put into channels-last stays so.
    "layout_optimization": False,
}
"""Options of Inductor, unless others are given."""

_WHILE_DYNAMO_TRACES = {
    "trace_autograd_ops": True,  # `torch.autograd.grad` inside `losses`
    "allow_rnn": True,  # LSTM and GRU
    "skip_fwd_side_effects_in_bwd_under_checkpoint": True,  # a counter in a checkpointed part counts once
}
"""Settings of Dynamo; those that a release does not have are left out. `torch.compile` takes none of them."""


def compiler(options: Options) -> Backend:
    """From a graph and its inputs to a callable. `torch.compile` has no public function from its arguments to that."""
    if callable(options.backend):
        return options.backend
    if options.backend != "inductor":
        from torch._dynamo.backends.registry import lookup_backend

        found: Backend = lookup_backend(options.backend)
        return found
    from torch import _TorchCompileInductorWrapper

    given = {**_DEFAULTS, **options.options}
    wrapper = _TorchCompileInductorWrapper
    inductor: Backend = wrapper(options.mode, given, options.dynamic)  # type: ignore[no-untyped-call]  # torch's
    return inductor


class DynamoConfigured:
    """Inside, this thread's compilations go by the settings above.

    They are made when a compilation starts: making them takes longer than all else that a call does.
    """

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._patch: AbstractContextManager[Any] = nullcontext()
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def __exit__(self, *_: object) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)

    def _start(self, _: Any) -> None:
        if threading.get_ident() == self._thread:
            self._patch = config.patch(_known_settings())
            self._patch.__enter__()

    def _end(self, _: Any) -> None:
        if threading.get_ident() == self._thread:
            self._patch.__exit__(None, None, None)
            self._patch = nullcontext()


def _known_settings() -> dict[str, Any]:
    known = config.get_config_copy()
    logging = {
        "reorderable_logging_functions": {print},  # after the graph, with what it computed
        "ignore_logging_functions": {
            warnings.warn,
            *(f for name, f in vars(Logger).items() if name.startswith(_LEVELS)),
        },
    }
    kept = {name: known[name] | functions for name, functions in logging.items()}
    return {**kept, **{name: value for name, value in _WHILE_DYNAMO_TRACES.items() if name in known}}


_LEVELS = ("debug", "info", "warn", "error", "exception", "critical", "log")
"""How the methods of a logger begin that log; transformers adds some."""


def leave_unguarded(inputs: Sequence[Node]) -> None:
    """Leave out Dynamo's guards on tensors that are a graph's inputs: the caller sees to it that they are the same.

    There are as many as the model has tensors. Public would be `guard_filter_fn`, with which all guards are made twice.
    """
    sources = {node._dynamo_source for node in inputs}  # type: ignore[attr-defined]  # Dynamo sets it
    guards = TracingContext.get().guards_context.dynamo_guards
    guards.inner = type(guards.inner)(
        guard
        for guard in guards.inner
        if guard.originating_source not in sources or guard.create_fn_name() != "TENSOR_MATCH"
    )


def stand_in_mode() -> FakeTensorMode:
    """The mode of the fake tensors in which Dynamo compiles."""
    mode = detect_fake_mode()
    assert mode is not None, "called outside of a compilation"
    return mode


@contextmanager
def compiling() -> Iterator[None]:
    """A compilation of our own, in which no code of the user's is captured and so Dynamo has no part."""
    with tracing_context(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
        yield


def stand_in(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake for an input of Dynamo's graph, with the sizes that Dynamo made dynamic."""
    context = TracingContext.get().tensor_to_context.get(tensor)  # type: ignore[no-untyped-call]  # torch's
    return mode.from_tensor(tensor, symbolic_context=context, source=context.tensor_source if context else None)


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor is part of a trace, and not one from outside."""
    return isinstance(tensor, FakeTensor | FunctionalTensor) or tensor.device.type == "meta"


def device_of(tensor: Tensor) -> torch.device:
    """The device of a tensor; of a fake one it is read from where it is kept, since `device` asks every mode."""
    if isinstance(tensor, FakeTensor) and not tensor.fake_mode.in_kernel_invocation:
        return tensor.fake_device
    return tensor.device


@contextmanager
def tracing(mode: FakeTensorMode, has_lstm: bool) -> Iterator[None]:
    """Settings for a trace of our own, in Dynamo's compilation.

    The backward stays in this thread, where all this holds. Saved-tensor hooks, which activation checkpointing is made
    of, work; torch turns them off in a trace. oneDNN's LSTM cannot be looked into; without an LSTM oneDNN stays, since
    convolutions take their layouts from it (`torch.backends.mkldnn.flags` sets more than this, and warns of GPUs).
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        if mode.shape_env is not None:  # sizes and numbers known only at run time need not appear in what is returned
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        before = torch._C._autograd._saved_tensors_hooks_set_tracing(False)
        stack.callback(torch._C._autograd._saved_tensors_hooks_set_tracing, before)
        if has_lstm:
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
        stack.enter_context(mode)
        stack.enter_context(enable_python_dispatcher())
        yield


def untraced() -> Any:
    """Inside, operators run for real though a trace is under way."""
    return _disable_current_modes()


def as_dynamos(module: GraphModule, static: int) -> None:
    """Give a graph of ours what compilers look for in Dynamo's.

    Args:
        module: the graph.
        static: so many of the inputs are marked as Dynamo marks a module's parameters: CUDA graphs then use their
            memory where it is, and do not copy it. `torch._dynamo.mark_static_address` is for tensors that it sees.
    """
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        node._dynamo_source = None
        if index < static:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    module.meta["dynamo_compile_id"] = CompileContext.current_compile_id()
    module._param_name_to_source = {}  # type: ignore[assignment]  # Dynamo sets it, nn.Module types it


def hooks_of_all_modules() -> tuple[dict[int, Any], ...]:
    """The dicts of hooks that run for every module; there are functions to add to them, none to look."""
    return (
        of_modules._global_forward_hooks,
        of_modules._global_forward_pre_hooks,
        of_modules._global_backward_hooks,
        of_modules._global_backward_pre_hooks,
    )
