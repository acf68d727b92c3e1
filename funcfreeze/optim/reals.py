"""Complex tensors as pairs of reals, which optimizers with second moments treat one by one, as torch.optim does."""

from __future__ import annotations

import torch
from torch import Tensor


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals; any other as it is.

    >>> as_real(torch.tensor([1 + 2j]))
    tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def add_(param: Tensor, update: Tensor) -> None:
    """Add an update to a parameter, so that -0.0 changes no bit of it, be it complex too.

    torch multiplies what it adds by 1, and the complex 1 makes 0.0 of -0.0.

    >>> param = torch.tensor([complex(-0.0, -0.0)])
    >>> add_(param, -torch.zeros_like(param))
    >>> as_real(param)
    tensor([[-0., -0.]])
    """
    if param.is_complex() and update.is_complex() and not (param.is_conj() or update.is_sparse):
        as_real(param).add_(as_real(update))
    else:
        param.add_(update)


def back_to(tensor: Tensor, param: Tensor) -> Tensor:
    """Back from pairs of reals, and to the parameter's dtype, which float64 scalars promote where it is 0-d.

    >>> back_to(torch.tensor([[1.0, 2.0]]), torch.tensor([0j]))
    tensor([1.+2.j])
    """
    return (torch.view_as_complex(tensor) if param.is_complex() else tensor).to(param.dtype)
