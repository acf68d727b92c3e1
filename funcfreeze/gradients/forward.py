"""The one forward of a step, with autograd on, on stand-ins for the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcfreeze.gradients.explained import explained, inside
from funcfreeze.gradients.law import Evaluate, Routing
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.gradients.returned import check_losses, detached


@dataclass
class Forward:
    """A forward whose graph is alive.

    Attributes:
        leaves: the stand-ins: leaf copies; those that no loss may update, and that are not asked to be differentiable,
            do not require grad, so nothing is kept for them. But where grad mode is on, what requires grad is stood in
            for by a view of it, which is no leaf.
        connected: the indices of those views.
        losses: the losses in the routing's order, on the live graph; None where absent.
        rest: what came beside the losses, on the live graph too.
    """

    leaves: list[Tensor]
    connected: frozenset[int]
    losses: list[Tensor | None]
    rest: Any

    def let_go(self, routing: Routing, keep: Callable[[Tensor], bool]) -> tuple[Mapping[str, Tensor], Any]:
        """The losses by name and the rest, all detached but what is to be kept; the graph is no longer held from here.

        A loss that is itself a parameter, or a view of one, is copied: a step may overwrite that.
        """
        values = {}
        for name, loss in zip(routing.losses, self.losses, strict=True):
            if loss is not None:
                value = loss if keep(loss) else loss.detach()
                values[name] = value.clone() if loss.is_leaf or loss._is_view() else value
        rest = None if self.rest is None else detached(self.rest, keep)
        self.losses.clear()
        self.rest = None
        return values, rest


def forward(evaluate: Evaluate, params: Sequence[Tensor], routing: Routing) -> Forward:
    """Evaluate the losses once, with autograd on.

    An ambient `torch.no_grad()` or `torch.inference_mode()` does not matter to it, but cuts it off from what is around.

    Raises:
        RuntimeError: the forward wrote to a parameter that it was to stay connected with.
    """
    connected = _requiring_grad(params) if torch.is_grad_enabled() else frozenset()
    known = {} if routing.live is None else routing.live.leaves
    with grad_mode(True):
        leaves = [
            known[index]
            if index in known
            else _view(param)
            if index in connected
            else param.detach().requires_grad_(required)
            for index, (param, required) in enumerate(zip(params, routing.requires_grad, strict=True))
        ]
        versions = {index: leaves[index]._version for index in connected}
        with explained(inside, routing.losses):
            returned, rest = evaluate(leaves)
        _refuse_writes(
            [routing.paths[index] for index in sorted(connected) if leaves[index]._version != versions[index]]
        )
        losses = check_losses(returned, routing)
    return Forward(leaves, connected, losses, rest)


def _requiring_grad(params: Sequence[Tensor]) -> frozenset[int]:
    return frozenset(index for index, param in enumerate(params) if param.requires_grad)


def _view(param: Tensor) -> Tensor:
    """The same values under a node of their own, where the forward's graph ends; sparse tensors have no views."""
    return param.view_as(param) if param.layout in (torch.strided, torch.jagged) else param.clone()


def _refuse_writes(paths: Sequence[str]) -> None:
    if paths:
        raise RuntimeError(
            f"`losses` wrote to {', '.join(paths)} in place, which requires grad: the value to differentiate at is "
            "gone; write to a copy (.clone())"
        )
