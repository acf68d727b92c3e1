"""Weight decay that is added to the gradient, as torch.optim does it in all but AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from funcfreeze.optim.hyperparameters import Rate


def decayed(param: Tensor, grad: Tensor, weight_decay: Rate, maximize: bool) -> Tensor:
    """Where to go down: the gradient, or against it if `maximize`, plus the decay.

    >>> decayed(torch.ones(2), torch.tensor([1.0, 2.0]), 0.5, maximize=True)
    tensor([-0.5000, -1.5000])
    """
    descent = -grad if maximize else grad
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return descent
    return (descent + weight_decay * param).to(descent.dtype)  # a float64 0-d decay would promote a 0-d parameter


def with_decay(grads: list[Tensor], params: list[Tensor], weight_decay: Tensor, maximize: bool) -> list[Tensor]:
    """The gradients for a kernel that negates them first if `maximize`, with a decay that it cannot be given: a tensor.

    >>> with_decay([torch.ones(2)], [torch.ones(2)], torch.tensor(0.5), maximize=True)
    [tensor([0.5000, 0.5000])]
    """
    decays = times(params, weight_decay)
    return [*(torch._foreach_sub(grads, decays) if maximize else torch._foreach_add(grads, decays))]


def times(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Tensors of one dtype times a number in a tensor, which is not asked for: that would wait for the device."""
    # In one dtype torch takes the list at once; half precision has too few digits for a rate.
    is_half = tensors[0].dtype in (torch.bfloat16, torch.float16)
    return [*torch._foreach_mul(tensors, factor if is_half else factor.to(tensors[0].dtype))]
