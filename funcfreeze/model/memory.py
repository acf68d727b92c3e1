"""Which memory a tensor is in, so that two that share it are known."""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter

from torch import Tensor

_IDENTITY = attrgetter("_cdata")


def memory_of(tensor: Tensor) -> int | None:
    """The identity of its storage, the same for all tensors that share it, also while a compiler traces.

    None for tensors that have no storage of their own: sparse ones, and those that stand for others in torch.func.
    """
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None


def memories_of(tensors: Collection[Tensor]) -> list[int | None]:
    """`memory_of` each: quicker for all at once, and asked at every step."""
    try:
        return list(map(_IDENTITY, map(Tensor.untyped_storage, tensors)))
    except NotImplementedError:
        return list(map(memory_of, tensors))
