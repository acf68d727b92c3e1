"""What a compiler leaves alone: it runs as it is in the middle of compiled code, between two graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(f: Callable[P, R]) -> Callable[P, R]:
    """The function as `torch.compiler.disable` makes it, which would import the compiler: that takes seconds.

    A graph ends before it, and another begins after it; where there may be only one, the error says why.
    """

    disabled: list[Callable[P, R]] = []  # made when it is first needed

    @wraps(f)
    def door(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # nobody has compiled anything
            return f(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(f, reason=_REASON))  # type: ignore[no-untyped-call]  # torch's
        return disabled[0](*args, **kwargs)

    # what `disable` notes on a function; Dynamo does not look into it then
    vars(door).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=_REASON)
    return door


_REASON = (
    "funcfreeze plans the backward of a graph of autograd, of which there is none while torch.compile traces. Call it "
    "outside of the compiled function, or compile without fullgraph=True; ff.grad and ff.Step(compile=True) are "
    "compiled as a whole"
)
