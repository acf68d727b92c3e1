"""What torch.func puts around tensors, which has no public name."""

from __future__ import annotations

import torch
from torch import Tensor


def beneath(tensor: Tensor) -> Tensor:
    """The tensor under all the wrappers that transforms of torch.func have put around it, also when they are over."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
