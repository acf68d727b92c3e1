"""Planning a backward: which engine calls compute all losses' gradients without doing anything twice.

`flows` says which cotangents travel together and where they merge, `calls` which of them share a call; here that is
written down as the calls that `routed` makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from funcfreeze.gradients.calls import Runs, blocked_exits, blocked_zone, engine_runs, share_calls, unsafe_exits
from funcfreeze.gradients.crossings import Crossing, find_crossings
from funcfreeze.gradients.flows import FlowMap, above_hooks, follow, tearing_merges
from funcfreeze.gradients.graph import NO_LEAF, Graph
from funcfreeze.gradients.shape import Shape
from funcfreeze.gradients.weights import UNIT_WEIGHT, Flow, LossWeights, Weights, any_loss


class Seed(NamedTuple):
    """A loss's own cotangent, one, times a weight."""

    loss: int
    weight: int


class Captured(NamedTuple):
    """What an earlier pass left in a slot, times a weight."""

    slot: int
    weight: int


class Entry(NamedTuple):
    """A place where cotangents enter a pass: an input of a node, and what is added up there.

    Attributes:
        node: where.
        input_nr: at which of its inputs.
        sources: what enters.
        crossing: which rule makes one cotangent of these, or None where they are added up.
        losses: whose they are, if a rule is to be told.
    """

    node: int
    input_nr: int
    sources: tuple[Seed | Captured, ...]
    crossing: int | None = None
    losses: tuple[int, ...] = ()


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
        done: nodes that no later pass mentions, and those that keep them alive.
    """

    entries: tuple[Entry, ...]
    leaves: tuple[tuple[int, int, int], ...]
    exits: tuple[Exit, ...]
    blocked: tuple[int, ...]
    retain: bool
    done: tuple[int, ...]


@lru_cache(maxsize=64)
def plan_passes(
    graph: Graph,
    weights: tuple[LossWeights, ...],
    shared: int,
    crossings: tuple[Crossing, ...] = (),
    losses: tuple[str, ...] = (),
    paths: tuple[str, ...] = (),
) -> tuple[Pass, ...]:
    """The engine calls for a graph, in order; planned once for every structure.

    Args:
        graph: the structure of the autograd graph.
        weights: for each loss, which leaves it may update and with which weight.
        shared: weight indices from here on are each one loss's own.
        crossings: what is decided where losses meet above parameters.
        losses: the names of the losses, and `paths` those of the leaves, for messages about that.
        paths: see there.

    Raises:
        RouteError: losses do not meet as a rule takes it.
    """
    shape, ready = Shape(graph), Weights(weights, shared)
    forbidden = above_hooks(shape)
    while True:
        found = follow(shape, ready, forbidden)
        found.crossings |= find_crossings(found, crossings, losses, paths) if crossings else {}
        torn = tearing_merges(found)
        runs = engine_runs(found, [] if torn else share_calls(found))
        unsafe = torn | unsafe_exits(found, runs)
        if not unsafe:
            return tuple(_passes(found, runs))
        forbidden |= unsafe  # merges move further down, and may be unsafe there too


def losses_walked(passes: Sequence[Pass], turn: int) -> list[int]:
    """The losses whose cotangents may be in a pass: its own, and those of the passes that lead into it."""
    left: dict[int, set[int]] = {}
    walked: set[int] = set()
    for planned in passes[: turn + 1]:
        sources = [source for entry in planned.entries for source in entry.sources]
        walked = {source.loss for source in sources if isinstance(source, Seed)}
        walked = walked.union(*(left.get(source.slot, ()) for source in sources if isinstance(source, Captured)))
        left |= {exit.slot: walked for exit in planned.exits}
    return sorted(walked)


def _passes(found: FlowMap, runs: Runs) -> Iterator[Pass]:
    blocked = [blocked_exits(runs, index) for index in range(len(runs.calls))]
    retained = _retained(found, runs, blocked)
    slots = _slots(found, runs)
    entries, exits, leaves = _entries(found, runs, slots), _exits(runs, slots), _leaves(found, runs)
    travelling = [index for index, places in enumerate(entries) if places]  # what stops where it starts needs no call
    owner = found.shape.owner
    mentioned = [
        {entry.node for entry in entries[index]}
        | {exit.node for exit in exits[index]}
        | {node for _, node, _ in leaves[index]}
        for index in travelling
    ]
    mentioned = [nodes | {owner[node] for node in nodes} for nodes in mentioned]
    last = {node: turn for turn, nodes in enumerate(mentioned) for node in nodes}
    for turn, index in enumerate(travelling):
        yield Pass(
            entries=tuple(entries[index]),
            leaves=tuple(leaves[index]),
            exits=tuple(exits[index]),
            blocked=tuple(blocked[index]),
            retain=bool(retained >> index & 1),
            done=tuple(sorted(node for node in mentioned[turn] if last[node] == turn)),
        )


def _retained(found: FlowMap, runs: Runs, blocked: Sequence[Sequence[int]]) -> int:
    """The bit set of calls that run a node which a later one runs too."""
    if found.shape.is_compiled:  # a compiled backward frees all it saved, or nothing
        return (1 << len(runs.calls)) - 1
    running = [below & passing for below, passing in zip(runs.below, runs.passing, strict=True)]
    for index, exits in enumerate(blocked):
        for exit in exits:
            for node in blocked_zone(found, runs, index, exit):
                running[node] |= 1 << index
    retained = 0
    for bits in set(running) - {0}:
        retained |= bits & ~(1 << bits.bit_length() - 1)
    return retained


Slots = dict[tuple[int, int, int], int]
"""(index of a call, node, input) at which one of its flows exits after having travelled -> slot."""


def _slots(found: FlowMap, runs: Runs) -> Slots:
    exits = (
        (index, node, input_nr)
        for index, places in enumerate(runs.exits)
        for node, (flow,) in places.items()  # flows of one call never exit at the same node
        for input_nr in sorted(found.arrivals[node].get(flow, ()))
    )
    return {exit: slot for slot, exit in enumerate(exits)}


def _exits(runs: Runs, slots: Slots) -> list[list[Exit]]:
    exits: list[list[Exit]] = [[] for _ in runs.calls]
    for (index, node, input_nr), slot in slots.items():
        exits[index].append(Exit(node, input_nr, slot))
    return exits


def _entries(found: FlowMap, runs: Runs, slots: Slots) -> list[list[Entry]]:
    """Where cotangents enter each call: where losses start, unless they exit there at once, and where others exit."""
    call_of = {flow: index for index, call in enumerate(runs.calls) for flow in call}
    sources: list[dict[tuple[int, int], list[tuple[Seed | Captured, int]]]] = [{} for _ in runs.calls]

    def enter(flow: Flow, node: int, input_nr: int, source: Seed | Captured, loss: int) -> None:
        sources[call_of[flow]].setdefault((node, input_nr), []).append((source, loss))

    for start in found.starts:
        weight, flow = found.stops.get(start.flow, {}).get(start.node, (UNIT_WEIGHT, start.flow))
        source = Seed(start.loss, start.weight if start.flow.folded else weight)
        enter(flow, start.node, start.input_nr, source, start.loss)
    for (index, node, input_nr), slot in slots.items():
        (flow,) = runs.exits[index][node]
        weight, merged = found.stops[flow][node]
        enter(merged, node, input_nr, Captured(slot, weight), any_loss(flow.losses))
    return [[_entry(found, *place, entering) for place, entering in places.items()] for places in sources]


def _entry(found: FlowMap, node: int, input_nr: int, entering: Sequence[tuple[Seed | Captured, int]]) -> Entry:
    added = tuple(source for source, _ in entering)
    if node not in found.crossings:
        return Entry(node, input_nr, added)
    return Entry(node, input_nr, added, found.crossings[node], tuple(loss for _, loss in entering))


def _leaves(found: FlowMap, runs: Runs) -> list[list[tuple[int, int, int]]]:
    """The gradients each call computes: the leaves its flows end in, with the weight they still lack there."""
    call_of = {flow: index for index, call in enumerate(runs.calls) for flow in call}
    leaves: list[list[tuple[int, int, int]]] = [[] for _ in runs.calls]
    for node, leaf in found.shape.leaf.items():
        for flow in found.passing[node] if leaf != NO_LEAF else ():
            leaves[call_of[flow]].append((leaf, node, found.weights.at_leaf(flow, leaf)))
    return leaves
