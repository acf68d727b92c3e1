"""Watching a call: which of a module's own tensors it reads by the back door, and which it writes to in any way.

A module is called with other tensors in the place of its own. What it reaches in another way (a list of parameters, a
closure, an alias made by `.data`) is its own tensor still: an old value, and no gradient arrives. And a write through
`.data` bumps no version. Neither shows from outside, so one call is watched operator by operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from funcfreeze.model.memory import memory_of


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Inside `with watch:` every operator's tensors are looked at; memory that is guarded is copied before a write.

    Args:
        own: memory -> name of the tensors that a call should not come across.
        guarded: memory -> name of those whose writes are noted and undone.

    Attributes:
        seen: the names in `own` that an operator came across, in order.
        written: the names whose memory an operator wrote to.
    """

    supports_higher_order_operators = True

    def __init__(self, own: Mapping[int, str], guarded: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._own = own
        self._guarded = guarded
        self._before: list[tuple[UntypedStorage, UntypedStorage]] = []
        self.seen: dict[str, None] = {}
        self.written: set[str] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts of the model run as they are."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor, is_written in tensors_given(func, args, kwargs or {}):
            memory = memory_of(tensor) or 0
            own = self._own.get(memory)
            if own is not None:
                self.seen[own] = None
            name = own or self._guarded.get(memory)
            if is_written and name is not None:
                self._note_write(tensor, name)
        return func(*args, **(kwargs or {}))

    def own_name(self, tensor: Tensor) -> str | None:
        """The name of the tensor of `own` that is in this memory, or None."""
        return self._own.get(memory_of(tensor) or 0)

    def undo(self) -> None:
        """Put back what was written to. It bumps no version: a graph may have saved the tensors."""
        for storage, copy in self._before:
            storage.copy_(copy)
        self._before.clear()

    def _note_write(self, tensor: Tensor, name: str) -> None:
        if name not in self.written:
            self.written.add(name)
            storage = tensor.untyped_storage()
            self._before.append((storage, storage.clone()))  # type: ignore[no-untyped-call]  # torch's


def tensors_given(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    """The tensors that an operator is given, and whether it writes to them."""
    if not isinstance(func, torch._ops.OpOverload):  # higher order: its schema says nothing of writes
        yield from ((leaf, False) for leaf in _leaves((args, kwargs)))
        return
    for index, argument in enumerate(func._schema.arguments):
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        yield from ((leaf, is_written) for leaf in _leaves(given))


def _leaves(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if not isinstance(given, tuple | list | dict):
        return []
    leaves: list[Any] = optree.tree_leaves(given)  # type: ignore[arg-type]  # any container will do
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def by_memory(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """Memory -> name; several tensors in one memory go by the first."""
    found: dict[int, str] = {}
    for name, tensor in tensors.items():
        memory = memory_of(tensor)
        if memory is not None and tensor.numel():
            found.setdefault(memory, name)
    return found
