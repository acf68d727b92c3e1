"""What members of an alternation share: it was computed once, and is given to the losses beside the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from funcfreeze.gradients.law import Live, Routing


@dataclass(frozen=True, eq=False)
class WithShared:
    """A batch, and what is shared.

    Attributes:
        batch: as the user gave it.
        shared: what `losses` finds under that name, detached unless there is a graph to walk.
        leaves: path -> the leaf of that graph, of parameters that nobody has updated since; none if it is detached.
        live: that graph, as engines know it, but for its leaves; None if it is detached.
        updated: the paths of its other leaves. What activation checkpointing computes once more with their parameters
            has to require grad, as it did.
    """

    batch: Any
    shared: Any
    leaves: Mapping[str, Tensor]
    live: Live | None
    updated: frozenset[str] = frozenset()

    def in_routing(self, routing: Routing) -> Routing:
        """The routing of a member, with that graph."""
        if self.live is None:
            return routing
        leaves = {index: self.leaves[path] for index, path in enumerate(routing.paths) if path in self.leaves}
        others = frozenset(index for index, path in enumerate(routing.paths) if path in self.updated)
        differentiable = routing.differentiable | (others - routing.routed)
        return replace(routing, live=self.live._replace(leaves=leaves), differentiable=differentiable)

    def held(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These parameters, with that graph's leaves in their place."""
        others = {path: params[path].detach().requires_grad_() for path in self.updated}
        return {**params, **others, **self.leaves}


def is_live(batch: Any) -> bool:
    """Whether the batch comes with a graph, which only an eager half walks."""
    return isinstance(batch, WithShared) and batch.live is not None


def taken_apart(batch: Any) -> tuple[Any, dict[str, Any]]:
    """The user's batch, and what is shared, if anything is, by name."""
    return (batch.batch, {"shared": batch.shared}) if isinstance(batch, WithShared) else (batch, {})
