"""Following the losses down the autograd graph: what may travel together, and where it is added up.

The method, on the graph from the losses (top) to the parameters (bottom):

1. `reach[n]` is the set of parameters below node n. Loss k is *live* at n if one of those is routed to it.
2. A backward pass is linear in its cotangent. So where live losses would treat everything below n alike, their
   cotangents may be added at n and travel as one. What a loss does below n is its weight on every parameter there; a
   weight that is the same all over may go into the cotangent at n, and what is left is the set of parameters.
3. Cotangents that travel together are a *flow*, known by its losses and by whether the weight is already in it
   (`folded`). At a node where several flows would go on alike, they *stop*, and one merged flow enters there.

Each flow becomes one engine call. A stop from which another input of the same call can be reached would leak: the
engine runs through it. Such stops are *blocked*: they, and what lies between them and the next stop, run on undefined
cotangents, which torch's own nodes pass on without computing anything. Foreign code cannot be trusted to; where some
would run so, nothing stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from funcfreeze.gradients.graph import NO_LEAF, Graph

UNIT_WEIGHT = 0
"""The index of the weight 1, which multiplies nothing."""

LossWeights = tuple[tuple[int, int], ...]
"""For one loss: (leaf index, weight index) of every parameter it may update."""

Rest = tuple[tuple[int, int], ...]
"""What is left of a flow's weights below a node: (weight index, bit set of leaves)."""


class Flow(NamedTuple):
    """Cotangents that travel together: a bit set of losses, and whether the weight is in the cotangent."""

    losses: int
    folded: bool


class Start(NamedTuple):
    """Where a loss starts: its node and which of the node's inputs, the flow it starts as, the weight in its seed."""

    loss: int
    node: int
    input_nr: int
    flow: Flow
    weight: int


# --- the graph and the weights, made ready to ask --------------------------------------------------------------------


class Shape:
    """The graph with its topological order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.size = len(graph.kinds)
        self.leaf = dict(zip(graph.leaves[::2], graph.leaves[1::2], strict=True))
        self.children: list[list[tuple[int, int]]] = []
        start = 0
        for degree in graph.degrees:
            flat = graph.edges[start : start + 2 * degree]
            self.children.append([(node, nr) for node, nr in zip(flat[::2], flat[1::2], strict=True) if node >= 0])
            start += 2 * degree

    @cached_property
    def order(self) -> list[int]:
        """All nodes, every node before those below it."""
        pending = [0] * self.size
        for children in self.children:
            for child, _ in children:
                pending[child] += 1
        ready = [node for node in range(self.size) if pending[node] == 0]
        for node in ready:  # grows while it is walked
            for child, _ in self.children[node]:
                pending[child] -= 1
                if pending[child] == 0:
                    ready.append(child)
        return ready

    @cached_property
    def runs_foreign_code(self) -> list[bool]:
        """Nodes whose backward torch did not write: Python `Function`s and C++ ones without a class of their own."""
        foreign = {kind: _is_foreign(kind) for kind in set(self.graph.kinds)}
        return [foreign[kind] for kind in self.graph.kinds]

    @cached_property
    def is_compiled(self) -> bool:
        """Whether a backward compiled by torch.compile is in the graph; its saved tensors are freed all or never."""
        return any("CompiledFunction" in kind.__name__ for kind in self.graph.kinds)


def _is_foreign(kind: type) -> bool:
    return issubclass(kind, torch._C._FunctionBase) or kind.__name__ == "CppFunction"


class Weights:
    """What each loss does to the leaves below a node."""

    def __init__(self, weights: tuple[LossWeights, ...]) -> None:
        self.of_leaf = [dict(row) for row in weights]
        self.leaves_with = [_leaves_with(row) for row in weights]
        self.support = [sum(mask for _, mask in masks) for masks in self.leaves_with]
        self.routed = 0
        for mask in self.support:
            self.routed |= mask
        self._known: dict[tuple[int, int], tuple[Rest, int]] = {}

    def left_below(self, flow: Flow, reach: int) -> tuple[Rest, int]:
        """What is left of a flow's weights over the leaves in `reach`, and the weight to fold into its cotangent.

        Flows with equal rests may be added once each is multiplied by its weight.
        """
        loss = _lowest(flow.losses)
        if flow.folded:
            return ((UNIT_WEIGHT, self.support[loss] & reach),), UNIT_WEIGHT
        known = self._known.get((loss, reach))
        if known is None:
            rest = tuple((weight, mask & reach) for weight, mask in self.leaves_with[loss] if mask & reach)
            known = (((UNIT_WEIGHT, rest[0][1]),), rest[0][0]) if len(rest) == 1 else (rest, UNIT_WEIGHT)
            self._known[loss, reach] = known
        return known

    def at_leaf(self, flow: Flow, leaf: int) -> int:
        """The weight that a flow's gradient still lacks at a leaf."""
        return UNIT_WEIGHT if flow.folded else self.of_leaf[_lowest(flow.losses)][leaf]


def _leaves_with(row: LossWeights) -> Rest:
    """For each weight of a loss, in order, the bit set of leaves that have it."""
    masks: dict[int, int] = {}
    for leaf, weight in row:
        masks[weight] = masks.get(weight, 0) | 1 << leaf
    return tuple(sorted(masks.items()))


def _lowest(bits: int) -> int:
    """The index of the lowest bit: one loss of a flow, all of whose losses are treated alike where it flows."""
    return (bits & -bits).bit_length() - 1


# --- following the losses down ---------------------------------------------------------------------------------------


@dataclass
class FlowMap:
    """Where every flow goes: the outcome of following the losses down the graph once.

    Attributes:
        starts: where each present loss starts.
        arrivals: for each node, the flows that arrive there, and at which of its inputs.
        passing: for each node, the flows that leave it downwards (or end in it, if it is a leaf).
        stops: for each flow, the nodes where it stops, with the weight to multiply by and the flow it becomes part of.
    """

    shape: Shape
    weights: Weights
    starts: Sequence[Start]
    arrivals: list[dict[Flow, set[int]]]
    passing: list[list[Flow]]
    stops: dict[Flow, dict[int, tuple[int, Flow]]] = field(default_factory=dict)


def follow(shape: Shape, weights: Weights) -> FlowMap:
    """Follow the losses down, merging wherever it is allowed; what turns out to be forbidden is known only afterwards.

    Flows pass a *forced* node unmerged. Forced are nodes with a hook at or below them, which must run for each loss
    alone, and nodes where a stop would make foreign code run on undefined cotangents. The latter move merges further
    down and may force others, so this repeats until nothing changes.
    """
    reach = _reach(shape, weights)
    forced = _above_hooks(shape)
    # a hook also wants its loss unweighted
    starts = [
        start if start.node in forced else _folded(start, weights, reach[start.node])
        for start in _starts(shape, weights, reach)
    ]
    while True:
        found = _follow(shape, weights, reach, starts, forced)
        unsafe = _unsafe_stops(found)
        if not unsafe:
            return found
        forced |= unsafe


def _above_hooks(shape: Shape) -> frozenset[int]:
    """The nodes that carry a hook or have one below them."""
    if shape.graph.hooked is None:
        return frozenset(range(shape.size))
    above = set(shape.graph.hooked)
    for node in reversed(shape.order) if above else ():
        if any(child in above for child, _ in shape.children[node]):
            above.add(node)
    return frozenset(above)


def _follow(
    shape: Shape, weights: Weights, reach: Sequence[int], starts: Sequence[Start], forced: AbstractSet[int]
) -> FlowMap:
    found = FlowMap(shape, weights, starts, [{} for _ in reach], [[] for _ in reach])
    for start in starts:
        found.arrivals[start.node].setdefault(start.flow, set())
    for node in shape.order:
        arrived = list(found.arrivals[node])
        alone = len(arrived) < 2 or node in forced or node in shape.leaf
        found.passing[node] = arrived if alone else _merge(found, node, arrived, reach[node])
        for flow in found.passing[node]:
            support = weights.support[_lowest(flow.losses)]
            for child, input_nr in shape.children[node]:
                if support & reach[child]:
                    found.arrivals[child].setdefault(flow, set()).add(input_nr)
    return found


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
    return start._replace(flow=Flow(start.flow.losses, True), weight=weight) if len(rest) == 1 else start


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
        merged = Flow(losses, folded=len(rest) == 1)
        for flow, weight in together:
            if flow != merged:
                found.stops.setdefault(flow, {})[node] = (weight, merged)
        leaving.append(merged)
    return leaving


# --- what the engine will run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """What the engine runs, as bit sets of flows (bit i is `flows[i]`).

    Attributes:
        flows: all flows, in the order of their passes.
        below: for each node, the flows that want something below it: the engine runs the node if it gets there.
        passing: for each node, the flows that pass it.
    """

    flows: Sequence[Flow]
    below: Sequence[int]
    passing: Sequence[int]


def engine_runs(found: FlowMap) -> Runs:
    """Work out which nodes each flow's engine call runs."""
    flows = sorted({flow for arrivals in found.arrivals for flow in arrivals} | _merged_flows(found), key=_rank)
    bit = {flow: 1 << index for index, flow in enumerate(flows)}
    passing = [sum(bit[flow] for flow in leaving) for leaving in found.passing]
    wanted = [0] * found.shape.size
    for node in found.shape.leaf:
        wanted[node] = passing[node]
    for flow, stops in found.stops.items():
        for node in stops:
            wanted[node] |= bit[flow]
    below = [0] * found.shape.size
    for node in reversed(found.shape.order):
        for child, _ in found.shape.children[node]:
            below[node] |= below[child] | wanted[child]
    return Runs(flows, below, passing)


def _merged_flows(found: FlowMap) -> set[Flow]:
    return {merged for stops in found.stops.values() for _, merged in stops.values()}


def _rank(flow: Flow) -> tuple[int, bool, int]:
    """The order of passes: a flow is fed only by flows of fewer losses, or by its own before folding."""
    return flow.losses.bit_count(), flow.folded, flow.losses


def blocked_stops(found: FlowMap, runs: Runs) -> Iterator[tuple[int, int]]:
    """(index of the flow, node) of every stop that the engine would run through."""
    for index, flow in enumerate(runs.flows):
        for node in found.stops.get(flow, ()):
            if runs.below[node] >> index & 1:
                yield index, node


def blocked_zone(found: FlowMap, runs: Runs, index: int, stop: int) -> Iterator[int]:
    """The nodes that a blocked stop makes the engine run on undefined cotangents: itself, down to the next stops."""
    bit = 1 << index
    stops = found.stops[runs.flows[index]]
    seen = {stop}
    pending = [stop]
    for node in pending:  # grows while it is walked
        yield node
        for child, _ in found.shape.children[node]:
            runs_on_nothing = runs.below[child] & bit and not runs.passing[child] & bit and child not in stops
            if runs_on_nothing and child not in seen:
                seen.add(child)
                pending.append(child)


def _unsafe_stops(found: FlowMap) -> frozenset[int]:
    """Blocked stops whose zone holds foreign code."""
    foreign = found.shape.runs_foreign_code
    if not any(foreign):
        return frozenset()
    runs = engine_runs(found)
    return frozenset(
        node
        for index, node in blocked_stops(found, runs)
        if any(foreign[inside] for inside in blocked_zone(found, runs, index, node))
    )
