"""Which parameters a graph depends on, and who would walk through it where its values are old by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from funcfreeze.gradients.graph import NO_LEAF, Graph, gradient_edge, read_graph, refuse_reentrant
from funcfreeze.model.containers import flatten
from funcfreeze.optim.transform import lines


@dataclass(frozen=True)
class Reach:
    """Which parameters a graph depends on.

    Attributes:
        paths: of the leaves.
        graph: its structure.
        at: path -> the node in which the graph ends there.
    """

    paths: Sequence[str]
    graph: Graph
    at: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(value: Any, leaves: Mapping[str, Tensor]) -> Reach:
        """Of tensors in containers, down to these leaves."""
        tensors = [leaf for leaf in flatten(value)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
        graph, _ = read_graph([gradient_edge(tensor) for tensor in tensors], [*leaves.values()], None)
        refuse_reentrant(graph)
        paths = [*leaves]
        ends = zip(graph.leaves[::2], graph.leaves[1::2], strict=True)
        return Reach(paths, graph, {paths[leaf]: node for node, leaf in ends if leaf != NO_LEAF})

    def of_member(self, routed: AbstractSet[str]) -> list[str]:
        """The parameters that a member may update and that the graph depends on."""
        return [path for path in self.at if path in routed]

    def met(self, routed: AbstractSet[str]) -> set[str]:
        """The parameters below the nodes that lead to those that a member may update.

        Also what these nodes only look at: whether one has saved a value, or has it computed once more as activation
        checkpointing does, does not show.
        """
        found = _below_those_above(self.graph, frozenset(self.at[path] for path in self.of_member(routed)))
        return {path for path, node in self.at.items() if node in found}


@lru_cache(maxsize=64)
def _below_those_above(graph: Graph, nodes: frozenset[int]) -> AbstractSet[int]:
    """All nodes below those that lead to one of these."""
    children, above, start = [], [set[int]() for _ in graph.degrees], 0
    for node, degree in enumerate(graph.degrees):
        children.append({child for child in graph.edges[start : start + 2 * degree : 2] if child >= 0})
        start += 2 * degree
        for child in children[node]:
            above[child].add(node)
    return _walked([*_walked([*nodes], above.__getitem__)], children.__getitem__)


def _walked(start: Sequence[int], following: Callable[[int], AbstractSet[int]]) -> set[int]:
    """All nodes on the ways from some."""
    pending, seen = [*start], set(start)
    for node in pending:  # grows while it is walked
        new = following(node) - seen
        seen |= new
        pending += new
    return seen


def raise_conflicts(reach: Reach, routed: Mapping[str, AbstractSet[str]], asking: Sequence[str]) -> None:
    """Refuse members that walk through values which others have overwritten by then.

    Raises:
        ValueError: naming the members and the parameters.
    """
    problems = [*_conflicts(reach, routed, asking)]
    if problems:
        raise ValueError(
            lines(
                "what is shared is computed once, before any member runs, and these would walk back through it where "
                "its values are old by then:",
                [
                    *problems,
                    "let the member that walks run first, or compute in its own losses what depends on these",
                ],
            )
        )


def _conflicts(reach: Reach, routed: Mapping[str, AbstractSet[str]], asking: Sequence[str]) -> Iterator[str]:
    order = [*routed]
    for name in asking:
        met = reach.met(routed[name])
        for before in order[: order.index(name)]:
            if both := sorted(met & routed[before]):
                more = f" and {len(both) - 4} more" if len(both) > 4 else ""
                yield f"member {name!r}, after {before!r} has updated {', '.join(both[:4])}{more}"
