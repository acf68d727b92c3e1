"""Following the losses down the autograd graph: what may travel together, and where it is added up.

The method, on the graph from the losses (top) to the parameters (bottom):

1. `reach[n]` is the set of parameters below node n. Loss k is *live* at n if one of those is routed to it.
2. A backward pass is linear in its cotangent. So where live losses would treat everything below n alike, their
   cotangents may be added at n and travel as one. What a loss does below n is its weight on every parameter there; a
   weight that is the same all over may go into the cotangent at n, and what is left is the set of parameters. At a
   parameter under a merge rule every loss has a weight of its own, so that nothing above it may be added.
3. Cotangents that travel together are a *flow*, known by its losses and by whether the weight is already in it
   (`folded`). At a node where several flows would go on alike, they *stop*, and one merged flow enters there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from funcfreeze.gradients.graph import NO_LEAF
from funcfreeze.gradients.shape import Shape
from funcfreeze.gradients.weights import UNIT_WEIGHT, Flow, Rest, Weights, any_loss


class Start(NamedTuple):
    """Where a loss starts: its node and which of the node's inputs, the flow it starts as, the weight in its seed."""

    loss: int
    node: int
    input_nr: int
    flow: Flow
    weight: int


@dataclass
class FlowMap:
    """Where every flow goes: the outcome of following the losses down the graph once.

    Attributes:
        starts: where each present loss starts.
        arrivals: for each node, the flows that arrive there, and at which of its inputs.
        passing: for each node, the flows that leave it downwards (or end in it, if it is a leaf).
        stops: for each flow, the nodes where it stops, with the weight to multiply by and the flow it becomes part of.
        crossings: the nodes where flows merge by a rule's decision, each with the number of that (see `crossings`).
    """

    shape: Shape
    weights: Weights
    starts: Sequence[Start]
    arrivals: list[dict[Flow, set[int]]]
    passing: list[list[Flow]]
    stops: dict[Flow, dict[int, tuple[int, Flow]]] = field(default_factory=dict)
    crossings: dict[int, int] = field(default_factory=dict)

    def merges_into(self, flows: AbstractSet[Flow]) -> set[int]:
        """The nodes where one of these flows is made of others."""
        return {node for stops in self.stops.values() for node, (_, merged) in stops.items() if merged in flows}

    @property
    def flows(self) -> list[Flow]:
        """All flows, each after those that feed it: flows of fewer losses, or its own before folding."""
        arrived = {flow for arrivals in self.arrivals for flow in arrivals}
        merged = {flow for stops in self.stops.values() for _, flow in stops.values()}
        return sorted(arrived | merged, key=lambda flow: (flow.losses.bit_count(), flow.folded, flow.losses))


def follow(shape: Shape, weights: Weights, forced: AbstractSet[int]) -> FlowMap:
    """Follow the losses down the graph, merging wherever they would go on alike, but at no node in `forced`."""
    reach = _reach(shape, weights)
    starts = [
        # what a hook below is to see of a loss is not weighted
        start if start.node in forced else _folded(start, weights, reach[start.node])
        for start in _starts(shape, weights, reach)
    ]
    found = FlowMap(shape, weights, starts, [{} for _ in reach], [[] for _ in reach])
    for start in starts:
        found.arrivals[start.node].setdefault(start.flow, set())
    for node in shape.order:
        arrived = list(found.arrivals[node])
        alone = len(arrived) < 2 or node in forced or node in shape.leaf
        found.passing[node] = arrived if alone else _merge(found, node, arrived, reach[node])
        for flow in found.passing[node]:
            support = weights.support[any_loss(flow.losses)]
            for child, input_nr in shape.children[node]:
                if support & reach[child]:
                    found.arrivals[child].setdefault(flow, set()).add(input_nr)
    return found


def above_hooks(shape: Shape) -> frozenset[int]:
    """The nodes that carry a hook or have one below them: it must run for each loss alone, so nothing merges there."""
    if shape.graph.hooked is None:
        return frozenset(range(shape.size))
    above = set(shape.graph.hooked)
    for node in reversed(shape.order) if above else ():
        if any(child in above for child, _ in shape.children[node]):
            above.add(node)
    return frozenset(above)


def tearing_merges(found: FlowMap) -> frozenset[int]:
    """The merges that let a loss arrive at foreign code in two parts, one of them by way of the merge.

    The code would run on each part. That is right if it is linear, and yet it may divide by the size of a part that
    happens to be zero.
    """
    nodes: set[int] = set()
    for node, foreign in enumerate(found.shape.runs_foreign_code):
        leaving = found.passing[node] if foreign else []
        torn = {
            flow
            for index, flow in enumerate(leaving)
            for other in leaving[:index] + leaving[index + 1 :]
            if flow.losses & other.losses
        }
        if torn:
            nodes |= found.merges_into(torn) & found.shape.above(node)
    return frozenset(nodes)


def _reach(shape: Shape, weights: Weights) -> list[int]:
    """For every node the bit set of routed leaves below it."""
    reach = [0] * shape.size
    for node, leaf in shape.leaf.items():
        reach[node] = (1 << leaf) & weights.routed if leaf != NO_LEAF else 0
    for node in reversed(shape.order):
        for child, _ in shape.children[node]:
            reach[node] |= reach[child]
    return reach


def _starts(shape: Shape, weights: Weights, reach: Sequence[int]) -> Iterator[Start]:
    """Every loss that reaches a parameter it may update."""
    for loss, root in enumerate(shape.graph.roots):
        if root is not None and weights.support[loss] & reach[root[0]]:
            yield Start(loss, *root, Flow(1 << loss, folded=False), UNIT_WEIGHT)


def _folded(start: Start, weights: Weights, reach: int) -> Start:
    """The same start with the loss's weight in its seed, if it has one weight all over."""
    rest, weight = weights.left_below(start.flow, reach)
    return start._replace(flow=Flow(start.flow.losses, True), weight=weight) if weights.may_fold(rest) else start


def _merge(found: FlowMap, node: int, arrived: Sequence[Flow], reach: int) -> list[Flow]:
    """Add up the flows that go on alike below a node; returns the flows that leave it."""
    alike: dict[Rest, list[tuple[Flow, int]]] = {}
    for flow in arrived:
        rest, weight = found.weights.left_below(flow, reach)
        alike.setdefault(rest, []).append((flow, weight))
    leaving = []
    for rest, together in alike.items():
        if len(together) == 1:
            leaving.append(together[0][0])
            continue
        losses = 0
        for flow, _ in together:
            losses |= flow.losses
        merged = Flow(losses, folded=found.weights.may_fold(rest))
        for flow, weight in together:
            if flow != merged:
                found.stops.setdefault(flow, {})[node] = (weight, merged)
        leaving.append(merged)
    return leaving
