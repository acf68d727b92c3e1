"""Errors of torch that users of several losses typically meet: torch's text, and one line of ours below it.

The line names the losses, where it is known which were being walked, the usual cause and the cure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

MARK = "\nfuncfreeze: "
"""What our line begins with, so that nobody takes it for torch's."""

_CAUSES = {
    "Trying to backward through the graph a second time": (
        "part of the graph has been walked before, and is gone. Usually a tensor kept from an earlier step (a hidden "
        "state, say) still hangs on that step's graph: keep it detached, h = h.detach(). Or another backward, or "
        "torch.autograd.grad, has walked this already: give that retain_graph=True, or create_graph=True where its "
        "result is differentiated"
    ),
    "modified by an inplace operation": (
        "something that the graph needs was written to after it was computed. Usually an optimizer step came between "
        "the forward and this backward, or a tensor kept from an earlier step (a hidden state, say) was not detached: "
        "do all backwards before optimizer.step(), keep h.detach(), and write to no parameter or activation in place"
    ),
    "does not require grad": (
        "it differentiates at something that is frozen here: a parameter that no route mentions or that has "
        "requires_grad=False, what is computed from such alone, or what was detached or made under torch.no_grad(). "
        "Route the parameter, or let what it differentiates at require grad before it is used"
    ),
}
"""A part of torch's text -> what usually is the matter, and what to do."""

_FROM_TORCH_FUNC = ("functorch", "torch.func", "transform, the function provided", "doesn't have storage")

_NOT_FOLLOWED = (
    "engine='reference' runs `losses` inside torch.func, which does not follow this (torch.autograd.grad, backward(), "
    "requires_grad_(), .data, saved-tensor hooks, old-style Functions); use engine='routed', which does"
)


class explained:  # a function by its use: `with explained(...)`
    """Adds our line to an error of torch that is raised inside the block; the type stays RuntimeError.

    Args:
        where: says what was going on; called only if there is such an error.
        given: what it is called with.
        inside_func: whether a transform of torch.func is at work.

    >>> import torch
    >>> with explained(walking, ["adv"]):
    ...     loss = torch.ones(2, requires_grad=True).square().sum()
    ...     loss.backward(), loss.backward()
    Traceback (most recent call last):
        ...
    RuntimeError: Trying to backward through the graph a second time ...
    funcfreeze: walking the loss 'adv': part of the graph has been walked before, and is gone. Usually a tensor kept ...
    """

    def __init__(self, where: Callable[..., str], *given: Any, inside_func: bool = False) -> None:
        self.where = where
        self.given = given
        self.inside_func = inside_func

    def __enter__(self) -> None:
        """There is nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is RuntimeError and MARK not in str(error):
            text = str(error)
            line = next(
                (f"{self.where(*self.given)}: {cause}" for part, cause in _CAUSES.items() if part in text), None
            )
            if self.inside_func and (line is not None or any(part in text for part in _FROM_TORCH_FUNC)):
                line = _NOT_FOLLOWED if line is None else f"{line}. And {_NOT_FOLLOWED}"
            if line is not None:
                raise RuntimeError(text + MARK + line) from error


def walking(losses: Iterable[str]) -> str:
    """Where: in the backward of these losses."""
    return f"walking the {_named(losses)}"


def inside(losses: Iterable[str]) -> str:
    """Where: in the user's function that computes these losses."""
    return f"inside `losses`, which computes the {_named(losses)}"


def _named(losses: Iterable[str]) -> str:
    names = [repr(name) for name in losses]
    return f"loss {names[0]}" if len(names) == 1 else f"losses {', '.join(names)}"
