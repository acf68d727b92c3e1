"""The compiler that `torch.compile`'s arguments name."""

from __future__ import annotations

from funcfreeze.compile.options import Backend, Options

_DEFAULTS = {
    # Inductor would check every input's sizes at every call: guards have looked at the batch, a state is checked once.
    "size_asserts": False,
    # Inductor would turn convolutions to channels-last, but their backward wants the layout that was traced. With both
    # in one graph, each activation and weight is then kept in both: ResNet-18 on a CPU took 1.5 times as long and 1.35
    # times the memory. A model that was put into channels-last stays so.
    "layout_optimization": False,
}
"""Options of Inductor, unless others are given."""


def compiler(options: Options) -> Backend:
    """From a graph and its inputs to a callable, as the options say."""
    if callable(options.backend):
        return options.backend
    if options.backend != "inductor":
        from torch._dynamo.backends.registry import lookup_backend

        found: Backend = lookup_backend(options.backend)
        return found
    from torch import _TorchCompileInductorWrapper

    given = {**_DEFAULTS, **options.options}
    inductor: Backend = _TorchCompileInductorWrapper(options.mode, given, options.dynamic)  # type: ignore[no-untyped-call]
    return inductor
