"""The one forward of a step, with autograd on, on stand-ins for the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcfreeze.gradients.law import Evaluate, Routing
from funcfreeze.gradients.returned import check_differentiable, check_losses, detached


def nothing(_: Tensor) -> bool:
    """Keep nothing."""
    return False


@dataclass
class Forward:
    """A forward whose graph is alive.

    Attributes:
        leaves: the stand-ins: leaf copies; those that no loss may update do not require grad, so nothing is kept for
            them. But where grad mode is on, what requires grad is stood in for by a view of it, which is no leaf.
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
        rest = detached(self.rest, keep)
        self.losses.clear()
        self.rest = None
        return values, rest


def forward(evaluate: Evaluate, params: Sequence[Tensor], routing: Routing) -> Forward:
    """Evaluate the losses once, with autograd on.

    An ambient `torch.no_grad()` or `torch.inference_mode()` does not matter to it, but cuts it off from what is around.

    Raises:
        RuntimeError: the forward wrote to a parameter that it was to stay connected with.
    """
    routed = routing.routed
    grad_mode = torch.is_grad_enabled()
    connected = frozenset(index for index, param in enumerate(params) if grad_mode and param.requires_grad)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [
            _view(param) if index in connected else param.detach().requires_grad_(index in routed)
            for index, param in enumerate(params)
        ]
        versions = {index: leaves[index]._version for index in connected}
        returned, rest = evaluate(leaves)
        _refuse_writes(
            [routing.paths[index] for index in sorted(connected) if leaves[index]._version != versions[index]]
        )
        losses = check_losses(returned, routing)
    present = {name: loss for name, loss in zip(routing.losses, losses, strict=True) if loss is not None}
    check_differentiable([name for name, loss in present.items() if not loss.requires_grad], routing)
    return Forward(leaves, connected, losses, rest)


def _view(param: Tensor) -> Tensor:
    """The same values under a node of their own, where the forward's graph ends; sparse tensors have no views."""
    return param.view_as(param) if param.layout in (torch.strided, torch.jagged) else param.clone()


def _refuse_writes(paths: Sequence[str]) -> None:
    if paths:
        raise RuntimeError(
            f"`losses` wrote to {', '.join(paths)} in place, which requires grad: the value to differentiate at is "
            "gone; write to a copy (.clone())"
        )
