"""Dynamo's graph of a captured call: where the state's tensors go in, and where the losses come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from funcfreeze.compile.captured import END, HELD, LOSS
from funcfreeze.compile.checkpointing import checkpointed
from funcfreeze.compile.private import CHECKPOINT, FUNCTION, HOOKS_ARE_FUNCTIONS
from funcfreeze.compile.problems import NEEDS_VALUES, NotAsDeclared


@dataclass(frozen=True)
class Forward:
    """A captured forward as a function.

    Attributes:
        run: from all inputs to the outputs.
        places: for each input the path of the parameter or buffer it is, or None.
        losses: loss name -> its place among the outputs.
        has_lstm: whether it calls torch's LSTM.
        value_from: where the user's code first asks for the value of a tensor, as a traceback; empty if nowhere.
    """

    run: Callable[..., Sequence[Any]]
    places: list[str | None]
    losses: dict[str, int]
    has_lstm: bool
    value_from: str

    @property
    def others(self) -> list[int]:
        """The inputs that are no tensors of the state."""
        return [index for index, path in enumerate(self.places) if path is None]


def read_graph(module: GraphModule, inputs: Sequence[Any], places: Mapping[int, str]) -> Forward:
    """Take the marks out of a captured graph.

    Args:
        module: the graph, which is changed.
        inputs: example inputs: tensors, and sizes where they are dynamic.
        places: id of a tensor -> the path of the parameter or buffer it stands for.

    Raises:
        NotAsDeclared: what the losses returned is not what was declared.
    """
    graph = module.graph
    at = [places.get(id(given)) if isinstance(given, Tensor) else None for given in inputs]
    known = {node for node, path in zip(graph.find_nodes(op="placeholder"), at, strict=True) if path is not None}
    (output,) = graph.find_nodes(op="output")
    outputs = [*output.args[0]]
    for node in graph.find_nodes(op="call_function", target=END):
        if node.args[0]:
            raise NotAsDeclared
    losses = {node.args[1]: index for index, node in enumerate(outputs) if _is(node, LOSS)}
    for index, node in enumerate(outputs):
        if _is(node, LOSS):
            outputs[index] = _undetached(node.args[0])
        elif _is(node, HELD):  # nobody needs it but for a tensor of the state
            outputs[index] = node.args[0] if _undetached(node.args[0]) in known else None
        elif _is(node, END):
            outputs[index] = None
    output.args = (tuple(outputs),)
    for mark in (LOSS, HELD, END):
        for node in graph.find_nodes(op="call_function", target=mark):
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=CHECKPOINT):
        node.target, node.kwargs = checkpointed, {}  # Dynamo's operator only tags; the real one saves memory
    if HOOKS_ARE_FUNCTIONS:
        _keep_losses_apart(module)
    module.recompile()
    has_lstm = any(
        part.graph.find_nodes(op="call_function", target=torch.lstm)
        for part in module.modules()
        if isinstance(part, GraphModule)
    )
    return Forward(_telling_the_line(module), at, losses, has_lstm, next(_asking_for_values(module), ""))


def _asking_for_values(module: GraphModule) -> Iterator[str]:
    for node in module.graph.nodes:
        if node.target == "item" or "numpy" in str(node.target):
            yield node.stack_trace or ""


def _telling_the_line(module: GraphModule) -> Callable[..., Sequence[Any]]:
    """Calls the graph; where that needs a value that it does not have, the error tells the line that a node is from."""

    def run(*given: Any) -> Sequence[Any]:
        try:
            outputs: Sequence[Any] = module(*given)
        except NEEDS_VALUES:
            Interpreter(module).run(*given)
            raise
        return outputs

    return run


def _keep_losses_apart(module: GraphModule) -> None:
    """Where a function does nothing forward it may have been a hook, above which losses must not be added up."""
    for node in module.graph.find_nodes(op="call_function", target=FUNCTION):
        forward = getattr(module, str(node.args[0].target)).graph
        if {called.target for called in forward.nodes if called.op == "call_method"} == {"view_as"}:
            for result in [*node.users]:
                with module.graph.inserting_after(result):
                    module.graph.call_function(_hooked, (result,))


def _hooked(result: Any) -> None:
    if isinstance(result, Tensor) and result.requires_grad:
        result.register_hook(lambda gradient: gradient)  # type: ignore[no-untyped-call]  # torch's


def _is(node: Any, mark: Any) -> bool:
    return isinstance(node, Node) and node.target is mark


def _undetached(node: Any) -> Any:
    return node.args[0] if isinstance(node, Node) and node.target == "detach" else node
