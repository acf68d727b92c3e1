"""The fast engine: one forward, then the autograd graph itself is planned and walked once where losses agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from funcfreeze.gradients.crossings import Crossing
from funcfreeze.gradients.entering import Deciding, arriving, weighted
from funcfreeze.gradients.explained import explained, walking
from funcfreeze.gradients.forward import Forward, forward
from funcfreeze.gradients.graph import (
    NO_LEAF,
    Graph,
    gradient_edge,
    losses_at_other_leaves,
    read_graph,
    refuse_reentrant,
)
from funcfreeze.gradients.hooks import Noticed, note_temporary_hooks, noticing_hooks
from funcfreeze.gradients.law import Evaluate, Live, OtherLeaf, Outcome, Routing, SeparateOutcome
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.gradients.outside import Outside, ends_outside
from funcfreeze.gradients.passes import Entry, Pass, losses_walked, plan_passes
from funcfreeze.gradients.returned import nothing
from funcfreeze.gradients.seed import seed_of
from funcfreeze.gradients.sums import add, plus
from funcfreeze.gradients.walk import walk
from funcfreeze.gradients.weights import UNIT_WEIGHT
from funcfreeze.model.attributes import nodes_made


class Routed:
    """Plans the backward on the graph: no weight gradient that nobody may use, no shared trunk walked twice."""

    finds_other_leaves = True

    def merged(
        self,
        evaluate: Evaluate,
        params: Sequence[Tensor],
        routing: Routing,
        step: Tensor | None,
        seed: Tensor | None = None,
    ) -> Outcome:
        """Every leaf's gradient, one engine call for every set of losses that travels together."""
        since = nodes_made()
        with noticing_hooks() as noticed:
            live = forward(evaluate, params, routing)
        weights = routing.weight_values(step)
        before = routing.live
        hooked = _hooked(noticed, before)
        graph = read_losses(live.losses, live.leaves, hooked, seed)
        others = other_leaves(graph, routing.losses, since)
        if before is not None:
            others = [leaf for leaf in others if id(leaf.tensor) not in before.known]
        noticed.nodes.clear()
        carries = torch.is_grad_enabled() and ends_outside(graph.structure, live.connected)
        values, rest = live.let_go(routing, _kept(live, graph, carries))
        # nothing but `graph` holds what it need not hold now, and lets it go as it is used up
        with grad_mode(carries):
            retain = before is not None and before.retain
            decide = Deciding(routing, values, step, seed)
            found = planned_backward(graph, live.leaves, routing, weights, retain_graph=retain, decide=decide)
        if carries:
            found = _cut(found, live.leaves)
        return Outcome(found.merged, values, rest, others, found.apart, decide.met)

    def separate(
        self,
        evaluate: Evaluate,
        params: Sequence[Tensor],
        routing: Routing,
        step: Tensor | None,
        seed: Tensor | None = None,
    ) -> SeparateOutcome:
        """Every loss's gradients apart, one engine call each, over the leaves that loss may update."""
        with torch.no_grad(), noticing_hooks() as noticed:
            live = forward(evaluate, params, routing)
        weights = routing.weight_values(step)
        present = [*live.losses]
        with grad_mode(False):
            gradients = [
                _alone(name, loss, live.leaves, dict(row), weights, seed)
                for name, loss, row in zip(routing.losses, live.losses, routing.weights, strict=True)
            ]
        values, rest = live.let_go(routing, nothing)
        if not routing.crossings:
            return SeparateOutcome(gradients, values, rest)
        graph = read_losses(present, live.leaves, _hooked(noticed, routing.live), seed)
        del present
        with grad_mode(False):
            decide = Deciding(routing, values, step, seed)
            found = planned_backward(graph, live.leaves, routing, weights, decide=decide)
        crossed = Outcome(found.merged, values, None, apart=found.apart, met=decide.met)
        return SeparateOutcome(gradients, values, rest, crossed)


def _hooked(noticed: Noticed, before: Live | None) -> list[Node] | None:
    """The nodes known to carry hooks, or None if any may."""
    if not noticed.all_known or (before is not None and before.hooked is None):
        return None
    return [*noticed.nodes, *(before.hooked or () if before is not None else ())]


def _kept(live: Forward, graph: LiveGraph, carries: bool) -> Callable[[Tensor], bool]:
    """What keeps its graph of all that a forward returned: where grad mode is on, what depends on the outside."""
    if torch.is_grad_enabled() and (carries or live.rest is not None):
        return Outside(live.leaves, () if carries else graph.nodes).reached_from
    return nothing


class Gradients(NamedTuple):
    """What a planned backward gives.

    Attributes:
        merged: for each leaf its merged gradient; None where it is untouched, or under a rule.
        apart: for each loss, leaf -> its gradient, at leaves under a rule; empty without any.
    """

    merged: list[Tensor | None]
    apart: list[dict[int, Tensor]]


def _cut(found: Gradients, leaves: Sequence[Tensor]) -> Gradients:
    """The gradients, detached where they depend on nothing outside."""
    reached = Outside(leaves).reached_from

    def cut(gradient: Tensor) -> Tensor:
        return gradient if reached(gradient) else gradient.detach()

    return Gradients(
        [None if gradient is None else cut(gradient) for gradient in found.merged],
        [{leaf: cut(gradient) for leaf, gradient in row.items()} for row in found.apart],
    )


def _alone(
    name: str,
    loss: Tensor | None,
    leaves: Sequence[Tensor],
    row: dict[int, int],
    weights: Sequence[float | Tensor],
    seed: Tensor | None,
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(leaves)
    if loss is None or not loss.requires_grad or not row:
        return found
    inputs = [leaves[index] for index in row]
    with explained(walking, [name]):
        gradients = torch.autograd.grad(loss, inputs, seed_of(loss, seed), retain_graph=True, allow_unused=True)
    for (index, weight), gradient in zip(row.items(), gradients, strict=True):
        found[index] = weighted(gradient, weights, weight)
    return found


def planned(graph: Graph, routing: Routing) -> tuple[Pass, ...]:
    """The engine calls for a graph."""
    crossings = tuple(Crossing(place.label, place.leaves, place.losses) for place in routing.crossings)
    names = (crossings, routing.losses, routing.paths) if crossings else ()
    return plan_passes(graph, routing.weights, routing.shared, *names)


class LiveGraph(NamedTuple):
    """Losses' autograd graph: its structure, its nodes, and every present loss's cotangent."""

    structure: Graph
    nodes: list[Node]
    seeds: Sequence[Tensor | None]


def read_losses(
    losses: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    hooked: Sequence[Node] | None,
    seed: Tensor | None = None,
) -> LiveGraph:
    """Read the graph of scalar losses (None where absent) down to the leaves.

    Args:
        losses: scalar losses on a live graph.
        leaves: the leaf tensors whose gradients may be wanted.
        hooked: the nodes known to carry hooks; None if any may.
        seed: the cotangent that every loss starts with; None is one.

    Raises:
        RuntimeError: reentrant activation checkpointing is in the graph.
    """
    edges = [None if loss is None or not loss.requires_grad else gradient_edge(loss) for loss in losses]
    structure, nodes = read_graph(edges, leaves, hooked)
    refuse_reentrant(structure)
    return LiveGraph(structure, nodes, [None if loss is None else seed_of(loss, seed) for loss in losses])


def other_leaves(graph: LiveGraph, losses: Sequence[str], since: int) -> list[OtherLeaf]:
    """Where the losses' graph ends beside the leaves, and which of the losses do.

    Args:
        graph: the losses' graph.
        losses: their names.
        since: what `nodes_made` said before the forward.
    """
    if NO_LEAF not in graph.structure.leaves[1::2]:
        return []
    found = losses_at_other_leaves(graph.structure).items()
    old = {child for node in graph.nodes if node._sequence_nr() < since for child, _ in node.next_functions}
    ends = ((graph.nodes[node], getattr(graph.nodes[node], "variable", None), above) for node, above in found)
    return [
        OtherLeaf(leaf, tuple(losses[loss] for loss in above), node in old)
        for node, leaf, above in ends
        if leaf is not None
    ]


def planned_backward(
    graph: LiveGraph,
    leaves: Sequence[Tensor],
    routing: Routing,
    weights: Sequence[float | Tensor],
    *,
    retain_graph: bool = False,
    decide: Deciding | None = None,
) -> Gradients:
    """Every leaf's merged gradient. The graph is used up: its list of nodes is emptied, so that memory goes as it can.

    But where grad mode is on, it is kept, and gradients carry a graph of their own.

    Args:
        graph: the losses' graph, in the routing's order.
        leaves: its leaf tensors, in the routing's order.
        routing: which loss may update which leaf.
        weights: the value of every weight index.
        retain_graph: keep the graph, list of nodes included.
        decide: calls rules that decide above parameters; None where there are none.
    """
    passes = planned(graph.structure, routing)
    nodes = {node: graph.nodes[node] for planned in passes for node in planned.done}
    if retain_graph:
        passes = tuple(planned._replace(retain=True) for planned in passes)
    else:
        graph.nodes.clear()
    return _run(passes, nodes, leaves, graph.seeds, weights, routing, decide)


def _run(
    passes: Sequence[Pass],
    nodes: dict[int, Node],
    leaves: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    weights: Sequence[float | Tensor],
    routing: Routing,
    decide: Deciding | None,
) -> Gradients:
    """Make the engine calls; nodes are let go with the last call that mentions them, and the graph above with them."""
    merged: list[Tensor | None] = [None] * len(leaves)
    apart: list[dict[int, Tensor]] = [{} for _ in routing.losses] if routing.owners else []
    slots: dict[int, Tensor] = {}
    shared = routing.shared
    for turn, planned in enumerate(passes):
        given = arriving(planned, slots, seeds, weights, decide)
        entering = [(entry, cotangent) for entry, cotangent in given if cotangent is not None]
        if entering:
            with explained(_walking, routing.losses, passes, turn):
                found = _call(planned, nodes, leaves, entering)
            ends = len(planned.leaves)
            for (leaf, _, weight), gradient in zip(planned.leaves, found[:ends], strict=True):
                gradient = gradient if weight == UNIT_WEIGHT else weighted(gradient, weights, weight)
                if weight < shared:
                    merged[leaf] = gradient if merged[leaf] is None else add(merged[leaf], gradient)
                elif gradient is not None:
                    own = apart[routing.owners[weight - shared]]
                    own[leaf] = plus(own[leaf], gradient) if leaf in own else gradient
            for exit, cotangent in zip(planned.exits, found[ends:], strict=True):
                if cotangent is not None:
                    slots[exit.slot] = cotangent
        for node in planned.done:
            del nodes[node]
    return Gradients(merged, apart)


def _walking(names: Sequence[str], passes: Sequence[Pass], turn: int) -> str:
    return walking(names[loss] for loss in losses_walked(passes, turn))


def _call(
    planned: Pass, nodes: dict[int, Node], leaves: Sequence[Tensor], entering: Sequence[tuple[Entry, Tensor]]
) -> tuple[Tensor | None, ...]:
    """One call of the autograd engine, with the pass's blocked nodes passing nothing on."""
    inputs: list[Tensor | GradientEdge] = [leaves[leaf] for leaf, _, _ in planned.leaves]
    inputs += (GradientEdge(nodes[exit.node], exit.input_nr) for exit in planned.exits)
    handles = [nodes[node].register_prehook(_pass_nothing_on) for node in planned.blocked]
    if handles:
        note_temporary_hooks(len(handles))
    create_graph = torch.is_grad_enabled()
    try:
        return walk(
            [GradientEdge(nodes[entry.node], entry.input_nr) for entry, _ in entering],
            inputs,
            [cotangent for _, cotangent in entering],
            retain_graph=planned.retain or create_graph,
            create_graph=create_graph,
        )
    except NotImplementedError as error:
        if "NestedTensor" not in str(error):
            raise
        raise NotImplementedError(
            "torch cannot differentiate an operation on strided nested tensors that the forward uses (the cause is "
            "above); make them with layout=torch.jagged"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _pass_nothing_on(cotangents: tuple[Tensor | None, ...]) -> tuple[None, ...]:
    return (None,) * len(cotangents)
