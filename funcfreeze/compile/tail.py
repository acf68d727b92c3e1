"""The optimizer's fused kernels, taken off the end of a graph: a compiler would only make calls of them.

For a compiler they are costly: each overwrites hundreds of its inputs, which it copies and traces back. Left out, the
graph has a quarter of the work and none of the optimizer's state among its inputs; it gives gradients instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.fx import GraphModule, Node

from funcfreeze.optim.opaque import KERNELS


class At(NamedTuple):
    """A tensor that a kernel is given: an input of the graph, or one of its outputs."""

    is_input: bool
    place: int


@dataclass(frozen=True)
class Tail:
    """What is left to do after a graph.

    Attributes:
        inputs: the inputs that the graph still takes.
        outputs: how many outputs it had.
        calls: kernels, and what they are given, with an `At` for every tensor.
    """

    inputs: tuple[int, ...]
    outputs: int
    calls: tuple[tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]], ...]

    def run(self, graph: Callable[..., Sequence[Any]], given: Sequence[Any]) -> Sequence[Any]:
        """Call the graph, then the kernels; returns what the graph gave at first."""
        computed = graph(*[given[index] for index in self.inputs])

        def tensor(at: Any) -> Any:
            return (given if at.is_input else computed)[at.place]

        for kernel, args, kwargs in self.calls:
            kernel(*_filled(args, tensor), **_filled(kwargs, tensor))
        return computed[: self.outputs]


def _filled(value: Any, tensor: Callable[[At], Any]) -> Any:
    if isinstance(value, At):
        return tensor(value)
    if isinstance(value, dict):
        return {key: _filled(part, tensor) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(part, tensor) for part in value]
    return value


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
    calls = []
    for node in taken:

        def at(given: Node) -> Any:
            if given in places:
                return At(True, places[given])
            if given not in outputs:
                outputs.append(given)
            return At(False, outputs.index(given))

        calls.append((KERNELS[node.target], _mapped(node.args, at), _mapped(node.kwargs, at)))
    for node in reversed(taken):
        graph.erase_node(node)
    output.args = (tuple(outputs),)
    unused = [node for node in places if not node.users]
    for node in unused:
        graph.erase_node(node)
    module.recompile()
    return Tail(tuple(index for node, index in places.items() if node not in unused), number, tuple(calls))


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


def _mapped(value: Any, at: Callable[[Node], Any]) -> Any:
    if isinstance(value, Node):
        return at(value)
    if isinstance(value, dict):
        return {key: _mapped(part, at) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_mapped(part, at) for part in value)
    return value
