"""The losses' gradients over an overlap, as the rows of a matrix that is not put together unless somebody asks for it.

Inner products of large gradients are taken one by one, where they are; small ones are packed, since for these every
call costs more than its arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from funcfreeze.tracing import is_stand_in

PACKED = 2**14
"""Gradients of fewer elements than this are packed."""

PIECE = 2**15
"""The columns of a piece of the matrix: with its K rows and what is computed of them, it stays in the cache."""


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

    @cached_property
    def device(self) -> torch.device:
        """Where rules compute: where the first gradient is."""
        return next(some.device for some in self._some if some is not None)

    @cached_property
    def _small(self) -> list[int]:
        return [leaf for leaf, some in enumerate(self._some) if some is not None and some.numel() < PACKED]

    @cached_property
    def _packed(self) -> Tensor | None:
        """The small gradients, (K, elements)."""
        return self._put_together(self._small) if self._small else None

    def _put_together(self, leaves: Sequence[int]) -> Tensor:
        """Some leaves' gradients, flat, with zeros where there is none: (K, elements)."""
        some = [like for leaf in leaves if (like := self._some[leaf]) is not None]
        flat = [
            _flattened(torch.zeros_like(like) if (gradient := row[leaf]) is None else gradient)
            for row in self.gradients
            for leaf, like in zip(leaves, some, strict=True)
        ]
        if _kind(some) is None:
            flat = [part.to(self.device, self.dtype) for part in flat]
        return torch.cat(flat).view(len(self.gradients), -1)

    @cached_property
    def gramian(self) -> Tensor:
        """The inner products of all pairs of rows, (K, K) float64."""
        small = set(self._small)
        large = [leaf for leaf in self.touched if leaf not in small]
        total = self._products(large) if large else None
        if self._packed is not None:
            wide = self._packed.double()
            total = wide @ wide.T if total is None else total + wide @ wide.T
        assert total is not None, "no loss has a gradient"
        return total if self.unit is None else total / self.unit.to(self.device, torch.float64).square()

    def _products(self, leaves: Sequence[int]) -> Tensor:
        """The inner products of all pairs of rows over these leaves, each taken where the gradients are."""
        number = len(self.gradients)
        flat = [
            [None if (gradient := row[leaf]) is None else _wide(gradient) for leaf in leaves] for row in self.gradients
        ]
        pairs = [(one, other) for index, one in enumerate(flat) for other in flat[: index + 1]]
        products = [_product(g, h) for pair in pairs for g, h in zip(*pair, strict=True)]
        if len({(product.dtype, product.device) for product in products if product is not None}) > 1:
            products = [None if product is None else product.to(self.device, torch.float64) for product in products]
        nothing = next(torch.zeros_like(product) for product in products if product is not None)
        found = torch.stack([nothing if product is None else product for product in products])
        sums = found.view(len(pairs), -1).to(self.device, torch.float64).sum(1).unbind()
        whole = [sums[_triangle(row, column)] for row in range(number) for column in range(number)]
        return torch.stack(whole).view(number, number)

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
        return self._columns(self.touched)

    def stacked(self) -> Tensor:
        """The gradients one below the other: the matrix, in a memory of its own."""
        return self._without_unit(self._put_together(self.touched))

    def pieces(self) -> Iterator[Tensor]:
        """The matrix in pieces, side by side, for what is done column by column; for a compiler, in one.

        Matrices as long as all parameters, one after the other, take longer to allocate than to compute with.
        """
        if is_stand_in(next(some for some in self._some if some is not None)):
            yield self.stacked()
            return
        together: list[int] = []
        for leaf in self.touched:
            if together and self._columns([*together, leaf]) > PIECE:
                yield from self._cut(together)
                together = []
            together.append(leaf)
        yield from self._cut(together)

    def _cut(self, leaves: Sequence[int]) -> Iterator[Tensor]:
        """The columns of some leaves, no more than `PIECE` at a time."""
        if len(leaves) > 1 or self._columns(leaves) <= PIECE:
            yield self._without_unit(self._put_together(leaves))
            return
        (leaf,) = leaves
        flat = [None if (gradient := row[leaf]) is None else _flattened(gradient) for row in self.gradients]
        some = next(part for part in flat if part is not None)
        nothing = torch.zeros((), dtype=some.dtype, device=some.device)
        for start in range(0, len(some), PIECE):
            like = some[start : start + PIECE]
            parts = [nothing.expand_as(like) if row is None else row[start : start + PIECE] for row in flat]
            yield self._without_unit(torch.stack(parts))

    def _columns(self, leaves: Sequence[int]) -> int:
        return sum(_width(like) for leaf in leaves if (like := self._some[leaf]) is not None)

    def _without_unit(self, matrix: Tensor) -> Tensor:
        found = matrix.to(self.device, self.dtype)
        return found if self.unit is None else found / self.unit.to(self.device, self.dtype)

    def weighted(self, weights: Tensor) -> list[Tensor | None]:
        """For each leaf the sum of its gradients with these weights; None where there is none.

        Args:
            weights: (K,).
        """
        small = set(self._small)
        merged: list[Tensor | None] = [None] * len(self._some)
        cast: dict[tuple[torch.dtype, torch.device], Sequence[Tensor]] = {}
        for leaf, some in enumerate(self._some):
            if some is not None and leaf not in small:
                kind = some.dtype, some.device
                if kind not in cast:
                    cast[kind] = weights.to(some.device, some.real.dtype if some.is_complex() else some.dtype).unbind()
                merged[leaf] = _weighted([row[leaf] for row in self.gradients], cast[kind])
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
        some = [like for leaf in leaves if (like := self._some[leaf]) is not None]
        kind = _kind(some)
        parts = torch.split(
            vector if kind is None else vector.to(kind[1], kind[0]),
            [*map(_width, some)],
        )
        shaped = (_shaped(part, like) for part, like in zip(parts, some, strict=True))
        return [*zip(leaves, shaped, strict=True)]


def _kind(some: Sequence[Tensor]) -> tuple[torch.dtype, torch.device] | None:
    """The dtype and device of real tensors, if they all have the same."""
    kinds = {(like.dtype, like.device) for like in some}
    kind = kinds.pop()
    return None if kinds or kind[0].is_complex else kind


def _width(like: Tensor) -> int:
    """How many real numbers it has."""
    return like.numel() * (2 if like.is_complex() else 1)


def _triangle(row: int, column: int) -> int:
    """The place of an entry of a symmetric matrix among those of its lower triangle."""
    low, high = min(row, column), max(row, column)
    return high * (high + 1) // 2 + low


def _flattened(gradient: Tensor) -> Tensor:
    return (torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient).reshape(-1)


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    """A part of a vector, as the gradient that it stands for."""
    if like.is_complex():
        real = part.to(like.device, like.real.dtype).reshape(*like.shape, 2)
        return torch.view_as_complex(real.clone())  # of its own: a complex number cannot begin everywhere
    return part.to(like.device, like.dtype).view(like.shape)


def _wide(gradient: Tensor) -> Tensor:
    """Flat, in a dtype in which products may be added up."""
    flat = _flattened(gradient)
    return flat.float() if flat.dtype in _HALVES else flat


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.dot(one, other)


def _weighted(column: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    total: Tensor | None = None
    for gradient, weight in zip(column, weights, strict=True):
        if gradient is not None:
            total = gradient * weight if total is None else total.addcmul_(gradient, weight.to(gradient.dtype))
    return total
