"""Looking a step up in a table of numbers, on the step's own device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Lookup:
    """The number for each step, the last one for all that come after.

    The table is copied to a device when it is first asked for there, and stays.

    >>> Lookup([0.1, 0.2, 0.4])(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    tensor([0.1000, 0.2000, 0.4000, 0.4000], dtype=torch.float64)
    """

    def __init__(self, values: Sequence[float]) -> None:
        self._values = torch.tensor(values, dtype=torch.float64, device="cpu")
        self._placed = {self._values.device: self._values}

    def __call__(self, step: Tensor) -> Tensor:
        index = step.long().clamp(0, len(self._values) - 1)
        # Not in brackets: an index of no dimensions is asked for its value there.
        return self._on(step.device).index_select(0, index.reshape(-1)).reshape(step.shape)

    def _on(self, device: torch.device) -> Tensor:
        placed = self._placed.get(device)
        if placed is None:
            # It is never written to, so nothing has to wait until it is there.
            placed = self._values.to(device, non_blocking=True)
            if _outlives(placed):
                self._placed[device] = placed
        return placed


def _outlives(tensor: Tensor) -> bool:
    """Whether it is a tensor of its own, and not part of a trace or a transform that is under way."""
    traced = torch.compiler.is_dynamo_compiling() or type(tensor) is not Tensor
    return not traced and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
