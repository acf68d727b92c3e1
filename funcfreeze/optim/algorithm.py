"""What torch.optim calls the optimizer that a transform is, and its options, to compare with one that runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from funcfreeze.optim.hyperparameters import rate_at

_HOW = frozenset({"params", "foreach", "fused", "capturable", "differentiable", "initial_lr", "max_lr", "min_lr"})
"""Options of a parameter group that say how it is computed, or that a scheduler has put there."""


@dataclass(frozen=True)
class Algorithm:
    """An optimizer of torch.optim and its options, as a transform has them for a parameter.

    Attributes:
        kinds: its classes.
        options: by torch.optim's names; `lr` may be a schedule.
        slots: what the transform keeps for a parameter; None for whatever the optimizer does.
        is_counted: whether one of these, `step`, is a count that torch.optim does not keep.
    """

    kinds: tuple[type[Optimizer], ...]
    options: Mapping[str, Any]
    slots: tuple[str, ...] | None
    is_counted: bool = False

    @property
    def name(self) -> str:
        """The first of its classes, for messages."""
        return self.kinds[0].__name__

    def rate(self, step: int) -> float:
        """The learning rate at this step."""
        return float(rate_at(self.name, self.options["lr"], step))

    def differences(self, group: Mapping[str, Any], step: int) -> Iterator[tuple[str, Any, Any]]:
        """The options that differ in a parameter group: name, ours, theirs. A schedule is compared at this step."""
        for option, own in self.options.items():
            value = self.rate(step) if option == "lr" else own
            if option not in _HOW and option in group and not _alike(value, group[option]):
                yield option, value, group[option]


Algorithms = Callable[[Collection[str]], Mapping[str, Algorithm]]
"""From the paths of parameters to the algorithms of those for which there is one."""


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    numbers = (int, float, Tensor)
    if isinstance(one, numbers) and isinstance(other, numbers):
        return math.isclose(float(one), float(other), rel_tol=1e-6)  # a rate may be a float32 tensor
    return bool(one == other)
