"""What our own part of a step reads from elsewhere: rates and weights in tensors or from functions, tensors in hooks.

A traced graph must not bake them in: each becomes an input of the graph, read anew at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcfreeze.compile.private import FakeTensorMode, TorchDispatchMode, device_of, is_traced, tree_map_only, untraced
from funcfreeze.model.memory import memory_of
from funcfreeze.model.watching import tensors_given
from funcfreeze.schedules.calling import Check

_LIFTS = frozenset(
    {
        torch.ops.aten.lift_fresh.default,
        torch.ops.aten.lift_fresh_copy.default,
        torch.ops.aten.lift.default,
    }
)
"""What `torch.tensor([1.0, 2.0])` inside a traced function calls on a tensor that nobody else has: a true constant."""


class Outside(TorchDispatchMode):
    """Inside, a stand-in takes the place of every tensor that is not part of the trace.

    Args:
        mode: of the stand-ins.
        step: the present count of steps, with which schedules are tried.

    Attributes:
        stand_ins: what stood for them when they were noticed.
        written: the memory that operators wrote to.
    """

    supports_higher_order_operators = True

    def __init__(self, mode: FakeTensorMode, step: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._mode, self._step = mode, step.clone()  # its own: the state is not kept alive
        self._known: dict[int, int] = {}
        self._read: list[Callable[[Tensor], Tensor]] = []
        self._kept: list[Any] = []  # held, or an id could be another's
        self.stand_ins: list[Tensor] = []
        self.written: set[int | None] = set()

    def tensors(self, step: Tensor) -> list[Tensor]:
        """All of them now, in the order of the stand-ins, and of their kind.

        Raises:
            ValueError: one has another shape or device than when the step was traced.
        """
        return [_as(read(step), stand_in) for read, stand_in in zip(self._read, self.stand_ins, strict=True)]

    def keep(self, called: Any) -> None:
        """Keep what the graph calls alive as long as this is."""
        self._kept.append(called)

    def scheduled(self, schedule: Callable[[Any], Any], check: Check) -> Tensor:
        """A stand-in for what a function of the step gives; it is called, and checked, before every step."""

        def read(step: Tensor) -> Tensor:
            value = check(schedule(step))
            if isinstance(value, Tensor):
                return value
            return torch.full((), value, dtype=torch.float64, device=step.device)

        return self._stand_in(schedule, read)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # two of three calls of a trace, and every mode takes its time
            return device_of(args[0])
        given = list(tensors_given(func, args, kwargs or {}))
        if func not in _LIFTS and not all(is_traced(tensor) for tensor, _ in given):
            args, kwargs = tree_map_only(Tensor, self._traced, (args, kwargs or {}))
            given = list(tensors_given(func, args, kwargs))
        for tensor, is_written in given:
            if is_written:
                self.written.add(memory_of(tensor))
        self.written |= {memory_of(tensor) for tensor in _statistics(func, args)}
        return func(*args, **(kwargs or {}))

    def _traced(self, tensor: Tensor) -> Tensor:
        return tensor if is_traced(tensor) else self._stand_in(tensor, lambda step: tensor)

    def _stand_in(self, known_by: Any, read: Callable[[Tensor], Tensor]) -> Tensor:
        index = self._known.get(id(known_by))
        if index is None:
            with untraced():
                example = read(self._step).detach()
            self._known[id(known_by)] = index = len(self._read)
            self._read.append(read)
            self._kept.append(known_by)
            self.stand_ins.append(self._mode.from_tensor(example, static_shapes=True))
        return self.stand_ins[index]


def _as(tensor: Tensor, wanted: Tensor) -> Tensor:
    """The tensor in the dtype for which code was compiled: a schedule may give now this, now that."""
    if (tensor.shape, tensor.device) != (wanted.shape, wanted.device) or tensor.stride() != wanted.stride():
        raise ValueError(
            f"a rate, a weight or another tensor that the optimizer reads had shape {tuple(wanted.shape)} on "
            f"{wanted.device} when the step was traced, and has {tuple(tensor.shape)} on {tensor.device} now"
        )
    return tensor if tensor.dtype == wanted.dtype else tensor.to(wanted.dtype)


def _statistics(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """The running statistics that an operator is given. Those of batch norms do not tell that they write to them."""
    if "batch_norm" not in func.name():
        return []
    named = zip(func._schema.arguments, args, strict=False)
    return [given for argument, given in named if "running" in argument.name and isinstance(given, Tensor)]
