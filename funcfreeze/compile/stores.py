"""The dicts in which a module's parts hold parameters and buffers, and what is put in them for the time of a call.

There may be hundreds of them, and all are looked at in every call: hence `map` over flat lists, and no loops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import getitem, is_, setitem
from typing import Any

from torch import Tensor, nn

from funcfreeze.compile.problems import NotAsDeclared

Site = tuple[nn.Module, str]
"""A part of a module and the name of a tensor in it."""

Key = tuple[int, str, str]
"""A site by the id of the part's `__dict__`, `_parameters` or `_buffers`, and the name."""


@dataclass(frozen=True)
class Contents:
    """What stores hold, place by place.

    Attributes:
        stores: the dicts, of every part its parameters and its buffers.
        keys: of all places.
        within: the dict of every place.
        names: the name of every place.
        own: the tensor, or None, of every place.
    """

    stores: list[dict[str, Any]]
    keys: list[Key]
    within: list[dict[str, Any]]
    names: list[str]
    own: list[Tensor | None]

    @cached_property
    def positions(self) -> dict[Key, int]:
        """The number of every place."""
        return {key: number for number, key in enumerate(self.keys)}

    @property
    def presence(self) -> dict[Key, bool]:
        """Whether there is a tensor in each place."""
        return {key: tensor is not None for key, tensor in zip(self.keys, self.own, strict=True)}


class Stores:
    """The stores of some modules, and other contents for them.

    They stay the dicts they are, and so do the modules' `__dict__`s: Dynamo's guards look again at a part whose
    `__dict__` was written to.

    Args:
        modules: the parts of a module.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._parts = [vars(module) for module in modules for _ in range(2)]
        self._kinds = ["_parameters", "_buffers"] * len(modules)
        self._contents = self._read()
        self._declared = self._contents.presence
        self._exchanged: dict[Key, Tensor] = {}
        self._others = [*self._contents.own]

    def exchange(self, kind: str, sites: Sequence[Site], tensor: Tensor) -> None:
        """Have another tensor in these sites of `_parameters` or `_buffers`, after the next `put`."""
        for module, name in sites:
            key = (id(vars(module)), kind, name)
            self._exchanged[key] = tensor
            position = self._contents.positions[key]
            self._others[position] = tensor
            _share_attributes(self._contents.own[position], tensor)

    def look(self) -> None:
        """Note what is there now: a part may have been given another tensor of its own.

        Raises:
            NotAsDeclared: there are more or fewer parameters or buffers, or under other names, than there were.
        """
        if self._are_as_before():
            return
        now = self._read()
        if now.presence != self._declared:
            raise NotAsDeclared
        self._contents = now
        self._others = [self._exchanged.get(key, own) for key, own in zip(now.keys, now.own, strict=True)]
        for own, other in zip(now.own, self._others, strict=True):
            _share_attributes(own, other)

    def put(self) -> None:
        """Put the others in; after a `look`."""
        deque(map(setitem, self._contents.within, self._contents.names, self._others), maxlen=0)

    def take_back(self) -> None:
        """Have every dict hold what it held at the last `look`, in that order, and nothing else."""
        contents = self._contents
        if [*chain.from_iterable(contents.stores)] != contents.names:
            for store in contents.stores:
                store.clear()
        deque(map(setitem, contents.within, contents.names, contents.own), maxlen=0)

    def has_lost(self) -> bool:
        """Whether something that was there is gone or None by now."""
        contents = self._contents
        return any(
            own is not None and store.get(name) is None
            for store, name, own in zip(contents.within, contents.names, contents.own, strict=True)
        )

    def _are_as_before(self) -> bool:
        contents = self._contents
        if not all(map(is_, map(getitem, self._parts, self._kinds), contents.stores)):
            return False
        if [*chain.from_iterable(contents.stores)] != contents.names:
            return False
        return all(map(is_, map(getitem, contents.within, contents.names), contents.own))

    def _read(self) -> Contents:
        stores = [part[kind] for part, kind in zip(self._parts, self._kinds, strict=True)]
        places = [
            ((id(part), kind, name), store, name, tensor)
            for part, kind, store in zip(self._parts, self._kinds, stores, strict=True)
            for name, tensor in store.items()
        ]
        return Contents(
            stores,
            [key for key, *_ in places],
            [store for _, store, *_ in places],
            [name for _, _, name, _ in places],
            [tensor for *_, tensor in places],
        )


def _share_attributes(own: Tensor | None, other: Tensor | None) -> None:
    """Have what somebody keeps on a parameter (`weight.scale`) on what stands for it, too, now and later."""
    if own is not None and other is not None:
        other.__dict__ = own.__dict__
