"""Tracing a step to one flat graph of aten operators, which a compiler can look up in its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from funcfreeze.compile.layout import Listed
from funcfreeze.compile.private import FakeTensorMode, as_dynamos, make_fx, stand_in, stand_in_mode


@dataclass(frozen=True)
class Fakes:
    """Fake tensors for a graph's inputs and a state, of the mode in which Dynamo compiles."""

    mode: FakeTensorMode
    inputs: list[Any]
    state: Sequence[Tensor]


def fakes_of(inputs: Sequence[Any], state: Listed) -> Fakes:
    """Fakes for the inputs as Dynamo wants their sizes, and for the state's tensors, whose sizes are fixed.

    Inputs in the state's memory get fakes in memory of their own, as they will be copied at every call.
    """
    mode = stand_in_mode()

    def fake(given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        made = stand_in(mode, given)
        if state.shares(given):
            with mode:
                made = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=made.device)
        # a copy of one that requires no grad would not know the number that it may stand for
        return made.detach().requires_grad_() if made.requires_grad else made

    fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in state.tensors]
    return Fakes(mode, [fake(given) for given in inputs], fakes)


class Flat(NamedTuple):
    """A function as a flat graph.

    Attributes:
        graph: gives the tensors and sizes of what the function returns, in order.
        constants: tensors that it takes after its other inputs, the same at every call.
        returned: what the function returned in the trace, a pytree.
        whole: from what the graph gives to what the function returns.
    """

    graph: GraphModule
    constants: list[Tensor]
    returned: Any
    whole: Callable[[Sequence[Any]], Any]


def flatten(f: Callable[..., Any], given: Sequence[Any], outside: Sequence[Tensor], static: int) -> Flat:
    """The graph of a function; tensors that it met outside become inputs after those given.

    Args:
        f: the function, from tensors and sizes to a pytree.
        given: stand-ins for its inputs.
        outside: stand-ins for tensors that it meets; grows while it is called.
        static: so many of the inputs stay where they are.
    """
    returned: list[Any] = []

    def computed(*given: Any) -> tuple[Any, ...]:
        returned[:] = [f(*given)]
        return tuple(filter(_is_computed, optree.tree_leaves(returned[0], none_is_leaf=True)))

    module = make_fx(computed)(*given)
    _simplify(module)
    constants = _lift(module, outside)
    for node in module.graph.nodes:
        node.meta.pop("stack_trace", None)  # would be part of the cache's key
    module.recompile()
    as_dynamos(module, static)
    leaves, structure = optree.tree_flatten(returned[0], none_is_leaf=True)
    computed_at = [index for index, leaf in enumerate(leaves) if _is_computed(leaf)]
    kept = [None if _is_computed(leaf) else leaf for leaf in leaves]

    def whole(results: Sequence[Any]) -> Any:
        now = [*kept]
        for index, result in zip(computed_at, results, strict=True):
            now[index] = result
        return structure.unflatten(now)

    return Flat(module, constants, returned[0], whole)


def _is_computed(leaf: Any) -> bool:
    """Whether a graph gives it at every call anew; other things are the same as in the trace."""
    return isinstance(leaf, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool)


def _simplify(module: GraphModule) -> None:
    """Leave out what costs a compiler time and does nothing: no gradient is ever taken of this graph.

    A detached tensor is the same tensor, unless one of the two is given other memory or another form in place.
    """
    graph = module.graph
    if not any(_reforms(node) for node in graph.nodes):
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _reforms(node: Node) -> bool:
    return torch.Tag.inplace_view in getattr(node.target, "tags", ()) or "set_" in str(node.target)


def _lift(module: GraphModule, outside: Sequence[Tensor]) -> list[Tensor]:
    """Make inputs of the tensors that a graph holds: first those met outside, then others, which are returned."""
    graph = module.graph
    users: dict[int, list[Node]] = {id(tensor): [] for tensor in outside}
    held = [*outside]
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(module, node.target)
        if not isinstance(value, Tensor):
            continue
        if id(value) not in users:
            users[id(value)] = []
            held.append(value)
        users[id(value)].append(node)
    *_, last = graph.find_nodes(op="placeholder")
    for index, tensor in enumerate(held):
        with graph.inserting_after(last):
            last = graph.placeholder(f"outside_{index}")
        for node in users[id(tensor)]:
            node.replace_all_uses_with(last)
            graph.erase_node(node)
    for name, _ in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]:
        delattr(module, name)  # also of those that nothing needs any more
    return held[len(outside) :]
