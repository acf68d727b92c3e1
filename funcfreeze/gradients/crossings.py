"""Where the cotangents of several losses meet at one node, for a rule that decides there and not at the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from funcfreeze.declare.plan import raise_problems
from funcfreeze.gradients.flows import FlowMap
from funcfreeze.gradients.graph import NO_LEAF
from funcfreeze.gradients.weights import Flow


class Crossing(NamedTuple):
    """What a rule is to decide about.

    Attributes:
        label: of the overlap.
        leaves: its parameters.
        losses: that may update one of them.
    """

    label: str
    leaves: tuple[int, ...]
    losses: tuple[int, ...]


def find_crossings(
    found: FlowMap, wanted: Sequence[Crossing], losses: Sequence[str], paths: Sequence[str]
) -> dict[int, int]:
    """For each node at which one of these is decided, which.

    All losses that reach a parameter of the overlap have to arrive at that node, each by itself, and to leave it as one
    flow, which is what arrives at all of these parameters, and at no others.

    Raises:
        RouteError: where losses do not meet so, and where they do.
    """
    node_of = {leaf: node for node, leaf in found.shape.leaf.items() if leaf != NO_LEAF}
    crossings: dict[int, int] = {}
    problems: list[str] = []
    for index, crossing in enumerate(wanted):
        arriving = {leaf: found.passing[node_of[leaf]] for leaf in crossing.leaves if leaf in node_of}
        flows = {flow for there in arriving.values() for flow in there}
        present = _union(flows)
        if present.bit_count() < 2:
            continue
        nodes = found.merges_into(flows)
        (flow, *others), node = flows, min(nodes, default=-1)
        feeding = [fed for fed, stops in found.stops.items() if node in stops and stops[node][1] == flow]
        feeding += [start.flow for start in found.starts if start.node == node and start.flow == flow]
        if others or len(nodes) != 1 or any(fed.losses.bit_count() > 1 for fed in feeding):
            problems.append(_elsewhere(found, crossing, flows, nodes, losses))
            continue
        beside = _beside(found, flow, crossing, paths)
        if beside:
            problems.append(
                f"merge {crossing.label!r}: where {_named(present, losses)} meet, {', '.join(beside)} "
                f"{'is' if len(beside) == 1 else 'are'} below, too, and not under the rule. A rule with "
                "at='activations' decides for all that is below: put them under it, or use at='parameters'"
            )
            continue
        crossings[node] = index
    raise_problems(problems)
    return crossings


def _union(flows: Mapping[Flow, object] | set[Flow]) -> int:
    losses = 0
    for flow in flows:
        losses |= flow.losses
    return losses


def _beside(found: FlowMap, flow: Flow, crossing: Crossing, paths: Sequence[str]) -> list[str]:
    """The parameters in which the flow ends that are none of the overlap."""
    return [
        paths[leaf]
        for node, leaf in found.shape.leaf.items()
        if leaf != NO_LEAF and leaf not in crossing.leaves and flow in found.passing[node]
    ]


def _elsewhere(found: FlowMap, crossing: Crossing, flows: set[Flow], nodes: set[int], losses: Sequence[str]) -> str:
    shown = "; ".join(_places(found, flows, nodes, losses)) or "they arrive at the parameters one by one"
    return (
        f"merge {crossing.label!r}: at='activations' takes losses that meet at one place above these parameters; "
        f"{_named(_union(flows), losses)} do not: {shown}. Use at='parameters'"
    )


def _places(found: FlowMap, flows: set[Flow], nodes: set[int], losses: Sequence[str]) -> Iterator[str]:
    for node in sorted(nodes):
        met = _union({fed for fed, stops in found.stops.items() if node in stops and stops[node][1] in flows})
        yield f"{_named(met, losses)} meet at {found.shape.graph.kinds[node].__name__}"
    alone = [flow for flow in flows if flow.losses.bit_count() == 1]
    if alone and nodes:
        yield f"{_named(_union(set(alone)), losses)} arrive{'s' if len(alone) == 1 else ''} by another way as well"


def _named(bits: int, losses: Sequence[str]) -> str:
    names = [loss for index, loss in enumerate(losses) if bits >> index & 1]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
