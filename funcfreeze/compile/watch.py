"""What a trace read from Python, so that a graph is never used once that has changed.

A traced step holds whatever the modules' attributes, their train/eval flags and hooks, and the values that `losses`
reads from closures and globals were when it was traced. All of these are looked at before every call. That has to be
quick: everything is compared as one flat list, by identity, in C.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torchs_modules
from torch.utils.hooks import RemovableHandle

from funcfreeze.compile.reading import NEVER_READ, PLAIN, Place, Reading, contents, hook_dicts


class Watch:
    """The Python values that a computation may read, as they are now.

    Args:
        module: the model.
        roots: the functions that are traced: `losses`, schedules, the optimizer's.
        params: the model's own parameters, whose hooks run too.

    Attributes:
        generators: Python's and numpy's generators of random numbers that it may draw from.
    """

    def __init__(self, module: nn.Module, roots: Iterable[Callable[..., Any]], params: Sequence[Tensor]) -> None:
        reading = Reading(module, [*roots, *(list((param._backward_hooks or {}).values()) for param in params)])
        self._pinned: dict[int, Tensor] = {}  # those that several places hold, which must go on holding just them
        self._places = reading.places
        self._cells = reading.cells
        self._spaces: list[Mapping[str, Any]] = [place.held for place in self._places]
        self._whole = [place.held for place in self._places if place.keys is None]
        self._sizes = list(map(len, self._whole))
        self._keys = [_keys(place) for place in self._places]
        # `itemgetter` gives no tuple for a single key; a key that is read again does no harm
        self._getters = [itemgetter(*keys, keys[0]) if keys else _nothing for keys in self._keys]
        self._values = self._present_values()
        self._variables = self._present_variables()
        self._containers = [(name, value, _frozen(value)) for name, value in self._named_values() if _changeable(value)]
        self._copies = list(_copies(value for _, value in self._named_values()))
        self.generators = reading.generators
        self._modules = list(reading.modules.values())
        self._kinds = list(map(type, self._modules))
        self._absent = [
            (held, key)
            for module in self._modules
            for held in (module._buffers, module._parameters)
            for key, value in held.items()
            if value is None
        ]
        self._params = params
        self._hooked, self._hooks = self._present_hooks()
        self._handles = RemovableHandle.next_id

    def changes(self) -> list[str]:
        """What is no longer as it was, described; empty if nothing is."""
        return [
            *self._changed_values(),
            *self._changed_variables(),
            *self._changed_containers(),
            *self._changed_hooks(),
        ]

    def holds(self) -> bool:
        """Whether everything is as it was."""
        if list(map(len, self._whole)) != self._sizes or list(map(type, self._modules)) != self._kinds:
            return False
        try:
            values = self._present_values()
        except KeyError:  # an attribute was deleted
            return False
        if not all(map(is_, values, self._values)):
            if any(True for _ in self._changed_values()):
                return False
            self._values = values  # equal numbers, or other tensors of the same kind: next time they are identical
        if not all(held.get(key) is None for held, key in self._absent):
            return False
        rest = chain(self._changed_variables(), self._changed_containers(), self._changed_hooks())
        if any(True for _ in rest):
            return False
        self._variables = self._present_variables()  # as with values; a further trace puts back what is there now
        return True

    def where(self, tensor: Tensor) -> tuple[str, Callable[[], Tensor]] | None:
        """The name of the one place that holds a tensor, and how to read what is there now.

        None if it is nowhere, or in several places; those are then watched for other tensors.
        """
        found: list[tuple[str, Callable[[], Tensor]]] = [
            (_full_name(place, key), lambda held=held, key=key: held[key])  # type: ignore[misc]  # bound now
            for place, held, known in self._now_and_before()
            for key, value in known.items()
            if value is tensor
        ]
        found += [
            (name, lambda cell=cell: contents(cell))  # type: ignore[misc]  # bound now
            for (cell, name), value in zip(self._cells, self._variables, strict=True)
            if value is tensor
        ]
        if len(found) > 1:
            self._pinned[id(tensor)] = tensor
        return found[0] if len(found) == 1 else None

    def side_effects(self, read: Callable[[Tensor], bool]) -> list[str]:
        """As `changes`, but for what a forward may well do: put a tensor where there was one that it did not read.

        That is how modules hold what they compute anew in each forward (a normalised weight).

        Args:
            read: whether the trace read a tensor from outside.
        """
        renewed = {
            _full_name(place, key)
            for place, held, before in self._now_and_before()
            for key, value in before.items()
            if isinstance(value, Tensor) and not read(value) and isinstance(held.get(key), Tensor)
        }
        return [change for change in self.changes() if change.split(" changed from ")[0] not in renewed]

    def undo(self) -> None:
        """Put back every attribute, global, closure's variable and container that is no longer what it was."""
        for (cell, _), before in zip(self._cells, self._variables, strict=True):
            if contents(cell) is not before:
                cell.cell_contents = before
        for container, inside in self._copies:
            if not _same_inside(container, inside):
                container.clear()
                container.extend(inside) if isinstance(container, list | deque) else container.update(inside)
        for place, held, before in self._now_and_before():
            if isinstance(held, dict):
                for key in held.keys() - before.keys() - NEVER_READ if place.keys is None else ():
                    del held[key]
                held.update(before)

    def _present_values(self) -> list[Any]:
        return list(chain.from_iterable(map(call, self._getters, self._spaces)))

    def _present_variables(self) -> list[Any]:
        return [contents(cell) for cell, _ in self._cells]

    def _now_and_before(self) -> Iterator[tuple[Place, Mapping[str, Any], dict[str, Any]]]:
        values = iter(self._values)
        for place, keys in zip(self._places, self._keys, strict=True):
            known = {key: next(values) for key in keys}
            if keys:
                next(values)  # the first once more
            yield place, place.held, known

    def _named_values(self) -> Iterator[tuple[str, Any]]:
        for place, _, known in self._now_and_before():
            yield from ((_full_name(place, key), value) for key, value in known.items())
        yield from ((cell.name, value) for cell, value in zip(self._cells, self._variables, strict=True))

    def _changed_values(self) -> Iterator[str]:
        for place, held, known in self._now_and_before():
            for key in known if place.keys else known.keys() | (held.keys() - NEVER_READ):
                if key not in held or key not in known:
                    yield f"{_full_name(place, key)} was {'added' if key in held else 'removed'}"
                elif not self._alike(held[key], known[key]):
                    yield f"{_full_name(place, key)} changed from {_shown(known[key])} to {_shown(held[key])}"

    def _changed_variables(self) -> Iterator[str]:
        for (cell, name), before in zip(self._cells, self._variables, strict=True):
            now = contents(cell)
            if now is not before and not self._alike(now, before):
                yield f"{name} changed from {_shown(before)} to {_shown(now)}"

    def _changed_containers(self) -> Iterator[str]:
        for name, container, before in self._containers:
            if _frozen(container) != before:
                yield f"{name} was changed in place"

    def _changed_hooks(self) -> Iterator[str]:
        """Hooks added are noticed by the handles that torch makes for them; those that were there may just go."""
        if RemovableHandle.next_id == self._handles and all(len(hooks) == size for hooks, size in self._hooked):
            return
        if self._present_hooks()[1] == self._hooks:
            self._handles = RemovableHandle.next_id  # they belong to something else
        else:
            yield "hooks of the model's modules or parameters were added or removed"

    def _present_hooks(self) -> tuple[list[tuple[Mapping[int, Any], int]], list[list[Any]]]:
        """The dicts that hold hooks, with their sizes; and all hooks."""
        held: list[Mapping[int, Any]] = [hooks for module in self._modules for hooks in hook_dicts(module)]
        held += (param._backward_hooks or {} for param in self._params)
        held += (
            hooks for key, hooks in vars(torchs_modules).items() if key.startswith("_global_") and key.endswith("hooks")
        )
        return [(hooks, len(hooks)) for hooks in held if hooks], [[*hooks.values()] for hooks in held]

    def _alike(self, one: Any, other: Any) -> bool:
        """The same for a trace: the same object, equal plain values, or tensors that differ only in their numbers."""
        if one is other:
            return True
        if type(one) is not type(other) or id(other) in self._pinned:
            return False
        if isinstance(one, Tensor):
            return kind(one) == kind(other)
        return isinstance(one, PLAIN) and bool(one == other)


def _keys(place: Place) -> tuple[str, ...]:
    return place.keys if place.keys is not None else tuple(key for key in place.held if key not in NEVER_READ)


def _nothing(held: object) -> tuple[()]:
    return ()


def _full_name(place: Place, key: str) -> str:
    return f"{place.name}.{key}" if place.keys is None else place.name


def kind(tensor: Tensor) -> tuple[Any, ...]:
    """All of a tensor that compiled code takes for granted."""
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tensor.shape, strides, tensor.dtype, tensor.device, tensor.requires_grad, tensor.layout


class _Identity:
    """An object to be compared by what it is; it is kept alive, so that no other gets its id."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


def _changeable(value: Any, depth: int = 8) -> bool:
    """Whether it is a container whose contents may change, or one that holds such."""
    if isinstance(value, tuple) and depth:
        return any(_changeable(inner, depth - 1) for inner in value)
    return isinstance(value, list | dict | set | deque)


def _copies(values: Iterable[Any], depth: int = 8) -> Iterator[tuple[Any, Any]]:
    """Every container that may change, those inside others too, and a shallow copy of it."""
    for value in values:
        if isinstance(value, list | dict | set | deque):
            yield value, copy(value)
        if depth and isinstance(value, list | tuple | dict | deque):
            yield from _copies(value.values() if isinstance(value, dict) else value, depth - 1)


def _same_inside(one: Any, other: Any) -> bool:
    """Whether two containers of one kind hold the same objects; sets in any order."""
    if isinstance(one, set):
        return set(map(id, one)) == set(map(id, other))
    pair = [chain.from_iterable(each.items()) if isinstance(each, dict) else each for each in (one, other)]
    return len(one) == len(other) and all(map(is_, *pair))


def _frozen(value: Any, depth: int = 8) -> Any:
    """A container's contents as a value to compare: plain values with their types, the rest by identity."""
    if isinstance(value, dict) and depth:
        return tuple((_frozen(key, 0), _frozen(inner, depth - 1)) for key, inner in value.items())
    if isinstance(value, list | tuple | deque) and depth:
        return (type(value), *(_frozen(inner, depth - 1) for inner in value))
    if isinstance(value, set | frozenset) and depth:
        return frozenset(_frozen(inner, depth - 1) for inner in value)
    return (type(value), value) if isinstance(value, PLAIN) else _Identity(value)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, PLAIN) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
