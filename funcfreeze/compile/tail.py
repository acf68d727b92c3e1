"""The optimizer's fused kernels, taken off the end of a graph: a compiler would only make calls of them.

For a compiler they are costly: each overwrites hundreds of its inputs, which it copies and traces back. Left out, the
graph has a quarter of the work and none of the optimizer's state among its inputs; it gives gradients instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch.fx import GraphModule, Node

from funcfreeze.optim.opaque import KERNELS

Call = tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]
"""A kernel and what it is given, with nodes for tensors."""

Take = Callable[[Sequence[Any]], Any]
"""An argument of a kernel, from the inputs of a graph and what it gave, in one list."""


@dataclass(frozen=True)
class Tail:
    """What is left to do after a graph.

    Attributes:
        inputs: the inputs that the graph still takes.
        outputs: how many outputs it had.
        calls: kernels, and what they are given.
    """

    inputs: tuple[int, ...]
    outputs: int
    calls: tuple[tuple[Callable[..., None], tuple[Take, ...], dict[str, Take]], ...]

    def run(self, graph: Callable[..., Sequence[Any]], given: Sequence[Any]) -> Sequence[Any]:
        """Call the graph, then the kernels; returns what the graph gave at first."""
        computed = graph(*map(given.__getitem__, self.inputs))
        both = [*given, *computed]
        for kernel, args, kwargs in self.calls:
            kernel(*[take(both) for take in args], **{name: take(both) for name, take in kwargs.items()})
        return computed[: self.outputs]


def take_off(module: GraphModule, kernels: bool) -> Tail:
    """Take the kernels off a graph, where nothing comes after them that reads what they write; and unused inputs.

    Args:
        module: the graph, which is changed.
        kernels: False leaves them in it, for CUDA graphs to record.
    """
    graph = module.graph
    places = {node: index for index, node in enumerate(graph.find_nodes(op="placeholder"))}
    (output,) = graph.find_nodes(op="output")
    outputs = [*output.args[0]]
    number = len(outputs)
    taken = _last_calls(module, places) if kernels else []

    def place(given: Node) -> int:
        if given in places:
            return places[given]
        if given not in outputs:
            outputs.append(given)
        return len(places) + outputs.index(given)

    calls = [
        (
            kernel,
            tuple(_take(value, place) for value in args),
            {name: _take(value, place) for name, value in kwargs.items()},
        )
        for kernel, args, kwargs in _together(taken)
    ]
    for node in reversed(taken):
        graph.erase_node(node)
    output.args = (tuple(outputs),)
    unused = [node for node in places if not node.users]
    for node in unused:
        graph.erase_node(node)
    module.recompile()
    return Tail(tuple(index for node, index in places.items() if node not in unused), number, tuple(calls))


def _together(nodes: Sequence[Node]) -> list[Call]:
    """Calls of one kernel with the same numbers as one call: in a graph each has few parameters, for the compiler."""
    calls: list[Call] = []
    for node in nodes:
        call = (KERNELS[node.target], node.args, dict(node.kwargs))
        joined = _joined(calls[-1], call) if calls else None
        calls[-1 if joined else len(calls) :] = [joined or call]
    return calls


def _joined(one: Call, other: Call) -> Call | None:
    """Both calls as one, if they differ in lists of tensors alone."""
    same = one[0] is other[0] and len(one[1]) == len(other[1]) and one[2].keys() == other[2].keys()
    if not same:
        return None
    args = [_added(*pair) for pair in zip(one[1], other[1], strict=True)]
    kwargs = {name: _added(value, other[2][name]) for name, value in one[2].items()}
    return None if any(value is _APART for value in (*args, *kwargs.values())) else (one[0], tuple(args), kwargs)


_APART = object()


def _added(one: Any, other: Any) -> Any:
    """Two arguments as one: lists of tensors put together, others if they are the same."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and any(isinstance(x, Node) for x in one):
        return [*one, *other]
    return one if type(one) is type(other) and one == other else _APART


def _last_calls(module: GraphModule, places: dict[Node, int]) -> list[Node]:
    """The kernels at the end: none of what they write to is read afterwards but by kernels."""
    found: list[Node] = []
    later: set[Node] = set()
    for node in reversed([*module.graph.nodes]):
        if node.target in KERNELS:
            if {given for given in node.all_input_nodes if given in places} & later:
                break
            found.insert(0, node)
        elif node.op != "output":
            later |= set(node.all_input_nodes)
    return found


def _take(value: Any, place: Callable[[Node], int]) -> Take:
    if isinstance(value, Node):
        return itemgetter(place(value))
    if not isinstance(value, list | tuple) or not any(isinstance(part, Node) for part in value):
        return lambda both: value
    if len(value) == 1:
        (only,) = (place(part) for part in value)
        return lambda both: [both[only]]
    return itemgetter(*map(place, value))  # quicker than a loop: there may be thousands
