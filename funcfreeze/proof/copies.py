"""Copies of a model, a state and a batch, in another precision if wanted: what a proof runs on."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcfreeze.computation.state import State
from funcfreeze.model.copying import copy_of
from funcfreeze.model.functional import FunctionalModule


def module_copy(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model in another dtype; ties stay ties, which `Module.to` does not see to for buffers."""
    copied = copy_of(module)
    if dtype is not None:
        FunctionalModule.of(copied).exchange(lambda tensor: cast(tensor, dtype))
    return copied


def cast_state(state: State, dtype: torch.dtype | None, wanted: Any) -> State:
    """The state in another dtype, its optimizer state as a step in that dtype would start it."""
    known = dict(zip(*optree.tree_flatten_with_path(wanted)[:2], strict=True))

    def cast_entry(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(known.get(path), Tensor):  # counts, a loss scale and moments may have a dtype of their own
            return cast(leaf, None if dtype is None else known[path].dtype)
        # what an optimizer has made since then: torch's kernels ask for their own counts in float32
        return cast(leaf, None if path and path[-1] == "step" else dtype)

    optimizer = optree.tree_map_with_path(cast_entry, state.optimizer)
    params, buffers, targets = (cast(each, dtype) for each in (state.params, state.buffers, state.targets))
    return State(params, buffers, optimizer, state.step.clone(), targets)


def cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a pytree with its floating tensors in another precision, complex ones too, or in their own."""

    def cast_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if dtype is None or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf.detach().clone()
        return leaf.detach().to(dtype.to_complex() if leaf.is_complex() else dtype, copy=True)

    return optree.tree_map(cast_leaf, tree, none_is_leaf=True)
