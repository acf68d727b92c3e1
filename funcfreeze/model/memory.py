"""Which memory a tensor is in, so that two that share it are known."""

from __future__ import annotations

from torch import Tensor


def memory_of(tensor: Tensor) -> int | None:
    """The identity of its storage, the same for all tensors that share it, also while a compiler traces.

    None for tensors that have no storage of their own: sparse ones, and those that stand for others in torch.func.
    """
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None
