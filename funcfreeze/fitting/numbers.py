"""Metrics as plain numbers: the one place where a loop waits for the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The scalars among metrics, those of members and parts as `critic.q`.

    >>> numbers_in({"critic": {"q": torch.tensor(0.5)}, "ff/norm": torch.ones(2), "rate": 0.1, "note": "x"})
    {'critic.q': 0.5, 'rate': 0.1}
    """
    found = dict(_scalars(metrics, ""))
    tensors = [value for value in found.values() if isinstance(value, Tensor)]
    fetched = iter(_fetched(tensors))
    return {name: next(fetched) if isinstance(value, Tensor) else float(value) for name, value in found.items()}


def _fetched(tensors: list[Tensor]) -> list[float]:
    """Of one device and dtype all at once: one wait."""
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) != 1:
        return [float(tensor) for tensor in tensors]
    return [float(value) for value in torch.stack(tensors).tolist()]


def _scalars(metrics: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{before}{name}.")
        elif isinstance(value, Tensor):
            if value.numel() == 1 and not value.is_complex():
                yield f"{before}{name}", value.detach().reshape(())
        elif isinstance(value, Real):
            yield f"{before}{name}", float(value)
