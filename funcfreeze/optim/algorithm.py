"""What torch.optim calls the optimizer that a transform is, and its options, to compare with one that runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from funcfreeze.optim.hyperparameters import LearningRate, rate_at

_HOW = frozenset({"params", "foreach", "fused", "capturable", "differentiable", "initial_lr", "max_lr", "min_lr"})
"""Options of a parameter group that say how it is computed, or that a scheduler has put there."""


SCHEDULED = ("lr", "weight_decay")
"""Options that may be schedules."""


@dataclass(frozen=True)
class Algorithm:
    """An optimizer of torch.optim and its options, as a transform has them for a parameter.

    Attributes:
        kinds: its classes.
        options: by torch.optim's names; `lr` and `weight_decay` may be schedules.
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

    def at(self, lr: LearningRate, weight_decay: LearningRate) -> Algorithm:
        """The same with this learning rate and weight decay."""
        return replace(self, options={"lr": lr, **self.options, "weight_decay": weight_decay})

    def is_scheduled(self, option: str) -> bool:
        """Whether an option changes from step to step."""
        return option in SCHEDULED and callable(self.options.get(option))

    def value(self, option: str, step: int) -> Any:
        """An option, as it is at this step."""
        given = self.options[option]
        return float(rate_at(self.name, option, given, step)) if self.is_scheduled(option) else given

    def differences(self, group: Mapping[str, Any], step: int) -> Iterator[tuple[str, Any, Any]]:
        """The options that differ in a parameter group: name, ours, theirs. A schedule is compared at this step."""
        for option in self.options:
            value = self.value(option, step)
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
