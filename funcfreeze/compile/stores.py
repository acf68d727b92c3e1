"""The dicts in which a module's parts hold parameters and buffers, and what is put in them for the time of a call.

There may be hundreds of them, and all are looked at in every call: hence `map` over flat lists, and no loops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import getitem, is_, setitem
from typing import Any

from torch import Tensor, nn

from funcfreeze.compile.problems import NotAsDeclared

Site = tuple[nn.Module, str]
"""A part of a module and the name of a tensor in it."""


class Stores:
    """The stores of some modules, and other contents for them.

    The dicts stay what they are, and so do the modules' `__dict__`s: Dynamo's guards look again at a part whose
    `__dict__` was written to.

    Args:
        modules: the parts of a module.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        stores = [vars(module)[name] for module in modules for name in ("_parameters", "_buffers")]
        self._stores: list[dict[str, Any]] = [store for store in stores if store]
        self._sizes = [*map(len, self._stores)]
        self._in: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._index: dict[tuple[int, str], int] = {}
        for store in self._stores:
            for name in store:
                self._index[id(store), name] = len(self._in)
                self._in.append(store)
                self._names.append(name)
        self._own = [*map(getitem, self._in, self._names)]
        self._others = [*self._own]

    def exchange(self, store: str, sites: Sequence[Site], tensor: Tensor) -> None:
        """Have another tensor in these sites of `_parameters` or `_buffers`, after the next `put`."""
        for module, name in sites:
            self._others[self._index[id(vars(module)[store]), name]] = tensor

    def look(self) -> None:
        """Note what is there now: a part may have been given another tensor of its own.

        Raises:
            NotAsDeclared: there are more or fewer parameters or buffers, or under other names, than there were.
        """
        if self._are_as_before():
            return
        now = [store.get(name) for store, name in zip(self._in, self._names, strict=True)]
        if _are_there(now) != _are_there(self._own) or [*map(len, self._stores)] != self._sizes:
            raise NotAsDeclared
        self._own = now

    def put(self) -> None:
        """Put the others in; asked after a `look`."""
        deque(map(setitem, self._in, self._names, self._others), maxlen=0)

    def take_back(self) -> None:
        """Have every dict hold what it held before, and nothing else."""
        deque(map(setitem, self._in, self._names, self._own), maxlen=0)
        if [*map(len, self._stores)] != self._sizes:
            for store in self._stores:
                for name in [name for name in store if (id(store), name) not in self._index]:
                    del store[name]

    def has_lost(self) -> bool:
        """Whether something that was there is gone or None by now."""
        now = [store.get(name) for store, name in zip(self._in, self._names, strict=True)]
        return any(is_there and tensor is None for is_there, tensor in zip(_are_there(self._own), now, strict=True))

    def _are_as_before(self) -> bool:
        try:
            same = all(map(is_, map(getitem, self._in, self._names), self._own))
        except KeyError:
            return False
        return same and [*map(len, self._stores)] == self._sizes


def _are_there(tensors: Sequence[Tensor | None]) -> list[bool]:
    return [tensor is not None for tensor in tensors]
