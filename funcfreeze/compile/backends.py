"""The compiler that `torch.compile`'s arguments name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from funcfreeze.compile.options import Options

_STATE_IS_KNOWN_TO_FIT = {"size_asserts": False}
"""Inductor checks every input's sizes at every call; guards have looked at the batch, and a state is checked once."""


def compiler(options: Options) -> Callable[[GraphModule, list[Any]], Callable[..., Any]]:
    """From a graph and its inputs to a callable, as the options say."""
    if callable(options.backend):
        return options.backend
    if options.backend != "inductor":
        from torch._dynamo.backends.registry import lookup_backend

        found: Callable[[GraphModule, list[Any]], Callable[..., Any]] = lookup_backend(options.backend)
        return found
    from torch import _TorchCompileInductorWrapper

    wrapper = _TorchCompileInductorWrapper(options.mode, {**_STATE_IS_KNOWN_TO_FIT, **options.options}, options.dynamic)
    compile: Callable[[GraphModule, list[Any]], Callable[..., Any]] = wrapper
    return compile
