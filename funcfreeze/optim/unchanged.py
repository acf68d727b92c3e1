"""Remembering what a transform found about its tensors at the last step, as long as they are the same.

A training loop hands a transform the same parameters and the same state at every step, overwritten in place. What was
checked then need not be checked again; that they are the same is asked in a few microseconds, for all of them together.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from funcfreeze.model.memory import memory_of

_DTYPE = attrgetter("dtype")
_FORM = attrgetter("shape", "dtype", "device", "layout")


class Checked:
    """Tensors that were found to fit: which they are, where their memory is and how it is laid out.

    `.data = ...` and `t_()` exchange that under the same object. Nothing is kept alive: the first that goes ends
    it, since another may come to be where that was.
    """

    def __init__(self, params: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        tensors = [*params, *kept]
        self._gone: list[object] = []
        self._references = [weakref.ref(tensor, self._gone.append) for tensor in tensors]
        self._identities = list(map(id, tensors))
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._layouts = self._laid_out(tensors)
        self._memories = frozenset(map(memory_of, params))
        self._gradients = self._forms(grads)

    @staticmethod
    def _forms(grads: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
        return list(map(_FORM, grads)), list(map(Tensor.stride, grads))

    @staticmethod
    def _laid_out(tensors: Sequence[Tensor]) -> tuple[list[Any], list[Any], list[Any]]:
        return list(map(Tensor.stride, tensors)), list(map(Tensor.size, tensors)), list(map(_DTYPE, tensors))

    def holds(self, params: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, with gradients of the same form and in a memory of their own."""
        tensors = [*params, *kept]
        memories = [memory_of(grad) for grad in grads]
        return (
            not self._gone
            and list(map(id, tensors)) == self._identities
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and self._laid_out(tensors) == self._layouts
            and None not in memories  # a sparse one has no strides to ask for
            and self._memories.isdisjoint(memories)
            and self._forms(grads) == self._gradients
        )


class Checks:
    """What was checked last for each set of parameters that had gradients: a few sets, as losses come and go."""

    def __init__(self) -> None:
        self._by_paths: dict[tuple[str, ...], Checked] = {}

    def hold(
        self, paths: tuple[str, ...], params: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> bool:
        """Whether all this was checked already."""
        known = self._by_paths.get(paths)
        return known is not None and known.holds(params, kept, grads)

    def note(
        self, paths: tuple[str, ...], params: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> None:
        """Note that all this was found to fit."""
        while len(self._by_paths) >= 8:
            self._by_paths.pop(next(iter(self._by_paths)), None)
        self._by_paths[paths] = Checked(params, kept, grads)
