"""What the parts of a module hold: taken once, and looked at again after every call, which may have changed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat
from operator import getitem, is_
from typing import Any

from torch import nn

_STORES = (("parameter", "_parameters"), ("buffer", "_buffers"))


@dataclass(frozen=True, eq=False)
class Census:
    """What some modules held when it was taken.

    Attributes:
        wholes: the modules, with what comes before the paths in each.
        modules: all of their parts.
        held: how many parameters each of these had, and how many buffers, None among them.
        parts: the parts of each.
        empty: places for a parameter or a buffer in which there was None.
        taken: places in which there was one.
    """

    wholes: Sequence[tuple[str, nn.Module]]
    modules: tuple[nn.Module, ...]
    held: Sequence[int]
    parts: Sequence[Sequence[nn.Module | None]]
    empty: Sequence[tuple[nn.Module, str, str]]
    taken: frozenset[tuple[int, str, str]]

    @staticmethod
    def of(wholes: Sequence[tuple[str, nn.Module]]) -> Census:
        """Take it now."""
        modules = tuple(part for _, whole in wholes for part in whole.modules())
        places = [
            (part, store, name, tensor)
            for part in modules
            for _, store in _STORES
            for name, tensor in vars(part)[store].items()
        ]
        return Census(
            wholes,
            modules,
            [len(vars(part)[store]) for _, store in _STORES for part in modules],
            [tuple(vars(part)["_modules"].values()) for part in modules],
            [(part, store, name) for part, store, name, tensor in places if tensor is None],
            frozenset((id(part), store, name) for part, store, name, tensor in places if tensor is not None),
        )

    def problems(self) -> Iterator[str]:
        """Parameters and buffers that a module holds by now, and did not then; and parts that a twin does not have."""
        if all(vars(part)[store].get(name) is None for part, store, name in self.empty) and self._holds_as_many():
            return
        if len(self.wholes) > 1:
            before = dict(zip(map(id, self.modules), self.parts, strict=True))
            for path, part in self.wholes[0][1].named_modules():
                if id(part) in before and tuple(vars(part)["_modules"].values()) != before[id(part)]:
                    yield (
                        f"{path or 'the model'} has other parts than when the Step was built, and a twin is copied "
                        "then: build the Step after the model is complete"
                    )
        for noun, store in _STORES:
            for before_path, whole in self.wholes:
                for path, part in whole.named_modules():
                    for name, tensor in vars(part)[store].items():
                        if tensor is not None and (id(part), store, name) not in self.taken:
                            inside = f"{path}.{name}" if path else name
                            yield (
                                f"the forward made a {noun}, {before_path}{inside}, that was not there, or None, when "
                                "the Step was built; run one batch through the model first"
                            )

    def _holds_as_many(self) -> bool:
        """Whether there is as much in all of them: in flat lists, since there may be hundreds at every call."""
        parameters, buffers, modules = (
            [*map(getitem, self._own, repeat(store))] for store in ("_parameters", "_buffers", "_modules")
        )
        found = [*chain.from_iterable(map(dict.values, modules))]
        return (
            [*map(len, parameters), *map(len, buffers)] == self.held
            and len(found) == len(self._all_parts)
            and all(map(is_, found, self._all_parts))
        )

    @cached_property
    def _own(self) -> list[dict[str, Any]]:
        return [*map(vars, self.modules)]

    @cached_property
    def _all_parts(self) -> list[nn.Module | None]:
        return [*chain.from_iterable(self.parts)]
