"""Planning a backward: which engine calls compute all losses' gradients without doing anything twice.

`flows` says what travels together and where; here that is written down as engine calls, one for each flow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from funcfreeze.gradients.flows import (
    UNIT_WEIGHT,
    Flow,
    FlowMap,
    LossWeights,
    Runs,
    Shape,
    Weights,
    blocked_stops,
    blocked_zone,
    engine_runs,
    follow,
)
from funcfreeze.gradients.graph import NO_LEAF, Graph


class Seed(NamedTuple):
    """A loss's own cotangent, one, times a weight."""

    loss: int
    weight: int


class Captured(NamedTuple):
    """What an earlier pass left in a slot, times a weight."""

    slot: int
    weight: int


class Entry(NamedTuple):
    """A place where cotangents enter a pass: an input of a node, and what is added up there."""

    node: int
    input_nr: int
    sources: tuple[Seed | Captured, ...]


class Exit(NamedTuple):
    """A place where a pass stops: an input of a node, and the slot that keeps what arrived."""

    node: int
    input_nr: int
    slot: int


class Pass(NamedTuple):
    """One call of the autograd engine.

    Attributes:
        entries: where cotangents enter.
        leaves: (leaf index, node, weight index) of the gradients it computes.
        exits: where it stops.
        blocked: nodes that must not pass anything on during the call.
        retain: whether later passes need nodes that this one runs.
        done: nodes that no later pass mentions.
    """

    entries: tuple[Entry, ...]
    leaves: tuple[tuple[int, int, int], ...]
    exits: tuple[Exit, ...]
    blocked: tuple[int, ...]
    retain: bool
    done: tuple[int, ...]


@lru_cache(maxsize=64)
def plan_passes(graph: Graph, weights: tuple[LossWeights, ...]) -> tuple[Pass, ...]:
    """The engine calls for a graph, in order; planned once for every structure.

    Args:
        graph: the structure of the autograd graph.
        weights: for each loss, which leaves it may update and with which weight.
    """
    return tuple(_passes(follow(Shape(graph), Weights(weights))))


def _passes(found: FlowMap) -> Iterator[Pass]:
    runs = engine_runs(found)
    blocked: list[list[int]] = [[] for _ in runs.flows]
    running = [below & passing for below, passing in zip(runs.below, runs.passing, strict=True)]
    for index, node in blocked_stops(found, runs):
        blocked[index].append(node)
        for inside in blocked_zone(found, runs, index, node):
            running[inside] |= 1 << index
    retained = _retained(found.shape, running, len(runs.flows))
    slots = _slots(found, runs)
    entries, exits, leaves = _entries(found, slots), _exits(slots), _leaves(found)
    travelling = [flow for flow in runs.flows if flow in entries]  # one that stops where it starts needs no call
    mentioned = [
        {entry.node for entry in entries[flow]}
        | {exit.node for exit in exits.get(flow, ())}
        | {node for _, node, _ in leaves.get(flow, ())}
        for flow in travelling
    ]
    last = {node: turn for turn, nodes in enumerate(mentioned) for node in nodes}
    for turn, flow in enumerate(travelling):
        index = runs.flows.index(flow)
        yield Pass(
            entries=tuple(entries[flow]),
            leaves=tuple(leaves.get(flow, ())),
            exits=tuple(exits.get(flow, ())),
            blocked=tuple(blocked[index]),
            retain=bool(retained >> index & 1),
            done=tuple(sorted(node for node in mentioned[turn] if last[node] == turn)),
        )


def _retained(shape: Shape, running: Sequence[int], flows: int) -> int:
    """The bit set of flows that run a node which a later one runs too."""
    if shape.is_compiled:  # a compiled backward frees all it saved, or nothing
        return (1 << flows) - 1
    retained = 0
    for bits in set(running) - {0}:
        retained |= bits & ~(1 << bits.bit_length() - 1)
    return retained


def _slots(found: FlowMap, runs: Runs) -> dict[tuple[Flow, int, int], int]:
    """A number for every (flow, node, input) at which a flow stops after having travelled."""
    stops = (
        (flow, node, input_nr)
        for flow in runs.flows
        for node in found.stops.get(flow, ())
        for input_nr in sorted(found.arrivals[node].get(flow, ()))
    )
    return {stop: slot for slot, stop in enumerate(stops)}


def _exits(slots: dict[tuple[Flow, int, int], int]) -> dict[Flow, list[Exit]]:
    exits: dict[Flow, list[Exit]] = {}
    for (flow, node, input_nr), slot in slots.items():
        exits.setdefault(flow, []).append(Exit(node, input_nr, slot))
    return exits


def _entries(found: FlowMap, slots: dict[tuple[Flow, int, int], int]) -> dict[Flow, list[Entry]]:
    """Where each flow enters: where its loss starts, unless it stops there at once, and where others become it."""
    sources: dict[Flow, dict[tuple[int, int], list[Seed | Captured]]] = {}

    def enter(flow: Flow, node: int, input_nr: int, source: Seed | Captured) -> None:
        sources.setdefault(flow, {}).setdefault((node, input_nr), []).append(source)

    for start in found.starts:
        weight, flow = found.stops.get(start.flow, {}).get(start.node, (UNIT_WEIGHT, start.flow))
        enter(flow, start.node, start.input_nr, Seed(start.loss, start.weight if start.flow.folded else weight))
    for (flow, node, input_nr), slot in slots.items():
        weight, merged = found.stops[flow][node]
        enter(merged, node, input_nr, Captured(slot, weight))
    return {
        flow: [Entry(node, input_nr, tuple(added)) for (node, input_nr), added in places.items()]
        for flow, places in sources.items()
    }


def _leaves(found: FlowMap) -> dict[Flow, list[tuple[int, int, int]]]:
    """The gradients each flow computes: the leaves it ends in, with the weight it still lacks there."""
    leaves: dict[Flow, list[tuple[int, int, int]]] = {}
    for node, leaf in found.shape.leaf.items():
        for flow in found.passing[node] if leaf != NO_LEAF else ():
            leaves.setdefault(flow, []).append((leaf, node, found.weights.at_leaf(flow, leaf)))
    return leaves
