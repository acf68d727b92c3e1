"""The law in an ordinary eager loop: losses already computed, on a live graph, into `.grad`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from funcfreeze.functional import module_leaves, refuse_unusable
from funcfreeze.gradients import Routing
from funcfreeze.gradients.returned import check_differentiable, check_losses
from funcfreeze.gradients.routed import hook_handles_made, planned_backward
from funcfreeze.plan import resolve_plan


def backward(losses: Mapping[str, Tensor | None], routes: object, model: nn.Module) -> None:
    """Accumulate every loss's gradient into `.grad` of the parameters it may update, as toggling `requires_grad` would.

    One call instead of the recipe; the optimizer, the scaler and all the rest of the loop stay as they are. The graph
    is used up. A parameter that no loss touches keeps the `.grad` it has, be it None.

    Args:
        losses: name -> 0-d floating tensor on a live graph; None for a loss that is absent this time.
        routes: loss name -> which parameters it may update (see `Route`), or a `Plan`, which need not be resolved anew.
        model: the module whose parameters the losses were computed from.

    Raises:
        RouteError: everything that is wrong with the routes or the losses, at once.
        TypeError: the model is wrapped by DDP, sharded by `fully_shard`, or a ScriptModule.

        Whatever is raised, no `.grad` has changed.

    >>> from torch import nn
    >>> net = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    >>> features = net["encoder"](torch.ones(1, 2))
    >>> loss = net["head"](features).sum()
    >>> backward({"cls": loss, "adv": -loss}, {"cls": "*", "adv": "encoder"}, net)
    >>> net["encoder"].weight.grad, net["head"].bias.grad
    (tensor([[0., 0.],
            [0., 0.]]), tensor([1.]))
    """
