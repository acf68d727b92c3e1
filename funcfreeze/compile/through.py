"""A compiled half that goes on through a graph which was there before: that of what members of an alternation share.

To the compiled part what is shared are further leaves. Their gradients are the cotangents with which the graph is then
walked, once. That takes one cotangent for all parameters below, so the losses must treat these alike; where they do
not, and where hooks look at the graph or a loss scale is at work, the half is computed eagerly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from funcfreeze.computation.sharing import WithShared
from funcfreeze.gradients.explained import explained, walking
from funcfreeze.gradients.graph import gradient_edge
from funcfreeze.gradients.law import Live, Routing
from funcfreeze.gradients.sums import add
from funcfreeze.gradients.walk import walk
from funcfreeze.model.containers import Structure, flatten


class WalksInside(Exception):
    """`losses` differentiates by itself: to compiled code what is shared are leaves, and eager code sees the graph."""


@dataclass(frozen=True, eq=False)
class Through:
    """What is shared, as leaves of a compiled half.

    Attributes:
        live: the graph.
        into: path -> leaf of it, of the parameters that the member may update.
        routing: the member's routing, in which these leaves come last.
        tensors: by the names that they have there.
        leaves: all that is shared, tensors of the live graph among it.
        structure: of that.
    """

    live: Live
    into: Mapping[str, Tensor]
    routing: Routing
    tensors: Mapping[str, Tensor]
    leaves: Sequence[Any]
    structure: Structure

    @staticmethod
    def of(given: WithShared, routing: Routing) -> Through | None:
        """What can be compiled so, or None."""
        before = given.live
        assert before is not None, "there is nothing to walk through"
        leaves, structure = flatten(given.shared)
        live = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        tensors = {f"shared[{index}]": leaf for index, leaf in enumerate(live)}
        is_hooked = before.hooked is None or bool(before.hooked) or any(map(_has_hooks, live))
        paths = [routing.paths[index] for index in sorted(routing.routed)]
        into = {path: given.leaves[path] for path in paths if path in given.leaves}
        weights = _alike(routing, into)
        if is_hooked or weights is None or routing.places or routing.crossings:
            return None
        return Through(before, into, _with_leaves(routing, tensors, weights), tensors, leaves, structure)

    @property
    def key(self) -> tuple[Any, ...]:
        """What graphs are made for: the member's active routes, and the form of what is shared."""
        return self.routing.active, self.structure, tuple(self.tensors), self.routing.weights

    def shown(self, stand_ins: Mapping[str, Tensor]) -> Any:
        """What is shared, with stand-ins in the place of the leaves."""
        names = iter(self.tensors)
        return self.structure.unflatten(
            [
                leaf
                if not isinstance(leaf, Tensor)
                else stand_ins[next(names)]
                if leaf.requires_grad
                else leaf.detach()
                for leaf in self.leaves
            ]
        )

    def hooked(self, stand_ins: Mapping[str, Tensor]) -> list[str]:
        """What is wrong with hooks that a call has put on the leaves, which are taken off."""
        found = [name for name in self.tensors if stand_ins[name]._backward_hooks]
        for name in found:
            stand_ins[name]._backward_hooks = None
        if not found:
            return []
        return [
            "`losses` registers a hook on what is shared, which a compiled member cannot follow: register it in the "
            "function that is shared, or build the alternation with compile=False"
        ]

    def walked(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients at parameters, of what comes past the shared graph and what comes through it."""
        found = {path: gradient for path, gradient in gradients.items() if path not in self.tensors}
        arriving = {name: gradients[name] for name in self.tensors if name in gradients}
        if not arriving:
            return found
        with explained(walking, self.routing.losses):
            below = walk(
                [gradient_edge(self.tensors[name]) for name in arriving],
                [*self.into.values()],
                [*arriving.values()],
                retain_graph=self.live.retain,
                create_graph=False,
            )
        for path, gradient in zip(self.into, below, strict=True):
            total = add(found.get(path), gradient)
            if total is not None:
                found[path] = total
        return found


def _has_hooks(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks)


def _alike(routing: Routing, paths: Mapping[str, Tensor]) -> list[int | None] | None:
    """For each loss the weight index that all of these parameters have; None if it is not the same for all."""
    indices = [index for index, path in enumerate(routing.paths) if path in paths]
    columns = [{dict(row).get(index) for index in indices} for row in routing.weights]
    return [next(iter(column)) for column in columns] if all(len(column) == 1 for column in columns) else None


def _with_leaves(routing: Routing, names: Mapping[str, Tensor], weights: Sequence[int | None]) -> Routing:
    """The routing with further leaves, which every loss has this weight for."""
    number = len(routing.paths)
    rows = tuple(
        row if weight is None else (*row, *((number + index, weight) for index in range(len(names))))
        for row, weight in zip(routing.weights, weights, strict=True)
    )
    return replace(routing, paths=(*routing.paths, *names), weights=rows)
