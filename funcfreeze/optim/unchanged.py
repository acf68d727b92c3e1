"""Remembering what a transform found about its tensors at the last step, as long as they are the same.

A training loop hands a transform the same parameters and the same state at every step, overwritten in place. What was
checked then need not be checked again; that they are the same is asked in a few microseconds, for all of them together.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from funcfreeze.model.memory import memories_of


class Checked:
    """Tensors that were found to fit: which they are, where their memory is and how it is laid out.

    `.data = ...` and `t_()` exchange that under the same object. Nothing is kept alive: the first that goes ends
    it, since another may come to be where that was. Layouts are compared as `torch.compile` guards them, in one call:
    class, shape, strides, dtype and device. It is private to torch, and the same in 2.11 to 2.15.
    """

    def __init__(self, params: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        tensors = [*params, *kept]
        self._gone: list[object] = []
        self._references = [weakref.ref(tensor, self._gone.append) for tensor in tensors]
        self._identities = list(map(id, tensors))
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._memories = frozenset(memories_of(params))
        self._layouts = TensorGuards(*tensors, *grads, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def holds(self, params: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, with gradients of the same form and in a memory of their own."""
        tensors = [*params, *kept]
        memories = memories_of(grads)
        return (
            not self._gone
            and list(map(id, tensors)) == self._identities
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and None not in memories  # a sparse one has no strides to ask for
            and self._memories.isdisjoint(memories)
            and self._layouts.check(*tensors, *grads)
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
