"""What a compiler says when `losses` cannot be compiled, in the terms of the user's code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

_NEEDS_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)

_OWN = ("/torch/", "/optree/", "/funcfreeze/", "<frozen")


def explained(error: Exception) -> Exception:
    """The error to raise instead, or the same one: user mistakes and missing operators need no other words."""
    if not isinstance(error, _NEEDS_VALUES):
        return error
    where = next(_users_lines(error), "in the optimizer" if _in_an_optimizer(error) else "in the forward")
    plain = RuntimeError(
        f"{where}: Python asks for the value of a tensor (if, while, int(...), a size that depends on values), which "
        "a compiled step does not have; use torch.where or another tensor operation, compute it before the step and "
        "pass it in the batch, take an optimizer of funcfreeze.optim for one of torch's, or build the Step with "
        "compile=False"
    )
    plain.__cause__ = error
    return plain


def _in_an_optimizer(error: Exception) -> bool:
    return any("/optim/" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def other_than_the_steps(error: Exception) -> Exception:
    """The error to raise instead of one of Dynamo's that no code of the step raised, or the same one."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    if not isinstance(error, FailOnRecompileLimitHit):
        return error
    return RuntimeError(
        "the step was compiled for as many different sizes, dtypes or settings as torch allows "
        "(torch._dynamo.config.recompile_limit); pad batches to a few sizes, leave out dynamic=False, or raise it"
    )


def _users_lines(error: Exception) -> Iterator[str]:
    """File, line and text of the innermost frames that are the user's, innermost first."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(part in frame.filename for part in _OWN):
            yield f"{frame.filename}:{frame.lineno} ({frame.line})"
