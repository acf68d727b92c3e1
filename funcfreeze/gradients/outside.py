"""What a forward returned depends on outside of it: that keeps its graph by torch.func's rule, nothing else does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from torch import Tensor
from torch.autograd.graph import Node

from funcfreeze.gradients.graph import NO_LEAF, Graph, gradient_edge


def ends_outside(graph: Graph, connected: frozenset[int]) -> bool:
    """Whether the losses depend on a tensor outside the forward that requires grad.

    Args:
        graph: the losses' graph.
        connected: the leaves that stand in for tensors that require grad.
    """
    ends = graph.leaves[1::2]
    return NO_LEAF in ends or not connected.isdisjoint(ends)


class Outside:
    """Tells of tensors that a forward made, one after another, whether they depend on anything outside of it."""

    def __init__(self, leaves: Sequence[Tensor], inside: Iterable[Node] = ()) -> None:
        """The forward's stand-ins for parameters; nodes that are known to lead nowhere else."""
        self.leaves = leaves
        self.inside = set(inside)

    @cached_property
    def _own(self) -> set[int]:
        return {id(leaf) for leaf in self.leaves}

    @cached_property
    def _ways_out(self) -> set[Node]:
        return {leaf.grad_fn for leaf in self.leaves if leaf.grad_fn is not None}

    def reached_from(self, tensor: Tensor) -> bool:
        """Whether the tensor's graph ends in anything but leaves of the forward's own."""
        if not tensor.requires_grad:
            return False
        start = gradient_edge(tensor).node
        if start in self.inside:
            return False
        pending, seen = [start], {start}
        while pending:
            node = pending.pop()
            following = node.next_functions
            if node in self._ways_out or (not following and id(getattr(node, "variable", None)) not in self._own):
                return True
            new = {child for child, _ in following if child is not None} - seen - self.inside
            seen |= new
            pending += new
        self.inside |= seen
        return False
