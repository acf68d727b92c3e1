"""Reading the autograd graph into index space: a hashable value that says what is connected to what, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

NO_LEAF = -1


class Graph(NamedTuple):
    """The structure of an autograd graph, in the order a walk from the losses discovers it.

    Equal graphs have equal structure, so that what was planned for one holds for the other. Kept flat: it is rebuilt
    at every step, and compared with the planned ones.

    Attributes:
        kinds: the class of each node.
        degrees: how many edges leave each node.
        edges: all edges, node after node: (node it leads to, or -1; which of that node's inputs), flattened.
        leaves: for each node that the walk ended in: (node, leaf index or NO_LEAF), flattened.
        roots: for each loss: the node it comes from and which of its outputs it is, or None for an absent loss.
        hooked: the nodes that carry hooks; None if any may.
    """

    kinds: tuple[type, ...]
    degrees: tuple[int, ...]
    edges: tuple[int, ...]
    leaves: tuple[int, ...]
    roots: tuple[tuple[int, int] | None, ...]
    hooked: tuple[int, ...] | None


def read_graph(
    losses: Sequence[GradientEdge | None], leaves: Sequence[Tensor], hooked: Iterable[Node] | None
) -> tuple[Graph, list[Node]]:
    """Walk the graph from the losses down to its leaves.

    Args:
        losses: where each loss comes from; None for a loss that is absent.
        leaves: tensors whose gradient may be wanted, where the walk ends; others that the graph ends in get `NO_LEAF`.
        hooked: the nodes known to carry hooks; None if any may.

    Returns:
        The structure, and the nodes its indices stand for.
    """
    leaf_index: Mapping[int, int] = {id(leaf): index for index, leaf in enumerate(leaves)}
    ways_out = {leaf.grad_fn: index for index, leaf in enumerate(leaves) if leaf.grad_fn is not None}
    position: dict[Node, int] = {}
    nodes: list[Node] = []
    roots: list[tuple[int, int] | None] = []
    for edge in losses:
        if edge is None:
            roots.append(None)
            continue
        if edge.node not in position:
            position[edge.node] = len(nodes)
            nodes.append(edge.node)
        roots.append((position[edge.node], edge.output_nr))
    kinds: list[type] = []
    degrees: list[int] = []
    edges: list[int] = []
    ends: list[int] = []
    for index, node in enumerate(nodes):  # grows while it is walked
        kinds.append(type(node))
        following = () if node in ways_out else node.next_functions
        degrees.append(len(following))
        for child, output_nr in following:
            if child is None:
                edges.append(-1)
            else:
                found = position.get(child)
                if found is None:
                    position[child] = found = len(nodes)
                    nodes.append(child)
                edges.append(found)
            edges.append(output_nr)
        if not following:
            leaf = getattr(node, "variable", None)  # only the nodes that accumulate a gradient have one
            ends += (index, ways_out.get(node, NO_LEAF) if leaf is None else leaf_index.get(id(leaf), NO_LEAF))
    known = None if hooked is None else tuple(sorted({position[node] for node in hooked if node in position}))
    return Graph(tuple(kinds), tuple(degrees), tuple(edges), tuple(ends), tuple(roots), known), nodes


def refuse_reentrant(graph: Graph) -> None:
    """Refuse a graph with parameters that nobody can see.

    Raises:
        RuntimeError: reentrant activation checkpointing is in it.
    """
    if any(kind.__name__ == "CheckpointFunctionBackward" for kind in set(graph.kinds)):
        raise RuntimeError(
            "the forward uses reentrant activation checkpointing, whose parameters autograd cannot see; call "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def leaves_below(loss: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that a loss's graph ends in."""
    nodes = [gradient_edge(loss).node] if loss.requires_grad else []
    seen = set(nodes)
    for node in nodes:  # grows while it is walked
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        below = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= below
        nodes += below


@lru_cache(maxsize=64)
def losses_at_other_leaves(graph: Graph) -> Mapping[int, tuple[int, ...]]:
    """For each node that accumulates a gradient and is none of the leaves: the losses that end in it."""
    above: dict[int, list[int]] = {
        node: [] for node, leaf in zip(graph.leaves[::2], graph.leaves[1::2], strict=True) if leaf == NO_LEAF
    }
    starts = [0]
    for degree in graph.degrees:
        starts.append(starts[-1] + 2 * degree)
    for loss, root in enumerate(graph.roots):
        pending = [] if root is None else [root[0]]
        seen = set(pending)
        for node in pending:  # grows while it is walked
            if node in above:
                above[node].append(loss)
            below = {child for child in graph.edges[starts[node] : starts[node + 1] : 2] if child >= 0} - seen
            seen |= below
            pending += below
    return {node: tuple(losses) for node, losses in above.items()}


def gradient_edge(loss: Tensor) -> GradientEdge:
    """Where a loss comes from; for a loss that is itself a parameter, the node that accumulates its gradient.

    For a loss that a Python `Function` returns, torch's view above it: that node of torch's keeps the Function's alive,
    which is owned by what is above it alone before torch 2.13.
    """
    edge = torch.autograd.graph.get_gradient_edge(loss)
    return edge if edge.ownership_token is None else GradientEdge(edge.ownership_token, 0)
