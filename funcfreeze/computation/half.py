"""The first half of a step as a value: what one forward and its backward gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from funcfreeze.merge.deciding import Met


@dataclass(frozen=True, eq=False, repr=False)
class Half:
    """What one forward and its backward gave, on the way from `step.compute` to `step.apply_gradients`.

    It holds no memory of the state that it was computed from: it may be applied to that one, to another, more than
    once, or never.

    Attributes:
        gradients: path -> merged gradient, touched parameters only; free of a loss scale.
        losses: every present loss by name, detached, 0-d and unweighted.
        metrics: what `losses` returned beside them, detached.
        buffers: path -> every buffer as the forward left it.
        written: path -> the new value of every parameter that no loss may update and that the forward wrote to.
        per_loss: loss -> path -> its own gradient, with its weights; their sums are `gradients`, but where a merge rule
            decides. Only if asked for.
        met: label of an entry of `merge` -> what was seen where losses met there, and what its rule keeps from then on.

    >>> import torch
    >>> half = Half({"w": torch.ones(2)}, {"fit": torch.tensor(1.0)}, {}, {}, {})
    >>> half
    Half(fit; 1 gradients)
    >>> half.replace(gradients={path: -gradient for path, gradient in half.gradients.items()}).gradients
    {'w': tensor([-1., -1.])}
    >>> half.replace(grads={})
    Traceback (most recent call last):
        ...
    TypeError: a Half has gradients, losses, metrics, buffers, written, per_loss, met; got grads
    """

    gradients: Mapping[str, Tensor]
    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Any]
    buffers: Mapping[str, Tensor]
    written: Mapping[str, Tensor]
    per_loss: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    met: Mapping[str, Met] = field(default_factory=dict)

    def replace(self, **changes: Any) -> Half:
        """The same with some fields exchanged; the others are shared. `apply_gradients` checks what it is given."""
        unknown = [name for name in changes if name not in self.fields]
        if unknown:
            raise TypeError(f"a Half has {', '.join(self.fields)}; got {', '.join(unknown)}")
        return replace(self, **changes)

    @property
    def fields(self) -> dict[str, Any]:
        """All of it by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __repr__(self) -> str:
        return f"Half({', '.join(self.losses)}; {len(self.gradients)} gradients)"
