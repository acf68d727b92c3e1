"""Random numbers that are a function of a seed and the count of steps, and so part of every state.

Counts are hashed (the two-round 32-bit mixer with the multipliers 0x21f0aaad and 0x735a2d97, of Chris Wellons' search
for low bias), so that a step that is computed twice draws the same, on any device, eager or compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def draws(seed: int, step: Tensor, number: int, device: torch.device, first: int = 0) -> Tensor:
    """Uniform numbers in [0, 1): (number,) float64, of 24 bits, so that none becomes 1 in float32.

    Args:
        seed: whose numbers.
        step: the count of steps, 0-d.
        number: how many.
        device: where.
        first: the place of the first among all that are drawn at this step.

    >>> draws(0, torch.tensor(7), 2, torch.device("cpu")).dtype
    torch.float64
    """
    key = _mixed(step.to(device, torch.int64) + (seed * 0x9E3779B1 & _MASK))
    other = _mixed(key ^ 0x5BD1E995)
    counted = torch.arange(first, first + number, dtype=torch.int64, device=device)
    return (_mixed(_mixed(counted + key) ^ other) >> 8).to(torch.float64) / 2**24


def _mixed(x: Tensor) -> Tensor:
    x = x & _MASK
    x ^= x >> 16
    x = x.mul_(0x21F0AAAD).bitwise_and_(_MASK)
    x ^= x >> 15
    x = x.mul_(0x735A2D97).bitwise_and_(_MASK)
    x ^= x >> 15
    return x
