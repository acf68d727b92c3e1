"""What is no function and no optimizer, told when a step is built."""

from __future__ import annotations

from funcfreeze.optim import Transform


def check_arguments(losses: object, optimizer: object) -> None:
    """Refuse arguments of another kind.

    Raises:
        TypeError: what it is, and what was wanted.
    """
    if not callable(losses):
        raise TypeError(f"losses is a function losses(model, batch), got {type(losses).__name__}")
    if not isinstance(optimizer, Transform):
        raise TypeError(
            f"optimizer is a Transform such as funcfreeze.optim.adamw(1e-3) (called), got "
            f"{type(optimizer).__name__}; a torch optimizer class goes through funcfreeze.optim.from_torch, as in "
            "from_torch(torch.optim.RMSprop, lr=1e-3)"
        )
