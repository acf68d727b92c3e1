"""The fast engine: one forward, then the autograd graph itself is planned and walked once where losses agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from funcfreeze.gradients.flows import UNIT_WEIGHT
from funcfreeze.gradients.forward import forward
from funcfreeze.gradients.graph import Graph, gradient_edge, read_graph
from funcfreeze.gradients.law import Evaluate, Outcome, Routing, SeparateOutcome
from funcfreeze.gradients.passes import Captured, Entry, Pass, plan_passes
from funcfreeze.routes import scalar_like


class Routed:
    """Plans the backward on the autograd graph: no weight gradient that nobody may use, no shared trunk walked twice."""

    def merged(self, evaluate: Evaluate, params: Sequence[Tensor], routing: Routing, step: Tensor | None) -> Outcome:
        """Every leaf's gradient, one engine call for every set of losses that travels together."""
        handles = hook_handles_made()
        live = forward(evaluate, params, routing)
        weights = routing.weight_values(step)
        losses, live.losses = live.losses, []  # the graph is owned here, and goes as it is used up
        gradients = planned_backward(losses, live.leaves, routing, weights, merge=hook_handles_made() == handles)
        return Outcome(gradients, live.values, live.rest)

    def separate(
        self, evaluate: Evaluate, params: Sequence[Tensor], routing: Routing, step: Tensor | None
    ) -> SeparateOutcome:
        """Every loss's gradients apart, one engine call each, over the leaves that loss may update."""
        live = forward(evaluate, params, routing)
        weights = routing.weight_values(step)
        gradients = [
            _alone(loss, live.leaves, dict(row), weights)
            for loss, row in zip(live.losses, routing.weights, strict=True)
        ]
        return SeparateOutcome(gradients, live.values, live.rest)


def _alone(
    loss: Tensor | None, leaves: Sequence[Tensor], row: dict[int, int], weights: Sequence[float | Tensor]
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(leaves)
    if loss is None or not loss.requires_grad:
        return found
    inputs = [leaves[index] for index in row]
    gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    for (index, weight), gradient in zip(row.items(), gradients, strict=True):
        found[index] = _weighted(gradient, weights, weight)
    return found


def hook_handles_made() -> int:
    """How many hook handles this process has made: unchanged over a forward, no hook was registered during it.

    A node of the autograd graph does not tell whether it carries hooks, and these may be anything but linear. So if any
    may have been registered on the graph, losses are kept apart: then hooks run as they would for each loss alone.
    """
    return RemovableHandle.next_id


def planned_backward(
    losses: list[Tensor | None],
    leaves: Sequence[Tensor],
    routing: Routing,
    weights: Sequence[float | Tensor],
    merge: bool,
) -> list[Tensor | None]:
    """Every leaf's merged gradient, from losses on a live graph, which is used up.

    Args:
        losses: scalar losses in the routing's order, None where absent. The list is emptied, so that the graph can go.
        leaves: the leaf tensors of the graph, in the routing's order.
        routing: which loss may update which leaf.
        weights: the value of every weight index.
        merge: False keeps every loss in an engine call of its own.
    """
    seeds = [None if loss is None else torch.ones_like(loss.detach()) for loss in losses]
    edges = [None if loss is None or not loss.requires_grad else gradient_edge(loss) for loss in losses]
    graph, nodes = read_graph(edges, leaves)
    refuse_unplannable(graph)
    passes = plan_passes(graph, routing.weights, merge)
    kept = {node: nodes[node] for planned in passes for node in planned.done}
    losses.clear()
    edges.clear()
    nodes.clear()
    return _run(passes, kept, leaves, seeds, weights)


def _run(
    passes: Sequence[Pass],
    nodes: dict[int, Node],
    leaves: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    weights: Sequence[float | Tensor],
) -> list[Tensor | None]:
    """Make the engine calls; nodes are let go with the last call that mentions them, and the graph above with them."""
    gradients: list[Tensor | None] = [None] * len(leaves)
    slots: dict[int, Tensor] = {}
    for planned in passes:
        arriving = [(entry, _sum_up(entry, slots, seeds, weights)) for entry in planned.entries]
        entering = [(entry, cotangent) for entry, cotangent in arriving if cotangent is not None]
        if entering:
            found = _call(planned, nodes, leaves, entering)
            ends = len(planned.leaves)
            for (leaf, _, weight), gradient in zip(planned.leaves, found[:ends], strict=True):
                gradients[leaf] = _add(gradients[leaf], _weighted(gradient, weights, weight))
            for exit, cotangent in zip(planned.exits, found[ends:], strict=True):
                if cotangent is not None:
                    slots[exit.slot] = cotangent
        for node in planned.done:
            del nodes[node]
    return gradients


def _call(
    planned: Pass, nodes: dict[int, Node], leaves: Sequence[Tensor], entering: Sequence[tuple[Entry, Tensor]]
) -> tuple[Tensor | None, ...]:
    """One call of the autograd engine, with the pass's blocked nodes passing nothing on."""
    handles = [nodes[node].register_prehook(_pass_nothing_on) for node in planned.blocked]
    try:
        return torch.autograd.grad(
            [GradientEdge(nodes[entry.node], entry.input_nr) for entry, _ in entering],
            [
                *(leaves[leaf] for leaf, _, _ in planned.leaves),
                *(GradientEdge(nodes[exit.node], exit.input_nr) for exit in planned.exits),
            ],
            [cotangent for _, cotangent in entering],
            retain_graph=planned.retain,
            allow_unused=True,
        )
    finally:
        for handle in handles:
            handle.remove()


def _pass_nothing_on(cotangents: tuple[Tensor | None, ...]) -> tuple[None, ...]:
    return (None,) * len(cotangents)


def _sum_up(
    entry: Entry, slots: dict[int, Tensor], seeds: Sequence[Tensor | None], weights: Sequence[float | Tensor]
) -> Tensor | None:
    """The cotangent that enters at a place: what was captured there and the losses' own, each with its weight."""
    total: Tensor | None = None
    for source in entry.sources:
        cotangent = slots.pop(source.slot, None) if isinstance(source, Captured) else seeds[source.loss]
        total = _add(total, _weighted(cotangent, weights, source.weight))
    return total


def _weighted(cotangent: Tensor | None, weights: Sequence[float | Tensor], weight: int) -> Tensor | None:
    if cotangent is None or weight == UNIT_WEIGHT:
        return cotangent
    return cotangent * scalar_like(weights[weight], cotangent)


def _add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return other + one if one.is_sparse and not other.is_sparse else one + other  # torch adds sparse to dense only


def refuse_unplannable(graph: Graph) -> None:
    """Refuse graphs that hide parameters or that the engine cannot cut.

    Raises:
        RuntimeError: reentrant activation checkpointing is in the graph.
    """
    kinds = {kind.__name__ for kind in graph.kinds}
    if "CheckpointFunctionBackward" in kinds:
        raise RuntimeError(
            "the forward uses reentrant activation checkpointing, whose parameters autograd cannot see; call "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
