"""Remembering what a transform found about its tensors at the last step, as long as they are the same.

A training loop hands a transform the same parameters and the same state at every step, overwritten in place. What was
checked then need not be checked again; that they are the same is asked in a few microseconds, for all of them together.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from funcfreeze.model.memory import memory_of

Form = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""Shape, strides, dtype and device."""


def form_of(tensor: Tensor) -> Form:
    """What a kernel takes for granted."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@dataclass(frozen=True, eq=False)
class Checked:
    """Tensors that were found to fit, by weak reference, and the addresses of their memory.

    `.data = ...` exchanges the memory under the same object.
    """

    references: list[weakref.ref[Tensor]]
    addresses: list[int]
    memories: frozenset[int | None]
    gradients: list[Form]

    @staticmethod
    def of(params: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor]) -> Checked:
        """What was found to fit: parameters, what is kept for them, and gradients of this form."""
        tensors = [*params, *kept]
        return Checked(
            [weakref.ref(tensor) for tensor in tensors],
            [tensor.data_ptr() for tensor in tensors],
            frozenset(map(memory_of, params)),
            [form_of(grad) for grad in grads],
        )

    def holds(self, params: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, with gradients of the same form and in a memory of their own."""
        tensors = [*params, *kept]
        memories = [memory_of(grad) for grad in grads]
        return (
            len(tensors) == len(self.references)
            and all(map(is_, tensors, [reference() for reference in self.references]))
            and [tensor.data_ptr() for tensor in tensors] == self.addresses
            and None not in memories  # a sparse one has no strides to ask for
            and [form_of(grad) for grad in grads] == self.gradients
            and self.memories.isdisjoint(memories)
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
        self._by_paths[paths] = Checked.of(params, kept, grads)
