"""A state's tensors in one list, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.computation.finite import Found

Kind = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]
"""A tensor's shape, strides, dtype and device: what compiled code takes for granted."""

Fields = tuple[dict[str, Tensor], dict[str, Tensor], Any, Tensor]
"""Params, buffers, optimizer and step of a state."""


@dataclass(frozen=True)
class Constant:
    """A leaf of the optimizer's state that is no tensor. 1, 1.0 and True are different ones, every NaN the same."""

    index: int
    shown: str
    leaf: Any = field(compare=False)


@dataclass(frozen=True)
class Layout:
    """How the tensors of a state are listed: parameters, the optimizer's, the step, buffers. Compares by value.

    Attributes:
        params: their paths.
        buffers: their paths.
        optimizer: the structure of the optimizer's state.
        constants: its leaves that are no tensors, with their positions.
        kinds: of all tensors.
    """

    params: tuple[str, ...]
    buffers: tuple[str, ...]
    optimizer: optree.PyTreeSpec
    constants: tuple[Constant, ...]
    kinds: tuple[Kind, ...]

    def fields(self, tensors: Sequence[Tensor]) -> Fields:
        """The four fields of a state, from its tensors."""
        rest = iter(tensors)
        params = {path: next(rest) for path in self.params}
        constants = {constant.index: constant.leaf for constant in self.constants}
        leaves = [constants[index] if index in constants else next(rest) for index in range(self.optimizer.num_leaves)]
        step = next(rest)
        buffers = {path: next(rest) for path in self.buffers}
        return params, buffers, optree.tree_unflatten(self.optimizer, leaves), step

    def written(self, before: Any, after: Any) -> Any:
        """Write the optimizer's new state over the old one if it fits.

        Returns:
            None if it fitted, else a copy of the new state.

        Raises:
            TypeError: something in the state that is no tensor changes from step to step.
        """
        old, structure = optree.tree_flatten(before, none_is_leaf=True)
        new, renewed = optree.tree_flatten(after, none_is_leaf=True)
        if structure != renewed or any(_misfits(one, other) for one, other in zip(old, new, strict=True)):
            return optree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, after)
        # all are copied before the first is overwritten: a new one may be an old one in another place, or a view of it
        values = [
            other.clone() if isinstance(other, Tensor) and one is not other else None
            for one, other in zip(old, new, strict=True)
        ]
        for one, value in zip(old, values, strict=True):
            if value is not None:
                one.copy_(value)
        return None


@dataclass(frozen=True, eq=False)
class Listed:
    """A state's tensors by their layout, owned by the next step."""

    layout: Layout
    tensors: list[Tensor]

    @property
    def step(self) -> Tensor:
        """The count of steps."""
        return self.tensors[-1 - len(self.layout.buffers)]

    @cached_property
    def own(self) -> list[Tensor]:
        """The parameters and the buffers."""
        return self.tensors[: len(self.layout.params)] + self.tensors[len(self.tensors) - len(self.layout.buffers) :]

    @cached_property
    def memories(self) -> frozenset[int]:
        """The addresses of the memory that the tensors are in."""
        return frozenset(tensor.untyped_storage().data_ptr() for tensor in self.tensors)

    def apart(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy if it shares memory with the state, which a step overwrites."""
        return _cloned(tensor) if self.shares(tensor) else tensor

    def shares(self, tensor: Tensor) -> bool:
        """Whether it is in memory of the state."""
        strided = tensor.layout is torch.strided and tensor.numel() > 0
        return strided and tensor.untyped_storage().data_ptr() in self.memories

    @staticmethod
    def of(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: Any, step: Tensor) -> Listed:
        """List a state's tensors.

        Raises:
            ValueError: a sparse tensor, which compilers do not take.
        """
        leaves, structure = optree.tree_flatten(optimizer, none_is_leaf=True)
        constants = tuple(
            Constant(index, f"{type(leaf)} {leaf!r}", leaf)
            for index, leaf in enumerate(leaves)
            if not isinstance(leaf, Tensor)
        )
        kept = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        tensors = [*params.values(), *kept, step, *buffers.values()]
        sparse = [path for path, tensor in {**params, **buffers}.items() if tensor.layout is not torch.strided]
        if sparse:
            raise ValueError(
                f"{', '.join(sparse)}: a compiled step takes no sparse parameters or buffers; make them dense, or "
                "build the Step with compile=False"
            )
        kinds = tuple(map(kind_of, tensors))
        return Listed(Layout(tuple(params), tuple(buffers), structure, constants, kinds), tensors)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """By path."""
        paths = self.layout.buffers
        return dict(zip(paths, self.tensors[len(self.tensors) - len(paths) :], strict=True))

    def unless_skipped(self, buffers: Mapping[str, Tensor], found: Found | None) -> Mapping[str, Tensor]:
        """These buffers, or those that are held if the step was skipped."""
        return buffers if found is None else found.kept("buffer", self.buffers, buffers)

    def overwritten(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write these buffers over those of the state; returns the ones that do not fit."""
        if not buffers:
            return {}
        held = self.buffers
        apart = {path: self.apart(buffer) for path, buffer in buffers.items()}  # one may be what another was
        fits = {path for path, new in apart.items() if _fits(held[path], new)}
        if fits:
            torch._foreach_copy_([held[path] for path in fits], [apart[path] for path in fits])
        return {path: buffer for path, buffer in apart.items() if path not in fits}


def _cloned(tensor: Tensor) -> Tensor:
    """A copy with the same strides, for which code was compiled."""
    storage = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]  # torch's
    apart = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return apart.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _fits(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _misfits(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not _fits(one, other)
    if type(one) is not type(other) or one != other:
        raise TypeError(
            f"the optimizer's state holds {one!r}, which became {other!r}: a compiled step cannot count in Python; "
            "keep it as a tensor, or build the Step with compile=False"
        )
    return False


def kind_of(tensor: Tensor) -> Kind:
    """What compiled code takes for granted of a tensor."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
