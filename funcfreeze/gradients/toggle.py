"""The recipe people write: one `backward(retain_graph=True)` per loss over one forward, into what the loss may update.

It walks the graph once for every loss, and it is what everybody means: what other engines are compared with. People
toggle `requires_grad` so that a backward leaves other parameters alone; naming the parameters says the same, and works
where toggling after the forward cannot: activation checkpointing recomputes with the flags as they are then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funcfreeze.declare.routes import scalar_like
from funcfreeze.gradients.explained import explained, walking
from funcfreeze.gradients.forward import Forward, forward
from funcfreeze.gradients.law import Evaluate, Outcome, Routing, SeparateOutcome
from funcfreeze.gradients.outside import Outside
from funcfreeze.gradients.returned import nothing
from funcfreeze.gradients.seed import seed_of
from funcfreeze.gradients.sums import add
from funcfreeze.gradients.weights import UNIT_WEIGHT


def accumulate(
    losses: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    routing: Routing,
    weights: Sequence[float | Tensor],
    seed: Tensor | None = None,
) -> list[dict[int, Tensor]]:
    """Add every loss's weighted gradient to `.grad` of the leaves it may update, one backward after another.

    Not where a rule decides: there each loss's is taken off `.grad` after its backward, and `.grad` is None in the end.

    Args:
        losses: scalar losses of one live graph, in the routing's order; None where absent.
        leaves: the leaf tensors, in the routing's order, all requiring grad where routed.
        routing: which loss may update which leaf.
        weights: the value of every weight index.
        seed: the cotangent that every loss starts with; None is one.

    Returns:
        For each loss, leaf -> its gradient, at leaves under a rule.
    """
    ruled = sorted(routing.ruled)
    apart: list[dict[int, Tensor]] = []
    for name, loss, row in zip(routing.losses, losses, routing.weights, strict=True):
        if loss is not None and loss.requires_grad and row:
            weighted = {index: weights[weight] for index, weight in row if weight != UNIT_WEIGHT}
            held = {index: leaves[index].grad for index in weighted}
            for index in weighted:
                leaves[index].grad = None
            allowed = [leaves[index] for index, _ in row]
            with explained(walking, [name]):
                loss.backward(seed_of(loss, seed), retain_graph=True, inputs=allowed)  # type: ignore[no-untyped-call]
            for index, weight in weighted.items():
                gradient = leaves[index].grad
                scaled = None if gradient is None else gradient * scalar_like(weight, gradient)
                leaves[index].grad = add(held[index], scaled)
        apart.append({leaf: gradient for leaf in ruled if (gradient := leaves[leaf].grad) is not None})
        for leaf in ruled:
            leaves[leaf].grad = None
    return apart


_REFUSAL = (
    "engine='toggle' computes gradients that carry no graph, and grad mode is on while this requires grad: {}; use "
    "engine='routed' or 'reference', whose gradients can be differentiated, or call it under torch.no_grad()"
)


class Toggle:
    """The recipe as an engine, on leaf copies of the parameters."""

    finds_other_leaves = False

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
        live = _forward(evaluate, params, routing)
        apart = accumulate(live.losses, live.leaves, routing, routing.weight_values(step), seed)
        outside = Outside(live.leaves)

        def refuse(tensor: Tensor) -> bool:
            if grad_mode and outside.reached_from(tensor):
                raise RuntimeError(_REFUSAL.format("a tensor that `losses` uses beside the parameters"))
            return False

        gradients = [leaf.grad for leaf in live.leaves]
        return Outcome(gradients, *live.let_go(routing, refuse), apart=apart if routing.places else ())

    def separate(
        self,
        evaluate: Evaluate,
        params: Sequence[Tensor],
        routing: Routing,
        step: Tensor | None,
        seed: Tensor | None = None,
    ) -> SeparateOutcome:
        """What each loss's backwards alone leave in `.grad`."""
        live = _forward(evaluate, params, routing)
        weights = routing.weight_values(step)
        gradients = []
        for index in range(len(live.losses)):
            alone = [loss if turn == index else None for turn, loss in enumerate(live.losses)]
            apart = accumulate(alone, live.leaves, routing, weights, seed)
            gradients.append([apart[index].get(leaf, own.grad) for leaf, own in enumerate(live.leaves)])
            for leaf in live.leaves:
                leaf.grad = None
        return SeparateOutcome(gradients, *live.let_go(routing, nothing))


def _forward(evaluate: Evaluate, params: Sequence[Tensor], routing: Routing) -> Forward:
    """The forward; what a backward inside of `losses` has left in `.grad` is none of the losses' gradients."""
    with torch.no_grad():
        live = forward(evaluate, params, routing)
    for leaf in live.leaves:
        leaf.grad = None
    return live
