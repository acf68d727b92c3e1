"""The recipe people write: toggle `requires_grad`, one `backward(retain_graph=True)` per loss, over one forward.

It walks the graph once for every loss, and it is what everybody means: what other engines are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from funcfreeze.declare.routes import scalar_like
from funcfreeze.gradients.forward import forward, nothing
from funcfreeze.gradients.law import Evaluate, Outcome, Routing, SeparateOutcome
from funcfreeze.gradients.outside import Outside
from funcfreeze.gradients.seed import seed_of
from funcfreeze.gradients.weights import UNIT_WEIGHT


def accumulate(
    losses: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    routing: Routing,
    weights: Sequence[float | Tensor],
    seed: Tensor | None = None,
) -> None:
    """Add every loss's weighted gradient to `.grad` of the leaves it may update, one backward after another.

    Args:
        losses: scalar losses of one live graph, in the routing's order; None where absent.
        leaves: the leaf tensors, in the routing's order, all requiring grad where routed.
        routing: which loss may update which leaf.
        weights: the value of every weight index.
        seed: the cotangent that every loss starts with; None is one.
    """
    for loss, row in zip(losses, routing.weights, strict=True):
        if loss is not None and loss.requires_grad:
            weighted = {index: weights[weight] for index, weight in row if weight != UNIT_WEIGHT}
            held = {index: leaves[index].grad for index in weighted}
            for index in weighted:
                leaves[index].grad = None
            _backward(loss, leaves, {index for index, _ in row}, seed_of(loss, seed))
            for index, weight in weighted.items():
                leaves[index].grad = _plus(held[index], leaves[index].grad, weight)


def _plus(held: Tensor | None, gradient: Tensor | None, weight: float | Tensor) -> Tensor | None:
    if gradient is None:
        return held
    scaled = gradient * scalar_like(weight, gradient)
    return scaled if held is None else held + scaled


def _backward(loss: Tensor, leaves: Sequence[Tensor], allowed: AbstractSet[int], seed: Tensor) -> None:
    root = loss.view_as(loss) if loss.is_leaf else loss  # a loss that is itself a parameter is toggled with it
    required = [leaf.requires_grad for leaf in leaves]
    _toggle(leaves, [index in allowed for index in range(len(leaves))])
    try:
        # `inputs` only keeps the gradient out of tensors that are no parameters here, a teacher in a closure, say
        root.backward(seed, retain_graph=True, inputs=[leaves[index] for index in sorted(allowed)])  # type: ignore[no-untyped-call]
    finally:
        _toggle(leaves, required)


def _toggle(leaves: Sequence[Tensor], required: Sequence[bool]) -> None:
    for leaf, value in zip(leaves, required, strict=True):
        leaf.requires_grad_(value)


_REFUSAL = (
    "engine='toggle' computes gradients that carry no graph, and grad mode is on while this requires grad: {}; use "
    "engine='routed' or 'reference', whose gradients can be differentiated, or call it under torch.no_grad()"
)


class Toggle:
    """The recipe as an engine, on leaf copies of the parameters."""

    def merged(
        self,
        evaluate: Evaluate,
        params: Sequence[Tensor],
        routing: Routing,
        step: Tensor | None,
        seed: Tensor | None = None,
    ) -> Outcome:
        """Every leaf's gradient, as it stands in `.grad` after all backwards."""
        grad_mode = torch.is_grad_enabled()
        paths = [path for path, param in zip(routing.paths, params, strict=True) if grad_mode and param.requires_grad]
        if paths:
            raise RuntimeError(_REFUSAL.format(", ".join(paths)))
        with torch.no_grad():
            live = forward(evaluate, params, routing)
        accumulate(live.losses, live.leaves, routing, routing.weight_values(step), seed)
        outside = Outside(live.leaves)

        def refuse(tensor: Tensor) -> bool:
            if grad_mode and outside.reached_from(tensor):
                raise RuntimeError(_REFUSAL.format("a tensor that `losses` uses beside the parameters"))
            return False

        return Outcome([leaf.grad for leaf in live.leaves], *live.let_go(routing, refuse))

    def separate(
        self,
        evaluate: Evaluate,
        params: Sequence[Tensor],
        routing: Routing,
        step: Tensor | None,
        seed: Tensor | None = None,
    ) -> SeparateOutcome:
        """What each loss's backwards alone leave in `.grad`."""
        with torch.no_grad():
            live = forward(evaluate, params, routing)
        weights = routing.weight_values(step)
        gradients = []
        for index in range(len(live.losses)):
            alone = [loss if turn == index else None for turn, loss in enumerate(live.losses)]
            accumulate(alone, live.leaves, routing, weights, seed)
            gradients.append([leaf.grad for leaf in live.leaves])
            for leaf in live.leaves:
                leaf.grad = None
        return SeparateOutcome(gradients, *live.let_go(routing, nothing))
