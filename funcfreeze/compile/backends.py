"""The compiler that `torch.compile`'s arguments name."""

from __future__ import annotations

from funcfreeze.compile.options import Backend, Options

_STATE_IS_KNOWN_TO_FIT = {"size_asserts": False}
"""Inductor checks every input's sizes at every call; guards have looked at the batch, and a state is checked once."""


def compiler(options: Options) -> Backend:
    """From a graph and its inputs to a callable, as the options say."""
    if callable(options.backend):
        return options.backend
    if options.backend != "inductor":
        from torch._dynamo.backends.registry import lookup_backend

        found: Backend = lookup_backend(options.backend)
        return found
    from torch import _TorchCompileInductorWrapper

    given = {**_STATE_IS_KNOWN_TO_FIT, **options.options}
    inductor: Backend = _TorchCompileInductorWrapper(options.mode, given, options.dynamic)  # type: ignore[no-untyped-call]
    return inductor
