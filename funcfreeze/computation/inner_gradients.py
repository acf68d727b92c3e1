"""Gradients that `losses` takes itself, at a parameter that is a constant there: what to say then.

A parameter that no loss may update does not require grad in the forward, so that freezing costs nothing. Code that
differentiates at one, as adaptive weights do, gets torch's error, which does not know the parameter's name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import CodeType, TracebackType
from typing import Any

import torch
from torch import Tensor

from funcfreeze.gradients.explained import MARK

_TAKERS: tuple[CodeType, ...] = (torch.autograd.grad.__code__, torch.autograd.backward.__code__)


def refuse_constants(error: RuntimeError, params: Mapping[str, Tensor], routed: Collection[str]) -> None:
    """Name the parameters that do not require grad, if what failed was to differentiate at one.

    Args:
        error: what was raised.
        params: what stands for the parameters in the forward, by path.
        routed: those that some loss may update, if not at this count.

    Raises:
        RuntimeError: torch's, with a line that names parameters and cure.
    """
    asked = {id(given) for given in _asked_for(error.__traceback__)}
    named = [path for path, tensor in params.items() if id(tensor) in asked and not tensor.requires_grad]
    if not named:
        return
    shown = ", ".join(named[:3]) + (", ..." if len(named) > 3 else "")
    chosen = repr(named[0]) if len(named) == 1 else repr(named[:3])
    when = " at this count, where its routes are not active" if any(path in routed for path in named) else ""
    raise RuntimeError(
        f"{error}{MARK}`losses` takes a gradient itself, at {shown}, which no loss may update{when}: that is a "
        f"constant in a Step's forward, so that freezing it costs nothing. Build the Step with differentiable={chosen} "
        "(any selector), which lets it require grad, or route a loss to it"
    ) from error


def _asked_for(traceback: TracebackType | None) -> list[Any]:
    """What the innermost call of `torch.autograd.grad` or `backward` on the way to an error was to differentiate at."""
    asked: list[Any] = []
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code in _TAKERS:
            inputs = frame.f_locals.get("inputs")
            if isinstance(inputs, Mapping):
                inputs = list(inputs.values())
            asked = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        traceback = traceback.tb_next
    return asked
