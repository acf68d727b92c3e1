"""What a compiler says when `losses` cannot be compiled, in the terms of the user's code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

_NEEDS_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)

_OWN = ("/torch/", "/optree/", "/funcfreeze/", "<frozen")


class SwitchedOff(Exception):
    """Dynamo did not look at the call."""


class NotAsDeclared(Exception):
    """What `losses` returned is not what was declared."""


class Moved(Exception):
    """An input that was a tensor of the module is another one now."""


def explained(error: Exception) -> Exception:
    """The error to raise instead, or the same one."""
    from torch._dynamo.exc import BackendCompilerFailed

    if isinstance(error, SwitchedOff):
        return RuntimeError(
            "torch.compile is switched off (torch.compiler.set_stance, TORCHDYNAMO_DISABLE), and this Step is to be "
            "compiled; build it with compile=False"
        )
    return error
