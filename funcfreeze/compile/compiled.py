"""The compiled step as a Step holds it. What does the work is imported at the first call: half of torch's compiler."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from funcfreeze.compile.layout import Listed
from funcfreeze.compile.options import Options
from funcfreeze.computation.computation import Computation

if TYPE_CHECKING:
    from funcfreeze.compile.capturing import Capturing


@dataclass(frozen=True)
class Returned:
    """What a compiled step gives.

    Attributes:
        losses: by name.
        metrics: what came beside them.
        buffers: those that could not be overwritten in place, by path.
        params: the new values of parameters that no loss may update, and that the forward wrote to.
        optimizer: the optimizer's new state, or None if all of it was overwritten in place.
        gradients: large gradients on the CPU, kept only to keep their memory.
    """

    losses: Mapping[str, Any]
    metrics: Mapping[str, Any]
    buffers: Mapping[str, Tensor]
    params: Mapping[str, Tensor]
    optimizer: Any
    gradients: list[Tensor]


class CompiledStep:
    """A computation, compiled as often as it has to be.

    Args:
        computation: what a step computes.
        options: how to compile.
        donate: whether a step overwrites the state it is given, or copies of it.
    """

    def __init__(self, computation: Computation, options: Options, donate: bool) -> None:
        self.options = options
        self._computation = computation
        self._donate = donate
        self._lock = threading.RLock()
        self._capturing: Capturing | None = None

    @property
    def traces(self) -> int:
        """How many times it has been traced and compiled so far."""
        return 0 if self._capturing is None else self._capturing.traces

    def __call__(self, state: Listed, batch: Any) -> Returned:
        """Take a step that overwrites the state's tensors."""
        with self._lock:
            if self._capturing is None:
                self._capturing = self._first(state)
            return self._capturing(state, batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStep:
        return CompiledStep(
            copy.deepcopy(self._computation, memo), self.options, self._donate
        )  # compiled anew when it is called

    def _first(self, state: Listed) -> Capturing:
        from funcfreeze.compile.capturing import Capturing

        return Capturing(self._computation, self.options, self._donate, state)
