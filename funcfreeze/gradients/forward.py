"""The one forward of a step, with autograd on, on leaf copies of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcfreeze.gradients.explained import explained, inside
from funcfreeze.gradients.law import Evaluate, Routing
from funcfreeze.gradients.returned import check_losses, detached


@dataclass
class Forward:
    """A forward whose graph is alive.

    Attributes:
        leaves: the leaf copies; those that no loss may update, and that are not asked to be differentiable, do not
            require grad, so nothing is kept for them.
        losses: the losses in the routing's order, on the live graph; None where absent.
        values: every present loss, detached.
        rest: what came beside the losses, detached.
    """

    leaves: list[Tensor]
    losses: list[Tensor | None]
    values: Mapping[str, Tensor]
    rest: Any


def forward(evaluate: Evaluate, params: Sequence[Tensor], routing: Routing) -> Forward:
    """Evaluate the losses once; an ambient `torch.no_grad()` or `torch.inference_mode()` does not matter."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [
            param.detach().requires_grad_(required)
            for param, required in zip(params, routing.requires_grad, strict=True)
        ]
        with explained(inside, routing.losses):
            returned, rest = evaluate(leaves)
        losses = check_losses(returned, routing)
    present = {name: loss for name, loss in zip(routing.losses, losses, strict=True) if loss is not None}
    return Forward(leaves, losses, {name: _value(loss) for name, loss in present.items()}, detached(rest))


def _value(loss: Tensor) -> Tensor:
    """The loss detached; one that is itself a parameter, or a view of one, is copied: a step may overwrite that."""
    return loss.detach().clone() if loss.is_leaf or loss._is_view() else loss.detach()
