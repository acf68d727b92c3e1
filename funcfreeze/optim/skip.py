"""A step that is skipped without asking the device: whether anything is not finite, and values chosen by the answer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.optim.transform import OptState


def find_non_finite(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """1.0 if an element of any gradient is infinite or NaN, else 0.0: a 0-d float32 tensor on the device.

    Nothing waits for the device. The numbers are those that torch's fused optimizers take as `found_inf`.

    >>> find_non_finite([torch.ones(2), torch.tensor([1.0, float("nan")])], torch.device("cpu"))
    tensor(1.)
    >>> find_non_finite([], torch.device("cpu"))
    tensor(0.)
    """
    values = [_real_values(gradient) for gradient in gradients]
    filled = [value for value in values if value.numel()]  # nothing has no largest element
    if not filled:
        return torch.zeros((), dtype=torch.float32, device=device)
    largest = torch.nn.utils.get_total_norm(filled, math.inf)
    return (~largest.isfinite()).to(device, torch.float32)


def _real_values(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        # Half precision may overflow where coalescing adds up, which GradScaler looks at too.
        gradient = (gradient.coalesce() if gradient.dtype == torch.float16 else gradient)._values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def unless(found_inf: Tensor, update: Tensor) -> Tensor:
    """The update, or one that changes no bit of what it is added to: -0.0, since 0.0 would make 0.0 of -0.0.

    >>> unless(torch.tensor(1.0), torch.tensor([3.0, float("nan")]))
    tensor([-0., -0.])
    """
    if update.is_sparse:
        return torch.sparse_coo_tensor(
            update._indices(),
            unless(found_inf, update._values()),
            update.shape,
            is_coalesced=update.is_coalesced(),
            check_invariants=False,
        )
    return torch.where(found_inf.to(update.device) > 0, -torch.zeros_like(update), update)


def keep_if(found_inf: Tensor, old: OptState, new: OptState) -> OptState:
    """The old state if anything was found, else the new one, leaf by leaf; what is the same object stays it.

    Where they differ in more than tensors (what `from_torch` keeps may, at the first gradient), the host has to know
    which of them it is: that waits for the device.

    >>> keep_if(torch.tensor(0.0), {"step": torch.tensor(1.0)}, {"step": torch.tensor(2.0)})
    {'step': tensor(2.)}
    """
    before, structure = optree.tree_flatten(old)
    after, other = optree.tree_flatten(new)
    if structure != other or any(map(_differ_as_numbers, before, after)):
        return old if found_inf > 0 else new
    return optree.tree_unflatten(structure, [_chosen(found_inf, *pair) for pair in zip(before, after, strict=True)])


def _differ_as_numbers(before: Any, after: Any) -> bool:
    return not (isinstance(before, Tensor) and isinstance(after, Tensor)) and before is not after and before != after


def _chosen(found_inf: Tensor, before: Any, after: Any) -> Any:
    if before is after or not isinstance(after, Tensor):
        return after
    return torch.where(found_inf.to(after.device) > 0, before, after)
