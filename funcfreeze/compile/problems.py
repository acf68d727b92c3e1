"""What a compiler says when `losses` cannot be compiled, in the terms of the user's code."""

from __future__ import annotations

import re
import traceback
from collections.abc import Hashable, Iterable, Iterator

from funcfreeze.compile.private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    exc,
)

NEEDS_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)

_OWN = ("/torch/", "/optree/", "/funcfreeze/", "<frozen", "<eval_with_key>", "<string>")

_EAGER = "or build the Step with compile=False"


class SwitchedOff(Exception):
    """Dynamo did not look at the call."""


class NotAsDeclared(Exception):
    """What `losses` returned, or what the module holds, is not what was declared: an eager call says what is wrong."""


class Moved(Exception):
    """An input that was a tensor of the module is another one now, or one that was not is.

    Args:
        found: which program was called, and for each of its inputs the tensor of the module that it is, if it is one.
    """

    def __init__(self, found: Hashable) -> None:
        super().__init__(found)
        self.found = found


def raised_by(error: Exception) -> Exception:
    """The error that was raised, not as Dynamo wraps it."""
    return error.inner_exception if isinstance(error, exc.BackendCompilerFailed) else error


def is_the_users(error: Exception) -> bool:
    """Whether the user's own code raises, so that an eager call of it says what is wrong."""
    observed = isinstance(error, exc.Unsupported) and "Observed exception" in str(error)
    return observed or isinstance(error, NotAsDeclared | exc.TorchRuntimeError)


def explained(error: Exception) -> Exception:
    """The error to raise instead, or the same one: user mistakes and missing operators need no other words."""
    if isinstance(error, NEEDS_VALUES):
        if _passes(error, "/torch/autograd/"):
            return _because(error, _torchs_backward(error))
        notes = "\n".join(getattr(error, "__notes__", ()))
        told = next(_users_lines(error), None) or _line_told(f"{error}\n{notes}")
        where = told or ("in the optimizer" if _passes(error, "/optim/") else "in the forward")
        return _because(error, f"{where}: {_VALUES}")
    if isinstance(error, exc.Unsupported | exc.UserError):
        return _because(error, _graph_break(error))
    if isinstance(error, exc.FailOnRecompileLimitHit):
        return _because(
            error,
            "the step was compiled for as many different sizes, dtypes, values or settings as torch allows "
            "(torch._dynamo.config.recompile_limit). Pad batches to a few sizes, leave out dynamic=False, let what "
            "changes from step to step be a tensor in the batch, or raise the limit; TORCH_LOGS=recompiles shows what "
            "changes",
        )
    if isinstance(error, SwitchedOff):
        return RuntimeError(
            "torch.compile is switched off (torch.compiler.set_stance, TORCHDYNAMO_DISABLE), and this Step is to be "
            "compiled; build it with compile=False"
        )
    if isinstance(error, NotAsDeclared):
        return RuntimeError(
            "`losses` or the model were not as declared when the step was compiled, and are so when they are called "
            f"again; what `losses` returns must depend on its arguments and the model alone, {_EAGER}"
        )
    return _because(error, _unknown(error)) if _is_torchs(error) else error


def _is_torchs(error: Exception) -> bool:
    """Whether it was raised in torch, and by no check of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "/torch/" in frames[-1].filename


def _unknown(error: Exception) -> str:
    where = next(_users_lines(error), None) or _line_told(str(error)) or "`losses`"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (
        f"{where}: torch.compile fails on this, which runs eagerly ({type(error).__name__}: {first}); write it with "
        f"other operations, {_EAGER}"
    )


_VALUES = (
    "Python asks for the value of a tensor (if, while, int(...), a size that depends on values), which a compiled step "
    "does not have; use torch.where or another tensor operation, compute it before the step and pass it in the batch, "
    f"take an optimizer of funcfreeze.optim for one of torch's, {_EAGER}"
)


def _graph_break(error: exc.Unsupported | exc.UserError) -> str:
    """The user's line, what a step needs, and what else there is."""
    what, *rest = [line.strip() for line in str(error).splitlines() if line.strip()]
    stack = error.real_stack if isinstance(error, exc.Unsupported) else None
    where = next(_lines_of(stack or ()), None) or _line_told(str(error)) or "in the forward"
    if "ata-dependent" in what or "ata dependent" in what:
        return f"{where}: {_VALUES}"
    why = next((line.removeprefix("Explanation:").strip() for line in rest if line.startswith("Explanation:")), "")
    return (
        f"{where}: torch.compile cannot take this into a graph ({what}{': ' + why if why else ''}), and a compiled "
        "step is one graph. Write it with tensor operations, compute it before the step and pass it in the batch, "
        f"run one batch through the model first if it does this only when it is called for the first time, {_EAGER}"
    )


def _line_told(message: str) -> str | None:
    """The innermost line of user code that a message of Dynamo's tells."""
    frames = r'File "([^"]+)", line (\d+), in [^\n]*(?:\n +(?! |File )([^\n]*))?'  # not every frame has its line's text
    told = re.findall(frames, message)
    own = [f"{file}:{line} ({text})" for file, line, text in told if not any(part in file for part in _OWN)]
    return own[-1] if own else None


def _because(error: Exception, message: str) -> RuntimeError:
    plain = RuntimeError(message)
    plain.__cause__ = error
    return plain


def _torchs_backward(error: Exception) -> str:
    return (
        f"the backward of an operator of torch's asks for the value of a tensor ({str(error).strip()}), which a "
        "compiled step does not have: that of a sparse Embedding with padding_idx is one such. Take another operator "
        f"(sparse=False), {_EAGER}"
    )


def _passes(error: Exception, folder: str) -> bool:
    """Whether the error came through code in such a folder."""
    return any(folder in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _users_lines(error: Exception) -> Iterator[str]:
    """File, line and text of the frames that are the user's, innermost first."""
    return _lines_of(traceback.extract_tb(error.__traceback__))


def _lines_of(stack: Iterable[traceback.FrameSummary]) -> Iterator[str]:
    for frame in reversed([*stack]):
        if not any(part in frame.filename for part in _OWN):
            yield f"{frame.filename}:{frame.lineno} ({frame.line})"
