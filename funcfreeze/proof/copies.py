"""Copies of a model, a state and a batch, in another precision if wanted: what a proof runs on."""

from __future__ import annotations

import copy
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from funcfreeze.computation.state import State
from funcfreeze.model.attributes import attributes
from funcfreeze.model.functional import FunctionalModule


def module_copy(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model in another dtype; ties stay ties, which `Module.to` does not see to for buffers."""
    with _GraphsLeftOut():
        memo = _shared(module)
        functional = FunctionalModule.of(copy.deepcopy(module, memo))
        copies = dict(functional.module.named_parameters())
        for path, own in module.named_parameters():
            if own.__dict__ and path in copies:
                copies[path].__dict__ |= copy.deepcopy(own.__dict__, memo)  # torch forgets it (`weight.scale`)
    if dtype is not None:
        functional.exchange(lambda tensor: cast(tensor, dtype))
    return functional.module


class _GraphsLeftOut(TorchFunctionMode):
    """Inside, a deep copy takes the values of tensors that hang on a graph, which torch refuses to copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _shared(module: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy` with what it cannot copy: generators are copied, locks and the like are shared."""
    memo: dict[int, Any] = {}
    for value in (value for inner in module.modules() for value in attributes(inner).values()):
        if isinstance(value, torch.Generator):
            memo[id(value)] = value.clone_state()
            continue
        try:
            copy.deepcopy(value, {})
        except TypeError:  # what Python says of objects that belong to the process
            memo[id(value)] = value
    return memo


def cast_state(state: State, dtype: torch.dtype | None, wanted: Any) -> State:
    """The state in another dtype, its optimizer state as a step in that dtype would start it."""
    known = dict(zip(*optree.tree_flatten_with_path(wanted)[:2], strict=True))

    def cast_entry(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(known.get(path), Tensor):  # counts, a loss scale and moments may have a dtype of their own
            return cast(leaf, None if dtype is None else known[path].dtype)
        # what an optimizer has made since then: torch's kernels ask for their own counts in float32
        return cast(leaf, None if path and path[-1] == "step" else dtype)

    optimizer = optree.tree_map_with_path(cast_entry, state.optimizer)
    return State(cast(state.params, dtype), cast(state.buffers, dtype), optimizer, state.step.clone())


def cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a pytree with its floating tensors in another precision, complex ones too, or in their own."""

    def cast_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if dtype is None or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf.detach().clone()
        return leaf.detach().to(dtype.to_complex() if leaf.is_complex() else dtype, copy=True)

    return optree.tree_map(cast_leaf, tree, none_is_leaf=True)
