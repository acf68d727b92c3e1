"""The meaning of the law in `torch.func`: each loss's gradient over the parameters it may update, from one forward.

One `vjp` is nested in another for each loss. Level k differentiates loss k alone, over that loss's own parameters; the
other losses travel through it as auxiliary output. So there is one forward, one dropout mask and one BatchNorm update,
and no loss's infinite derivative can spoil another's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp
from torch.overrides import TorchFunctionMode

from funcfreeze.declare.routes import scalar_like
from funcfreeze.gradients.explained import explained, inside, walking
from funcfreeze.gradients.functorch import is_transforming
from funcfreeze.gradients.hooks import noticing_hooks
from funcfreeze.gradients.law import Evaluate, Outcome, Routing, SeparateOutcome, summed
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.gradients.returned import check_losses, detached, refuse_constants
from funcfreeze.gradients.seed import seed_of
from funcfreeze.gradients.weights import UNIT_WEIGHT, LossWeights
from funcfreeze.model.containers import flatten
from funcfreeze.model.wrappers import beneath


class Reference:
    """Per-loss gradients by nested `torch.func.vjp`, then summed."""

    finds_other_leaves = False

    def merged(
        self,
        evaluate: Evaluate,
        params: Sequence[Tensor],
        routing: Routing,
        step: Tensor | None,
        seed: Tensor | None = None,
    ) -> Outcome:
        """The sum of every loss's gradients."""
        return summed(self._apart(evaluate, params, routing, step, seed), routing)

    def separate(
        self,
        evaluate: Evaluate,
        params: Sequence[Tensor],
        routing: Routing,
        step: Tensor | None,
        seed: Tensor | None = None,
    ) -> SeparateOutcome:
        """Every loss's gradients over the parameters it may update, times their weights."""
        with torch.no_grad():
            return self._apart(evaluate, params, routing, step, seed)

    def _apart(
        self,
        evaluate: Evaluate,
        params: Sequence[Tensor],
        routing: Routing,
        step: Tensor | None,
        seed: Tensor | None,
    ) -> SeparateOutcome:
        """The same, by torch.func's rule: with a graph where grad mode is on and something outside requires grad."""
        levels = _Levels(evaluate, routing, routing.weight_values(step), seed)
        # `vjp` turns grad mode on for itself; that of outside decides about what is outside. Without transforms around,
        # a graph is made there in any case, to tell constants from what depends on something outside
        given = params if levels.kept else [param.detach() for param in params]
        with noticing_hooks() as noticed, grad_mode(levels.grad_mode or not levels.kept):
            found = levels.differentiate(0, dict(enumerate(given)))
        if noticed.nodes or not noticed.all_known:
            raise RuntimeError(
                "a hook was registered during the forward, and torch.func does not run hooks on activations; use "
                "engine='routed' outside of its transforms, which does"
            )
        present = {name: found.losses[index] for index, name in enumerate(routing.losses) if index in found.losses}
        refuse_constants(
            [
                name
                for name, loss in present.items()
                if not (name in levels.differentiable or loss.requires_grad or name in routing.resting)
            ]
        )
        # clones: a loss that is a parameter, or a view of one, would change when a step overwrites that
        losses = {name: (loss if levels.kept else loss.detach()).clone() for name, loss in present.items()}
        gradients = [[found.gradients[index].get(leaf) for leaf in range(len(params))] for index in found.gradients]
        return SeparateOutcome(gradients[::-1], losses, levels.rebuild(found.rest))


class _Found(NamedTuple):
    """What comes out of a level and all those inside it: nothing but tensors, so that `vjp` can carry it."""

    losses: dict[int, Tensor]
    gradients: dict[int, dict[int, Tensor]]
    rest: list[Tensor]


class _Levels:
    """The nest of `vjp`s around one forward, and what it learns that is not a tensor."""

    def __init__(
        self, evaluate: Evaluate, routing: Routing, weights: Sequence[float | Tensor], seed: Tensor | None
    ) -> None:
        self.evaluate = evaluate
        self.routing = routing
        self.weights = weights
        self.seed = seed
        self.differentiable: set[str] = set()
        self.grad_mode = torch.is_grad_enabled()
        self.carried = self.grad_mode and is_transforming()
        self.kept = self.grad_mode or is_transforming()  # forward mode goes on where reverse mode is off

    def differentiate(self, level: int, params: dict[int, Tensor]) -> _Found:
        """Evaluate the losses with `params`, and differentiate those from `level` on."""
        if level == len(self.routing.losses):
            return self._forward(params)
        name, row = self.routing.losses[level], self.routing.weights[level]
        if not row:  # none of its routes is active
            inner = self.differentiate(level + 1, params)
            return inner._replace(gradients={**inner.gradients, level: {}})
        touched: set[int] = set()

        def alone(own: dict[int, Tensor]) -> tuple[Tensor, _Found]:
            found = self.differentiate(level + 1, {**params, **own})
            self.differentiable |= {self.routing.losses[k] for k, loss in found.losses.items() if loss.requires_grad}
            loss = found.losses.get(level, torch.zeros(()))
            with explained(walking, [name]):
                touched.update(_delivered(loss, own))
            return loss, found

        own = {leaf: params[leaf] for leaf, _ in row}
        loss, pullback, carried = vjp(alone, own, has_aux=True)  # type: ignore[misc]  # its stub forgets has_aux
        found = _Found(*carried)
        with torch.set_grad_enabled(self.carried):
            found.gradients[level] = self._pull_back(name, pullback, loss, row, touched)
        return found

    def _pull_back(
        self, name: str, pullback: Any, loss: Tensor, row: LossWeights, touched: set[int]
    ) -> dict[int, Tensor]:
        """The loss's gradients where it touches, times their weights."""
        if not touched:
            return {}
        with explained(walking, [name]):
            (every,) = pullback(seed_of(loss, self.seed))
        return {
            leaf: every[leaf] if weight == UNIT_WEIGHT else every[leaf] * scalar_like(self.weights[weight], every[leaf])
            for leaf, weight in row
            if leaf in touched
        }

    def _forward(self, params: dict[int, Tensor]) -> _Found:
        with explained(inside, self.routing.losses, inside_func=True), _NoExchange():
            returned, rest = self.evaluate(list(params.values()))
        losses = check_losses(returned, self.routing, inside_func=True)
        self.carried |= self.grad_mode and any(loss is not None and beneath(loss).requires_grad for loss in losses)
        leaves, self.structure = flatten(detached(rest, lambda tensor: self.kept))
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}  # one in two places stays one
        places = {key: place for place, key in enumerate(tensors)}
        self.skeleton = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [places.get(id(leaf)) for leaf in leaves]
        present = {index: loss for index, loss in enumerate(losses) if loss is not None}
        return _Found(present, {}, [*tensors.values()])

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """What came beside the losses, put together again from its tensors."""
        plain = tensors if self.kept else [tensor.detach() for tensor in tensors]
        return self.structure.unflatten(
            leaf if place is None else plain[place] for leaf, place in zip(self.skeleton, self.places, strict=True)
        )


class _NoExchange(TorchFunctionMode):
    """Refuses `tensor.data = ...` inside: torch.func's wrappers do not survive it, and the process may not either."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]  # a property written in C
            raise RuntimeError("torch.func does not follow an assignment to .data of a tensor")
        return func(*args, **(kwargs or {}))


def _delivered(loss: Tensor, own: dict[int, Tensor]) -> set[int]:
    """The parameters at which autograd delivers a gradient of the loss; `vjp` itself turns "none" into zeros."""
    if not loss.requires_grad:
        return set()
    gradients = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
    return {leaf for leaf, gradient in zip(own, gradients, strict=True) if gradient is not None}
