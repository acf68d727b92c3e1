"""Gradient clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from funcfreeze.optim.hyperparameters import check_number
from funcfreeze.optim.transform import OptState, PyTree, Transform, by_path, match


def clip_by_global_norm(max_norm: float) -> Transform:
    """Gradients scaled down so that their common norm is at most `max_norm`; the formula of `clip_grad_norm_`.

    Only touched parameters count. There is no state, and no in-place form: put it into a `chain`. Nothing waits for
    the device, and the norm of sparse gradients, of whichever layout, is that of their coalesced values.

    >>> tx = clip_by_global_norm(1.0)
    >>> params = [torch.zeros(1), torch.zeros(1), torch.zeros(1)]
    >>> tx.update([torch.tensor([3.0]), None, torch.tensor([4.0])], tx.init(params), params)
    ([tensor([0.6000]), None, tensor([0.8000])], ())
    >>> clip_by_global_norm(-1.0)
    Traceback (most recent call last):
        ...
    ValueError: clip_by_global_norm: max_norm must be at least 0, got -1.0
    """
    check_number("clip_by_global_norm", "max_norm", max_norm)

    def init(params: PyTree) -> OptState:
        return ()

    def update(
        grads: PyTree, state: OptState, params: PyTree, *, step: int | Tensor | None = None
    ) -> tuple[PyTree, OptState]:
        named = by_path(params)
        touched = match(grads, named)
        if not touched:
            return named.rebuild({}), state
        touched = {path: grad.coalesce() if grad.is_sparse else grad for path, grad in touched.items()}
        values = [grad if grad.layout is torch.strided else grad.values() for grad in touched.values()]
        norm = torch.nn.utils.get_total_norm(values)
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        return named.rebuild({path: _scaled(grad, factor) for path, grad in touched.items()}), state

    return Transform(init, update)


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    if grad.layout in _COMPRESSED:  # torch multiplies these by no tensor
        scaled = grad.clone()
        scaled.values().mul_(factor.to(grad.device))
        return scaled
    # `to` both ways: gradients may live on several devices, and a float64 factor would promote a 0-d gradient.
    return (grad * factor.to(grad.device)).to(grad.dtype)


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
