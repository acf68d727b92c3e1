"""What a trace read from Python, so that a graph is never used once that has changed.

A traced step holds whatever the modules' attributes, their train/eval flags and hooks, and the values that `losses`
reads from closures and globals were when it was traced. All of these are looked at before every call. That has to be
quick: the modules' dicts are compared as one flat list, by identity, in C.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
"""What is compared by value where it is not the same object."""


class Place(NamedTuple):
    """A dict (of a module, an object, a namespace) or a closure cell, its name, and which keys count (None: all)."""

    held: dict[str, Any] | types.CellType
    name: str
    keys: tuple[str, ...] | None = None


class Watch:
    """The Python values a trace of `losses` over `module` may read, as they are now.

    Args:
        module: the model.
        losses: the user's function.
        params: the model's own parameters, whose hooks run too.
    """

    def __init__(self, module: nn.Module, losses: Callable[..., Any], params: Sequence[Tensor]) -> None:
        places = _distinct([*_of_modules(module, ""), *_of_function(losses, losses, set())])
        self._whole = [place for place in places if isinstance(place.held, dict) and place.keys is None]
        self._dicts: list[dict[str, Any]] = [place.held for place in self._whole if isinstance(place.held, dict)]
        self._sizes = list(map(len, self._dicts))
        self._keys = [tuple(key for key in held if key not in _NEVER_READ) for held in self._dicts]
        # `itemgetter` gives no tuple for a single key; a key that is read again does no harm
        self._getters = [itemgetter(*keys, keys[0]) if keys else _nothing for keys in self._keys]
        self._values = self._present_values()
        self._spots = [
            (place, _read(place)) for place in places if not (isinstance(place.held, dict) and not place.keys)
        ]
        self._containers = [
            (name, value, _frozen(value))
            for name, value in self._named_values()
            if isinstance(value, list | dict | set)
        ]
        self._hook_dicts = list(_hook_dicts(module))
        self._params = params
        self._hooked, self._hooks = self._present_hooks()
        self._handles = RemovableHandle.next_id

    def changes(self) -> list[str]:
        """What is no longer as it was, described; empty if nothing is."""
        return [*self._changed_values(), *self._changed_spots(), *self._changed_containers(), *self._changed_hooks()]

    def holds(self) -> bool:
        """Whether everything is as it was."""
        if list(map(len, self._dicts)) != self._sizes:
            return False
        try:
            values = self._present_values()
        except KeyError:  # an attribute was deleted, and another one made
            return False
        if not all(map(is_, values, self._values)):
            if any(True for _ in self._changed_values()):
                return False
            self._values = values  # equal numbers, or other tensors of the same kind: next time they are identical
        if any(True for _ in self._changed_spots()) or any(True for _ in self._changed_containers()):
            return False
        return not any(True for _ in self._changed_hooks())

    def where(self, tensor: Tensor) -> tuple[str, Callable[[], Tensor]] | None:
        """The name of the one place that holds a tensor, and how to read what is there now; None if it is nowhere."""
        found = [
            (f"{place.name}.{key}", functools.partial(held.__getitem__, key))
            for place, held in zip(self._whole, self._dicts, strict=True)
            for key, value in held.items()
            if value is tensor
        ]
        found += [
            (place.name, functools.partial(_read_one, place)) for place, (value, *_) in self._spots if value is tensor
        ]
        return found[0] if len(found) == 1 else None

    def side_effects(self, read: Callable[[Tensor], bool]) -> list[str]:
        """As `changes`, but for what a forward may well do: put a tensor where there was one that it did not read.

        That is how modules hold what they compute anew in each forward (a normalised weight, a flat list of weights).

        Args:
            read: whether the trace read a tensor from outside.
        """
        renewed = {
            f"{place.name}.{key}"
            for place, held, before in self._now_and_before()
            for key, value in before.items()
            if key in held and _are_tensors(value) and not any(map(read, _tensors(value))) and _are_tensors(held[key])
        }
        return [change for change in self.changes() if change.split(" ")[0] not in renewed]

    def undo(self) -> None:
        """Put back every value of a module's or object's dict that is no longer what it was."""
        for _, held, before in self._now_and_before():
            for key in held.keys() - before.keys() - _NEVER_READ:
                del held[key]
            held.update(before)

    def _present_values(self) -> list[Any]:
        return list(chain.from_iterable(map(call, self._getters, self._dicts)))

    def _now_and_before(self) -> Iterator[tuple[Place, dict[str, Any], dict[str, Any]]]:
        values = iter(self._values)
        for place, held, keys in zip(self._whole, self._dicts, self._keys, strict=True):
            known = {key: next(values) for key in keys}
            if keys:
                next(values)  # the first once more
            yield place, held, known

    def _named_values(self) -> Iterator[tuple[str, Any]]:
        for place, held in zip(self._whole, self._dicts, strict=True):
            yield from ((f"{place.name}.{key}", value) for key, value in held.items() if key not in _NEVER_READ)
        for place, values in self._spots:
            yield from ((place.name, value) for value in values)

    def _changed_values(self) -> Iterator[str]:
        for place, held, known in self._now_and_before():
            for key in known.keys() | (held.keys() - _NEVER_READ):
                if key not in held or key not in known:
                    yield f"{place.name}.{key} was {'added' if key in held else 'removed'}"
                elif not _alike(held[key], known[key]):
                    yield f"{place.name}.{key} changed from {_shown(known[key])} to {_shown(held[key])}"

    def _changed_spots(self) -> Iterator[str]:
        for index, (place, before) in enumerate(self._spots):
            now = _read(place)
            if not all(map(is_, now, before)):
                if not all(map(_alike, now, before)):
                    yield f"{place.name} changed from {_shown(before[0])} to {_shown(now[0])}"
                self._spots[index] = (place, now)

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
        held = [*self._hook_dicts, *(param._backward_hooks or {} for param in self._params)]
        return [(hooks, len(hooks)) for hooks in held if hooks], [[*hooks.values()] for hooks in held]


_NEVER_READ = frozenset(nn.Module().__dict__) - {"training"} | {"_flat_weights", "_flat_weight_refs"}
"""Attributes that stand for something looked at elsewhere: a module's dicts of parameters, buffers, children and hooks;
and what recurrent layers derive from their parameters, anew whenever those are exchanged."""


def _nothing(held: object) -> tuple[()]:
    return ()


def _of_modules(module: nn.Module, prefix: str) -> Iterator[Place]:
    """The dicts of all modules, of what they hold children in, and of plain objects (configurations) they refer to."""
    classes: set[type] = set()
    for path, inner in module.named_modules():
        name = ".".join(part for part in (prefix, path) if part) or type(inner).__name__
        yield Place(inner.__dict__, name)
        if inner._modules:
            yield Place(inner._modules, name)
        for key, value in inner.__dict__.items():
            if key not in _NEVER_READ and _is_plain_object(value):
                yield Place(vars(value), f"{name}.{key}")
        if type(inner) not in classes and not _is_torchs(type(inner)):
            classes.add(type(inner))
            yield from _globals_of(inner.forward, f"{type(inner).__name__}.forward")


def _globals_of(function: Any, name: str) -> Iterator[Place]:
    """The plain values that a function's own code reads from its module."""
    function = getattr(function, "__func__", function)
    if isinstance(function, types.FunctionType):
        names = _names(function.__code__).globals
        space = function.__globals__
        keys = tuple(key for key in names if isinstance(space.get(key), PLAIN) and key in space)
        yield from (Place(space, f"the global {key} read by {name}", (key,)) for key in keys)


def _of_function(value: Any, losses: Callable[..., Any], seen: set[int]) -> Iterator[Place]:
    """What a function reads from its closure, its module, and the object it is a method of; functions it calls too."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        for inner in (value.func, *value.args, *value.keywords.values()):
            yield from _of_value(inner, losses, (), seen)
    elif isinstance(value, types.MethodType):
        yield from _of_value(value.__self__, losses, _names(value.__func__.__code__).attributes, seen)
        yield from _of_function(value.__func__, losses, seen)
    elif isinstance(value, types.FunctionType):
        names = _names(value.__code__)
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield Place(cell, f"{key} in the closure of {value.__qualname__}", (key,))
            if _is_filled(cell):
                yield from _of_value(cell.cell_contents, losses, names.attributes, seen)
        for key in names.globals:
            if key in value.__globals__:
                held = value.__globals__[key]
                if not isinstance(held, types.ModuleType | type | types.BuiltinFunctionType):
                    yield Place(value.__globals__, f"the global {key} read by {value.__qualname__}", (key,))
                yield from _of_value(held, losses, names.attributes, seen)
    elif callable(value) and not isinstance(value, nn.Module | type) and _is_plain_object(value):
        yield from _of_function(type(value).__call__, losses, seen)
        yield from _of_value(value, losses, _names(getattr(type(value).__call__, "__code__", None)).attributes, seen)


def _of_value(value: Any, losses: Callable[..., Any], names: Sequence[str], seen: set[int]) -> Iterator[Place]:
    if isinstance(value, nn.Module):
        if id(value) not in seen:
            seen.add(id(value))
            yield from _of_modules(value, type(value).__name__)
    elif isinstance(value, functools.partial | types.MethodType):
        yield from _of_function(value, losses, seen)
    elif isinstance(value, types.FunctionType):
        if value.__module__ == getattr(losses, "__module__", None):
            yield from _of_function(value, losses, seen)
    elif isinstance(value, types.ModuleType):
        if not _is_torchs(value):
            held = vars(value)
            yield from (
                Place(held, f"{value.__name__}.{key}", (key,))
                for key in names
                if isinstance(held.get(key, held), PLAIN)
            )
    elif _is_plain_object(value) and id(value) not in seen:
        seen.add(id(value))
        held = vars(value)
        for key in names:
            if key in held:
                yield Place(held, f"{type(value).__name__}.{key}", (key,))
                yield from _of_value(held[key], losses, names, seen)


class _Names(NamedTuple):
    """The names that a function's code looks up: in its module, and as attributes of anything."""

    globals: tuple[str, ...]
    attributes: tuple[str, ...]


def _names(code: types.CodeType | None) -> _Names:
    """The names in a code object and in the functions defined in it."""
    found: dict[bool, dict[str, None]] = {True: {}, False: {}}
    pending = [] if code is None else [code]
    for each in pending:  # grows while it is walked
        for instruction in dis.get_instructions(each):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD"):
                found[instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")][instruction.argval] = None
        pending += (const for const in each.co_consts if isinstance(const, types.CodeType))
    return _Names(tuple(found[True]), tuple(found[False]))


def _is_plain_object(value: Any) -> bool:
    """Whether it is an object with attributes of its own, such as a configuration."""
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(
        value, nn.Module | Tensor | type | types.FunctionType | types.ModuleType | types.MethodType | functools.partial
    )


def _is_torchs(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return name.partition(".")[0] in ("torch", "builtins", "math", "numpy")


def _hook_dicts(module: nn.Module) -> Iterator[Mapping[int, Any]]:
    for inner in module.modules():
        for key, value in inner.__dict__.items():
            if key.endswith("_hooks") and key.startswith(("_forward", "_backward")):
                yield value


def _distinct(places: Sequence[Place]) -> list[Place]:
    kept: dict[tuple[int, tuple[str, ...] | None], Place] = {}
    for place in places:
        kept.setdefault((id(place.held), place.keys), place)
    return list(kept.values())


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # the variable is assigned later
        return False


def _read(place: Place) -> tuple[Any, ...]:
    if isinstance(place.held, types.CellType):
        return (place.held.cell_contents,) if _is_filled(place.held) else (None,)
    return tuple(place.held.get(key) for key in place.keys or ())


def _read_one(place: Place) -> Any:
    return _read(place)[0]


def _alike(one: Any, other: Any) -> bool:
    """The same for a trace: the same object, equal plain values, or tensors that differ only in their numbers."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return _kind(one) == _kind(other)
    return isinstance(one, PLAIN) and bool(one == other)


def _tensors(value: Any) -> Sequence[Tensor]:
    return (value,) if isinstance(value, Tensor) else value


def _are_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and all(isinstance(each, Tensor | weakref.ref) for each in value)
    )


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _frozen(value: Any) -> Any:
    """A container's contents as a value to compare: plain values as they are, the rest by identity."""
    if isinstance(value, dict):
        return tuple((key if isinstance(key, PLAIN) else id(key), _frozen(inner)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return (type(value), *map(_frozen, value))
    if isinstance(value, set | frozenset):
        return frozenset(map(_frozen, value))
    return (type(value), value) if isinstance(value, PLAIN) else id(value)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, PLAIN) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
