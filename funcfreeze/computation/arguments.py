"""What a step is made of, checked by type: the mistakes that would only show in its first call."""

from __future__ import annotations

from funcfreeze.computation.loss_scale import LossScale
from funcfreeze.optim import Transform


def check_arguments(losses: object, optimizer: object, loss_scale: object) -> None:
    """Refuse what is of another type.

    Raises:
        TypeError: telling what was given and what is wanted.
    """
    if not callable(losses):
        raise TypeError(f"losses is a function losses(model, batch), got {type(losses).__name__}")
    if not isinstance(optimizer, Transform):
        raise TypeError(
            f"optimizer is a Transform such as funcfreeze.optim.adamw(1e-3) (called), got "
            f"{type(optimizer).__name__}; a torch optimizer class goes through funcfreeze.optim.from_torch, as in "
            "from_torch(torch.optim.RMSprop, lr=1e-3)"
        )
    if loss_scale is not None and not isinstance(loss_scale, LossScale):
        raise TypeError(
            f"loss_scale is a funcfreeze.LossScale, or None; got {type(loss_scale).__name__}: {loss_scale!r}"
        )
