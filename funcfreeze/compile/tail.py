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


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel.

    Attributes:
        places: where its tensors are among the inputs of a graph and then what it gave.
        made: the argument, from these tensors.
    """

    places: tuple[int, ...]
    made: Callable[[tuple[Any, ...]], Any]


@dataclass(frozen=True)
class Tail:
    """What is left to do after a graph.

    Attributes:
        inputs: the inputs that the graph still takes.
        outputs: how many outputs it had.
        calls: kernels, and what they are given: so many by their places, the rest by these names.
    """

    inputs: tuple[int, ...]
    outputs: int
    calls: tuple[tuple[Callable[..., None], tuple[Argument, ...], dict[str, Argument]], ...]

    def after(self, graph: Callable[..., Sequence[Any]], first: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
        """A function of the other inputs, which calls the graph and then the kernels.

        Args:
            graph: without the kernels.
            first: its first inputs, which are the same at every call: arguments made of these alone are made once.

        Returns:
            From the other inputs to what the graph gave at first.
        """
        number = len(first)
        own = [first[index] for index in self.inputs if index < number]
        others = [index - number for index in self.inputs if index >= number]
        calls = [
            (
                kernel,
                [_made_of(argument, first) for argument in args],
                {name: _made_of(argument, first) for name, argument in kwargs.items()},
            )
            for kernel, args, kwargs in self.calls
        ]

        def run(rest: Sequence[Any]) -> Sequence[Any]:
            computed = graph(*own, *map(rest.__getitem__, others))
            later = [*rest, *computed]
            for kernel, args, kwargs in calls:
                kernel(*[take(later) for take in args], **{name: take(later) for name, take in kwargs.items()})
            return computed[: self.outputs]

        return run


def _made_of(argument: Argument, first: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
    """The argument, from the tensors that come after the first ones."""
    number = len(first)
    if all(place < number for place in argument.places):
        made = argument.made(tuple(first[place] for place in argument.places))
        return lambda later: made
    if any(place < number for place in argument.places):
        return lambda later: argument.made(
            tuple(first[place] if place < number else later[place - number] for place in argument.places)
        )
    if len(argument.places) == 1:
        (only,) = argument.places
        return lambda later: argument.made((later[only - number],))
    several = itemgetter(*[place - number for place in argument.places])  # quicker than a loop: there may be hundreds
    return lambda later: argument.made(several(later))


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
    taken = _last_calls(module) if kernels else []

    def place(given: Node) -> int:
        if given in places:
            return places[given]
        if given not in outputs:
            outputs.append(given)
        return len(places) + outputs.index(given)

    calls = [
        (
            kernel,
            tuple(_argument(value, place) for value in args),
            {name: _argument(value, place) for name, value in kwargs.items()},
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


def _last_calls(module: GraphModule) -> list[Node]:
    """The kernels at the end: none of what they write to is read afterwards but by kernels."""
    found: list[Node] = []
    later: set[Node] = set()
    for node in reversed([*module.graph.nodes]):
        if node.target in KERNELS:
            if later.intersection(node.all_input_nodes):
                break
            found.insert(0, node)
        elif node.op != "output":
            later |= set(node.all_input_nodes)
    return found


def _argument(value: Any, place: Callable[[Node], int]) -> Argument:
    if isinstance(value, Node):
        return Argument((place(value),), itemgetter(0))
    if isinstance(value, list | tuple) and any(isinstance(part, Node) for part in value):
        return Argument(tuple(map(place, value)), tuple)
    return Argument((), lambda _: value)
