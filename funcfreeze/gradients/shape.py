"""The structure of an autograd graph, made ready to ask: children, a topological order, whose code runs where."""

from __future__ import annotations

from functools import cached_property

import torch

from funcfreeze.gradients.graph import Graph


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
    def owner(self) -> list[int]:
        """For each node, one that keeps it alive as long as Python holds it: itself, but for a Python `Function`'s.

        Before torch 2.13 such a node is owned by the nodes above it alone. The nearest one of torch's own will do.
        """
        python = {kind: issubclass(kind, torch._C._FunctionBase) for kind in set(self.graph.kinds)}
        owner = list(range(self.size))
        for node in self.order:
            for child, _ in self.children[node]:
                if python[self.graph.kinds[child]]:
                    owner[child] = owner[node]
        return owner

    def above(self, node: int) -> set[int]:
        """The nodes from which this one can be reached, itself included."""
        found = {node}
        for other in reversed(self.order):
            if any(child in found for child, _ in self.children[other]):
                found.add(other)
        return found

    @cached_property
    def is_compiled(self) -> bool:
        """Whether a backward compiled by torch.compile is in the graph; its saved tensors are freed all or never."""
        return any("CompiledFunction" in kind.__name__ for kind in self.graph.kinds)


def _is_foreign(kind: type) -> bool:
    return issubclass(kind, torch._C._FunctionBase) or kind.__name__ == "CppFunction"
