"""The cotangent a loss starts with."""

from __future__ import annotations

import torch
from torch import Tensor


def seed_of(loss: Tensor, seed: Tensor | None) -> Tensor:
    """One, or the seed in the loss's dtype and on its device, in a memory of its own: hooks may write to it."""
    return torch.ones_like(loss) if seed is None else seed.to(loss.device, loss.dtype, copy=True)
