"""What `losses` must not do with the model's tensors, and how that is said.

A tensor of the module itself is not the state's: its value is old, and no gradient arrives. It is met where code goes
by another way than the module it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from funcfreeze.model.functional import Mark, marks_of
from funcfreeze.model.memory import memory_of


def raise_misuse(problems: Iterable[str]) -> None:
    """Raise one `RuntimeError` that tells all problems, or nothing if there is none."""
    found = list(problems)
    if found:
        raise RuntimeError("\n".join(found))


def parameter_problem(path: str, losses: Sequence[str]) -> str:
    """A parameter's own tensor was used.

    Args:
        path: of the parameter.
        losses: the names of the losses whose graph ends in it; none if it was read without a gradient.
    """
    where = f"loss {', '.join(map(repr, losses))} uses" if losses else "`losses` reads"
    return (
        f"{where} parameter {path} by another way than the model that `losses` is given (a list of parameters, a "
        "closure, an optimizer's param_groups, an alias made by .data or .detach()): that is the module's own tensor "
        "and not the state's, so its value is old and no gradient arrives. Reach it through the model, as in "
        f"model.get_parameter({path!r}); clone what is to stay as it is now (an anchor); or keep your loop and call "
        "funcfreeze.backward"
    )


def earlier_step_problem(path: str, losses: Sequence[str]) -> str:
    """A loss hangs on the graph of an earlier step, down to what stood for a parameter there."""
    return (
        f"loss {', '.join(map(repr, losses))} hangs on the graph of an earlier step, which used parameter {path}: a "
        "tensor that you keep between steps (a hidden state, say) was not detached, and the graph grows from step to "
        "step; keep h.detach()"
    )


def buffer_problem(path: str) -> str:
    """A buffer's own tensor was used though the forward writes to the buffer."""
    return (
        f"`losses` uses buffer {path} by another way than the model that it is given (a list, a closure, an alias), "
        "and the buffer changes from step to step: that is the module's own tensor and not the state's. Reach it "
        f"through the model, as in model.get_buffer({path!r})"
    )


def form_of(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    """What a parameter keeps from step to step."""
    return tensor.shape, tensor.dtype, tensor.device


def form_problem(path: str, before: Tensor, now: Tensor) -> str:
    """A parameter that no loss may update came out of the forward with another form."""
    (shape, dtype, device), (to_shape, to_dtype, to_device) = form_of(before), form_of(now)
    return (
        f"the forward gave parameter {path} another form: it had shape {tuple(shape)} and {dtype} on {device}, and has "
        f"shape {tuple(to_shape)} and {to_dtype} on {to_device} now; a state keeps its form"
    )


def write_problem(path: str) -> str:
    """A parameter that a loss may update was written to; the write has been undone."""
    return (
        f"`losses` writes to parameter {path}, which a loss may update: its gradient would belong to neither value. "
        "`losses` may only read such parameters; change them between steps, with state.replace(params=...)"
    )


def refuse_late_writes(params: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> None:
    """Refuse a step that left the state alone, but for parameters that `losses` wrote to for the first time."""
    late = [path for path, value in written.items() if memory_of(value) == memory_of(params[path])]
    if late:
        raise RuntimeError(
            f"`losses` has written to {', '.join(late)} now and not at the first step, so that the state that was "
            "passed holds the new value, which donate=False promises it does not; it is known from now on. Let the "
            "first step write to it too, or build the Step with donate=True"
        )


def refuse_writes(params: Mapping[str, Tensor], marks: Mapping[str, Mark], may_write: AbstractSet[str]) -> None:
    """Refuse a function that wrote to the state's parameters, as far as torch counts it."""
    written = [path for path, mark in marks_of(params).items() if path not in may_write and mark != marks[path]]
    if written:
        raise RuntimeError(
            f"the function given to `call` wrote to {', '.join(written)}, whose memory is the state's: it may only "
            "read parameters. Change them with state.replace(params=...), or work on copy.deepcopy(step.export(state))"
        )
