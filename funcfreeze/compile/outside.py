"""Tensors that a computation reads from elsewhere: attributes of modules, closures, globals, the optimizer's options.

A traced graph must not bake them in. They are noticed where they enter an operation, and something else, an input of
the graph, is put in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_LIFTS = frozenset(
    {
        torch.ops.aten.lift_fresh.default,
        torch.ops.aten.lift_fresh_copy.default,
        torch.ops.aten.lift.default,
    }
)
"""What `torch.tensor([1.0, 2.0])` inside a traced function calls on a tensor that nobody else has: a true constant."""


class ReplacingOutsiders(TorchDispatchMode):
    """Exchanges every tensor that is not part of the trace.

    Args:
        replace: a real tensor -> what stands for it in the trace.
    """

    def __init__(self, replace: Callable[[Tensor], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._replace = replace

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _LIFTS:
            return func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"a checkpointed part of the forward draws random numbers ({func}); compiled, it would draw others "
                "when it is run again in the backward. Take dropout out of what is checkpointed, or build the Step "
                "with compile=False"
            )
        args, kwargs = tree_map_only(Tensor, self._traced, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _traced(self, tensor: Tensor) -> Tensor:
        traced = isinstance(tensor, FakeTensor | FunctionalTensor) or tensor.device.type == "meta"
        return tensor if traced else self._replace(tensor)
