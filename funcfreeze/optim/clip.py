"""Gradient clipping, by torch's formula: what has a norm above the largest allowed is scaled down to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from funcfreeze.optim.hyperparameters import check_number
from funcfreeze.optim.transform import Note, OptState, PyTree, Transform, by_path, match


def clip_by_global_norm(max_norm: float) -> Transform:
    """Gradients scaled down so that their common norm is at most `max_norm`; the formula of `clip_grad_norm_`.

    Only touched parameters count. There is no state, and no in-place form: put it into a `chain`. Nothing waits for
    the device, and the norm of sparse gradients, of whichever layout, is that of their coalesced values. A `Step`
    returns the norm before clipping as the metric `ff/grad_norm`: in a `chain` with several of these the first one's,
    in a `partition` one for each part, `ff/grad_norm/<its selector>`; none where nothing was touched.

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
    return _by_global_norm(max_norm, lambda name, value: None)


def _by_global_norm(max_norm: float, note: Note) -> Transform:
    def update(
        grads: PyTree, state: OptState, params: PyTree, *, step: int | Tensor | None = None
    ) -> tuple[PyTree, OptState]:
        named = by_path(params)
        touched = _coalesced(match(grads, named))
        if not touched:
            return named.rebuild({}), state
        norm = torch.nn.utils.get_total_norm(list(map(_values, touched.values())))
        note("grad_norm", norm)
        factor = _factor(max_norm, norm)
        return named.rebuild({path: _scaled(grad, factor) for path, grad in touched.items()}), state

    return Transform(lambda params: (), update, measuring=lambda note: _by_global_norm(max_norm, note))


def clip_by_norm(max_norm: float) -> Transform:
    """The gradient of each parameter scaled down so that its own norm is at most `max_norm`.

    The same as `clip_grad_norm_` called for each parameter alone. There is no state, and no in-place form: put it into
    a `chain`. Nothing waits for the device. Sparse gradients, of whichever layout, are coalesced.

    >>> tx = clip_by_norm(1.0)
    >>> params = [torch.zeros(2), torch.zeros(1), torch.zeros(1)]
    >>> tx.update([torch.tensor([3.0, 4.0]), None, torch.tensor([0.5])], tx.init(params), params)
    ([tensor([0.6000, 0.8000]), None, tensor([0.5000])], ())
    >>> clip_by_norm(-1.0)
    Traceback (most recent call last):
        ...
    ValueError: clip_by_norm: max_norm must be at least 0, got -1.0
    """
    check_number("clip_by_norm", "max_norm", max_norm)

    def update(
        grads: PyTree, state: OptState, params: PyTree, *, step: int | Tensor | None = None
    ) -> tuple[PyTree, OptState]:
        named = by_path(params)
        touched = _coalesced(match(grads, named))
        norms = torch._foreach_norm(list(map(_values, touched.values()))) if touched else ()
        factors = {path: _factor(max_norm, norm) for path, norm in zip(touched, norms, strict=True)}
        return named.rebuild({path: _scaled(grad, factors[path]) for path, grad in touched.items()}), state

    return Transform(lambda params: (), update)


def _coalesced(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: grad.coalesce() if grad.is_sparse else grad for path, grad in grads.items()}


def _values(grad: Tensor) -> Tensor:
    return grad if grad.layout is torch.strided else grad.values()


def _factor(max_norm: float, norm: Tensor) -> Tensor:
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    if grad.layout in _COMPRESSED:  # torch multiplies these by no tensor
        scaled = grad.clone()
        scaled.values().mul_(factor.to(grad.device))
        return scaled
    # `to` both ways: gradients may live on several devices, and a float64 factor would promote a 0-d gradient.
    return (grad * factor.to(grad.device)).to(grad.dtype)


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
