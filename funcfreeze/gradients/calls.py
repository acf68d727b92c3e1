"""Which flows share one call of the autograd engine, and what the engine then runs.

Flows that never travel through the same node may share a call with the flow that they merge into: the engine adds up
by itself what arrives at a node. So the heads of a multi-task network and their trunk are one call, as if the losses
had been summed by hand; a call of its own is for flows that overlap, and for those that are weighted where they merge.

A flow that merges into one of another call *exits* there. An exit from which another input of the same call can be
reached would leak: the engine runs through it. Such exits are *blocked*: they, and what lies between them and the next
exit, run on undefined cotangents, which torch's own nodes pass on without computing anything. Foreign code cannot be
trusted to: where some would run so, the exit is *unsafe*, and the flows have to be followed anew with no merge there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from funcfreeze.gradients.flows import FlowMap
from funcfreeze.gradients.weights import UNIT_WEIGHT, Flow

Call = frozenset[Flow]
"""Flows that share one call of the engine."""


@dataclass(frozen=True)
class Runs:
    """What the engine runs in each call, as bit sets of calls (bit i is `calls[i]`).

    Attributes:
        below: for each node, the calls that want something below it: the engine runs the node if it gets there.
        passing: for each node, the calls of which a flow passes it.
        exits: for each call, the nodes where a flow of it becomes part of another call, with that flow.
    """

    calls: Sequence[Call]
    below: Sequence[int]
    passing: Sequence[int]
    exits: Sequence[dict[int, list[Flow]]]


def engine_runs(found: FlowMap, calls: Sequence[Call]) -> Runs:
    """Work out which nodes each call runs."""
    size = found.shape.size
    bit = {flow: 1 << index for index, call in enumerate(calls) for flow in call}
    exits = [_exits(found, call) for call in calls]
    passing, wanted, below = [0] * size, [0] * size, [0] * size
    for node, leaving in enumerate(found.passing):
        for flow in leaving:
            passing[node] |= bit.get(flow, 0)
    for node in found.shape.leaf:
        wanted[node] = passing[node]
    for index, places in enumerate(exits):
        for node in places:
            wanted[node] |= 1 << index
    for node in reversed(found.shape.order):
        for child, _ in found.shape.children[node]:
            below[node] |= below[child] | wanted[child]
    return Runs(calls, below, passing, exits)


def _exits(found: FlowMap, call: Call) -> dict[int, list[Flow]]:
    exits: dict[int, list[Flow]] = {}
    for flow in call:
        for node, (_, merged) in found.stops.get(flow, {}).items():
            if merged not in call:
                exits.setdefault(node, []).append(flow)
    return exits


def blocked_exits(runs: Runs, index: int) -> list[int]:
    """The exits of a call that the engine would run through."""
    return [node for node in runs.exits[index] if runs.below[node] >> index & 1]


def blocked_zone(found: FlowMap, runs: Runs, index: int, exit: int) -> Iterator[int]:
    """The nodes that a blocked exit makes the engine run on undefined cotangents: itself, down to the next exits."""
    bit = 1 << index
    seen = {exit}
    pending = [exit]
    for node in pending:  # grows while it is walked
        yield node
        for child, _ in found.shape.children[node]:
            nothing_arrives = not runs.passing[child] & bit and child not in runs.exits[index]
            if runs.below[child] & bit and nothing_arrives and child not in seen:
                seen.add(child)
                pending.append(child)


def unsafe_exits(found: FlowMap, runs: Runs) -> frozenset[int]:
    """The blocked exits whose zone holds foreign code."""
    foreign = found.shape.runs_foreign_code
    if not any(foreign):
        return frozenset()
    return frozenset(
        node
        for index in range(len(runs.calls))
        for node in blocked_exits(runs, index)
        if any(foreign[inside] for inside in blocked_zone(found, runs, index, node))
    )


def share_calls(found: FlowMap) -> list[Call]:
    """Put flows into as few calls as is right, each call after those that feed it."""
    flows = found.flows
    whole = frozenset(flows)
    if _may_share(found, whole):
        return [whole]
    calls = {flow: frozenset({flow}) for flow in flows}
    for merged in flows:
        feeders = [flow for flow in flows if any(into == merged for _, into in found.stops.get(flow, {}).values())]
        for joined in [feeders, *([feeder] for feeder in feeders)]:
            united = frozenset().union(calls[merged], *(calls[flow] for flow in joined))
            if united != calls[merged] and _may_share(found, united) and not _feeds_itself(found, calls, united):
                calls.update(dict.fromkeys(united, united))
    return _in_order(found, list(dict.fromkeys(calls.values())))


def _may_share(found: FlowMap, call: Call) -> bool:
    """Whether one engine call computes what the flows mean: nothing is added up that should stay apart, nothing leaks.

    Then at every node that runs there is one flow of the call at most, it goes wherever the engine would take it, and
    where flows merge inside the call none of them is to be weighted, and no rule decides.
    """
    runs = engine_runs(found, [call])
    exits = runs.exits[0]
    for flow in call:
        for node, (weight, merged) in found.stops.get(flow, {}).items():
            if merged in call and (weight != UNIT_WEIGHT or node in found.crossings):
                return False
    for node, leaving in enumerate(found.passing):
        inside = [flow for flow in leaving if flow in call]
        if len(inside) + len(exits.get(node, ())) > 1:
            return False
        for flow in inside:
            for child, _ in found.shape.children[node]:
                taken = runs.below[child] or child in exits or (child in found.shape.leaf and runs.passing[child])
                if taken and flow not in found.arrivals[child]:
                    return False
    return not unsafe_exits(found, runs)


def _fed_by(found: FlowMap, call: Call, calls: Sequence[Call]) -> list[Call]:
    """The calls that a call's exits lead to."""
    into = {merged for flow in call for _, merged in found.stops.get(flow, {}).values()}
    return [other for other in calls if other != call and into & other]


def _feeds_itself(found: FlowMap, calls: dict[Flow, Call], united: Call) -> bool:
    """Whether the united call would have to wait for a call that waits for it."""
    others = [call for call in dict.fromkeys(calls.values()) if not call & united]
    pending = list(_fed_by(found, united, others))
    seen = set(pending)
    for call in pending:  # grows while it is walked
        into = {merged for flow in call for _, merged in found.stops.get(flow, {}).values()}
        if into & united:
            return True
        new = [other for other in _fed_by(found, call, others) if other not in seen]
        seen.update(new)
        pending += new
    return False


def _in_order(found: FlowMap, calls: Sequence[Call]) -> list[Call]:
    """Every call after those that feed it, otherwise in the order given."""
    waiting = {call: {other for other in calls if call in _fed_by(found, other, calls)} for call in calls}
    ordered: list[Call] = []
    while waiting:
        ready = next(call for call, feeders in waiting.items() if not feeders - set(ordered))
        ordered.append(ready)
        del waiting[ready]
    return ordered
