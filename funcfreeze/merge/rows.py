"""The losses' gradients over an overlap, as the rows of a matrix that is not put together unless somebody asks for it.

Inner products of large gradients are taken one by one, where they are; small ones are packed, since for these every
call costs more than its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PACKED = 2**14
"""Gradients of fewer elements than this are packed."""


def diagonal(matrix: Tensor) -> Tensor:
    """The diagonal. Inductor's own way to it warns about what torch is to give up."""
    return torch.where(torch.eye(len(matrix), dtype=torch.bool, device=matrix.device), matrix, 0.0).sum(0)


_HALVES = (torch.float16, torch.bfloat16)

EXACT = torch.finfo(torch.float64).eps
"""How exact float64 is."""

_SINGLE = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Rows:
    """Gradients of K losses at the same leaves.

    Attributes:
        gradients: for each loss, for each leaf its gradient, or None where there is none. Strided, and of every leaf of
            one shape, dtype and device.
        unit: what they have all been multiplied with, 0-d: what rules see is free of it, what they make has it again.
    """

    gradients: Sequence[Sequence[Tensor | None]]
    unit: Tensor | None = None

    @cached_property
    def _some(self) -> list[Tensor | None]:
        """For each leaf one of its gradients."""
        columns = zip(*self.gradients, strict=True)
        return [next((gradient for gradient in column if gradient is not None), None) for column in columns]

    @cached_property
    def touched(self) -> list[int]:
        """The leaves that have a gradient."""
        return [leaf for leaf, some in enumerate(self._some) if some is not None]

    @property
    def device(self) -> torch.device:
        """Where rules compute: where the first gradient is."""
        return next(some.device for some in self._some if some is not None)

    @cached_property
    def _small(self) -> list[int]:
        return [leaf for leaf, some in enumerate(self._some) if some is not None and some.numel() < PACKED]

    @cached_property
    def _packed(self) -> Tensor | None:
        """The small gradients, (K, elements) float64."""
        if not self._small:
            return None
        return torch.stack([torch.cat(self._flat(row, self._small, torch.float64)) for row in self.gradients])

    def _flat(self, row: Sequence[Tensor | None], leaves: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Some of a row's gradients, flat, with zeros where there is none."""
        flat = []
        for leaf in leaves:
            some, gradient = self._some[leaf], row[leaf]
            assert some is not None
            flat.append(_flattened(torch.zeros_like(some) if gradient is None else gradient).to(self.device, dtype))
        return flat

    @cached_property
    def gramian(self) -> Tensor:
        """The inner products of all pairs of rows, (K, K) float64."""
        number = len(self.gradients)
        small = set(self._small)
        large = [leaf for leaf in self.touched if leaf not in small]
        products = [
            [
                _product(one[leaf], other[leaf], self.device)
                for leaf in large
                if one[leaf] is not None and other[leaf] is not None
            ]
            for index, one in enumerate(self.gradients)
            for other in self.gradients[: index + 1]
        ]
        nothing = torch.zeros((), dtype=torch.float64, device=self.device)
        entries = [torch.stack(found).sum() if found else nothing for found in products]
        whole = [[entries[_triangle(row, column)] for column in range(number)] for row in range(number)]
        total = torch.stack([torch.stack(row) for row in whole])
        if self._packed is not None:
            total = total + self._packed @ self._packed.T
        return total if self.unit is None else total / self.unit.to(self.device, torch.float64).square()

    @cached_property
    def precision(self) -> float:
        """How exact the inner products are, relative to the largest.

        Gradients that are rounded make independent rows of dependent ones: these are as long as the rounding, and their
        inner products as its square. Those of large gradients are rounded themselves, to at least float32.
        """
        found = [EXACT]
        for leaf in self.touched:
            some = self._some[leaf]
            assert some is not None
            rounding = torch.finfo(some.dtype).eps
            found.append(rounding**2 if leaf in self._small else max(min(rounding, _SINGLE), rounding**2))
        return max(found)

    @cached_property
    def dtype(self) -> torch.dtype:
        """In which rules see the matrix: the narrowest that holds all gradients, at least float32."""
        dtype = torch.float32
        for some in self._some:
            if some is not None:
                dtype = torch.promote_types(dtype, some.real.dtype if some.is_complex() else some.dtype)
        return dtype

    @property
    def width(self) -> int:
        """How many columns the matrix has."""
        return sum(some.numel() * (2 if some.is_complex() else 1) for some in self._some if some is not None)

    def stacked(self) -> Tensor:
        """The gradients one below the other: the matrix, in a memory of its own."""
        found = torch.stack([torch.cat(self._flat(row, self.touched, self.dtype)) for row in self.gradients])
        return found if self.unit is None else found / self.unit.to(self.device, self.dtype)

    def weighted(self, weights: Tensor) -> list[Tensor | None]:
        """For each leaf the sum of its gradients with these weights; None where there is none.

        Args:
            weights: (K,).
        """
        small = set(self._small)
        merged: list[Tensor | None] = [
            None if leaf in small else _weighted(column, weights)
            for leaf, column in enumerate(zip(*self.gradients, strict=True))
        ]
        if self._packed is not None:
            for leaf, sums in self._parted(weights.to(self._packed.dtype) @ self._packed, self._small):
                merged[leaf] = sums
        return merged

    def parted(self, vector: Tensor) -> list[Tensor | None]:
        """A merged gradient as wide as the matrix, for each leaf; None where no loss has a gradient."""
        found: list[Tensor | None] = [None] * len(self._some)
        whole = vector if self.unit is None else vector * self.unit.to(vector.device, vector.dtype)
        for leaf, gradient in self._parted(whole, self.touched):
            found[leaf] = gradient
        return found

    def _parted(self, vector: Tensor, leaves: Sequence[int]) -> list[tuple[int, Tensor]]:
        pairs = [(leaf, self._some[leaf]) for leaf in leaves]
        like = [(leaf, some) for leaf, some in pairs if some is not None]
        parts = torch.split(vector, [some.numel() * (2 if some.is_complex() else 1) for _, some in like])
        return [(leaf, _shaped(part, some)) for (leaf, some), part in zip(like, parts, strict=True)]


def _triangle(row: int, column: int) -> int:
    """The place of an entry of a symmetric matrix among those of its lower triangle."""
    low, high = min(row, column), max(row, column)
    return high * (high + 1) // 2 + low


def _flattened(gradient: Tensor) -> Tensor:
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient).reshape(-1)


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    """A part of a vector, as the gradient that it stands for."""
    if like.is_complex():
        real = part.to(like.device, like.real.dtype).reshape(*like.shape, 2)
        return torch.view_as_complex(real.contiguous())
    return part.to(like.device, like.dtype).reshape(like.shape)


def _product(one: Tensor | None, other: Tensor | None, device: torch.device) -> Tensor:
    """The real inner product, 0-d float64."""
    assert one is not None
    assert other is not None
    wide = [_flattened(x) if x.dtype not in _HALVES else _flattened(x).float() for x in (one, other)]
    return torch.dot(*wide).to(device, torch.float64)


def _weighted(column: Sequence[Tensor | None], weights: Tensor) -> Tensor | None:
    total: Tensor | None = None
    for row, gradient in enumerate(column):
        if gradient is not None:
            real = gradient.real.dtype if gradient.is_complex() else gradient.dtype
            weight = weights[row].to(gradient.device, real)
            total = gradient * weight if total is None else total.addcmul_(gradient, weight.to(gradient.dtype))
    return total
