"""An optimizer's state in another form: what means the same is cast, as when a run moves over from torch.optim.

torch keeps a count in the default dtype or as a number, on the CPU or on the device, and in old files as an integer; a
momentum buffer that has not begun may be None. The numbers are the same. Anything else is a state of something else.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

COUNT, MOMENTUM = "step", "momentum_buffer"
"""torch.optim's names for the number of updates a parameter has had, and for what SGD begins at the first gradient."""


def cast(kept: object, slot: str, shape: torch.Size, dtype: torch.dtype, device: torch.device | None) -> Tensor | None:
    """What was kept as a tensor of this shape and dtype and on this device, or None if it cannot mean that.

    A count may be any number. Other tensors may be in a narrower precision, which holds nothing that would be lost, and
    on another device.

    Args:
        kept: what the state has.
        slot: its name there.
        shape: what the optimizer keeps.
        dtype: in which precision.
        device: where; None if that is not known, then it stays where it is.

    >>> cast(3, "step", torch.Size([]), torch.float32, None)
    tensor(3.)
    >>> cast(torch.ones(2), "exp_avg", torch.Size([2]), torch.float64, None)
    tensor([1., 1.], dtype=torch.float64)
    >>> cast(torch.ones(2).double(), "exp_avg", torch.Size([2]), torch.float32, None) is None
    True
    """
    if kept is None and slot == MOMENTUM:
        return torch.zeros(shape, dtype=dtype, device=device)
    if isinstance(kept, Real) and not isinstance(kept, bool):
        return torch.full((), float(kept), dtype=dtype, device=device) if not shape else None
    if not isinstance(kept, Tensor) or kept.layout is not torch.strided:
        return None
    if slot == COUNT:
        is_number = kept.numel() == 1 and not kept.is_complex() and kept.dtype is not torch.bool
        return kept.detach().reshape(shape).to(device, dtype) if is_number and not shape else None
    holds_all = kept.shape == shape and torch.promote_types(kept.dtype, dtype) == dtype
    same_kind = kept.is_floating_point() or kept.is_complex() or kept.dtype == dtype
    return kept.detach().to(device, dtype) if holds_all and same_kind else None


def problem(kept: object, shape: torch.Size, dtype: torch.dtype) -> str:
    """Why it is not cast, for a message."""
    if not isinstance(kept, Tensor):
        return f"is {type(kept).__name__}: {kept!r}, expected a tensor of shape {tuple(shape)} and dtype {dtype}"
    seen = f"has shape {tuple(kept.shape)} and dtype {kept.dtype}, expected {tuple(shape)} and {dtype}"
    return f"{seen}; if digits may be lost, cast it yourself" if kept.shape == shape else seen
