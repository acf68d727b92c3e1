"""A copy of a module, also of one that keeps what `copy.deepcopy` cannot copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from funcfreeze.model.attributes import attributes


def copy_of(module: nn.Module) -> nn.Module:
    """A copy with tensors and generators of its own; graphs are left out, locks and the like are shared."""
    with _GraphsLeftOut():
        memo = _shared(module)
        copied = copy.deepcopy(module, memo)
        copies = dict(copied.named_parameters())
        for path, own in module.named_parameters():
            if own.__dict__ and path in copies:
                copies[path].__dict__ |= copy.deepcopy(own.__dict__, memo)  # torch forgets it (`weight.scale`)
    return copied


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
