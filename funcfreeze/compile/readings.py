"""What a user's merge rules and transforms read from Python, where Dynamo does not look: compared before every step.

They run in our own part of the graph. What they compute with tensors is in it, and tensors that they did not make are
read anew; a number in an attribute, a closure or a global is part of the trace, so another number is another trace.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from funcfreeze.computation.back_door import raise_misuse
from funcfreeze.computation.computation import Computation
from funcfreeze.model.attributes import MANY
from funcfreeze.optim import Transform

_NOT_THE_USERS = frozenset(sys.stdlib_module_names) | {"funcfreeze", "numpy", "optree", "scipy", "torch", "torchjd"}
"""Packages whose functions and classes do not change what they compute from step to step."""

_CLOSED = frozenset({"funcfreeze", "torch", "torchjd"})
"""Packages whose objects are not looked into."""

_VALUES = (bool, int, float, complex, str, bytes, type(None), itertools.count, torch.dtype, torch.device, torch.Size)
"""What shows all that it is."""

_CONTAINERS = (tuple, list, deque, set, frozenset, Mapping)


class Same(NamedTuple):
    """Equal to what is the very same object, which is held, so that its id is no other's."""

    held: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


Reading = tuple[str, Any]
"""Where something is read, and what it is: by its value, or as an object."""


class Readings:
    """What a computation's own functions of the user's read.

    Args:
        computation: with merge rules and a transform.
    """

    def __init__(self, computation: Computation) -> None:
        rules = (overlap.rule.decide for overlap in computation.evaluation.plan.merge)
        self._functions = [f for f in (*rules, *_updates(computation.transform, set())) if _is_the_users(f)]
        self._known: list[list[Reading]] = []

    def number(self) -> int:
        """A number for what there is to read now; 0 where nobody but ourselves reads."""
        if not self._functions:
            return 0
        present, _ = self._now()
        if present not in self._known:
            self._known.append(present)
        return 1 + self._known.index(present)

    @contextmanager
    def refusing_writes(self) -> Iterator[None]:
        """Refuse what they write to while they are traced, which no later step would do; it is taken back.

        Raises:
            RuntimeError: naming what.
        """
        if not self._functions:
            yield
            return
        before, seen = self._now()
        take_back = [_restorer(value) for value in seen]
        try:
            yield
        finally:
            after, _ = self._now()
            for restore in take_back if after != before else ():
                restore()
        where = list(dict.fromkeys(at for at, value in after if (at, value) not in before))
        if after != before:
            raise_misuse([_write_problem(where)])

    def _now(self) -> tuple[list[Reading], list[Any]]:
        """All that can be seen of it now, and the objects it was seen in."""
        seen: dict[int, Any] = {}
        found = [reading for f in self._functions for reading in _read(f, _name_of(f), frozenset(), seen)]
        return found, [*seen.values()]


def _write_problem(where: list[str]) -> str:
    return (
        f"{', '.join(where) or 'what it reads'} changed while a merge rule or a transform was traced: a compiled step "
        "would do that once and never again. What changes from step to step belongs in its state (`init`); what it "
        "sets up in its first call, in its constructor; or build the Step with compile=False"
    )


def _updates(held: Any, seen: set[int]) -> Iterator[Callable[..., Any]]:
    """The functions of the transforms that a transform of ours was made of, and its own."""
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Transform):
        for function in (held.update, held.in_place):
            if function is not None:
                yield function
                yield from _updates(function, seen)
    elif isinstance(held, FunctionType) and not _is_the_users(held):
        for cell in _contents(held).values():
            yield from _updates(cell, seen)
    elif type(held) in (tuple, list):
        for part in held:
            yield from _updates(part, seen)
    elif type(held) is dict:
        yield from _updates([*held.values()], seen)


def _read(value: Any, where: str, names: frozenset[str], seen: dict[int, Any]) -> Iterator[Reading]:
    """What is read of a value.

    Args:
        value: what a function has at hand.
        where: what to call it.
        names: of a module or a class, the names that are of interest.
        seen: what was looked into.
    """
    if isinstance(value, _VALUES):
        yield where, (type(value), repr(value))  # NaN is equal to itself that way
        return
    yield where, Same(value)
    if id(value) in seen:
        return
    seen[id(value)] = value
    for at, part, wanted in _parts(value, where, names):
        yield from _read(part, at, wanted, seen)


def _parts(value: Any, where: str, names: frozenset[str]) -> Iterable[tuple[str, Any, frozenset[str]]]:
    """What a value is made of, as far as a user could change it."""
    nothing: frozenset[str] = frozenset()
    wrapped = _WRAPPED.get(type(value))
    if wrapped is not None:
        return [(where, part, nothing) for part in wrapped(value)]
    if isinstance(value, FunctionType):
        return _of_function(value, where)
    if isinstance(value, _CONTAINERS):
        if len(value) > MANY:
            return []
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [(f"{where}[{key!r}]", part, nothing) for key, part in entries]
    if isinstance(value, torch.Tensor | nn.Module) or _package(value) in _CLOSED:
        return []
    if isinstance(value, ModuleType):
        held = vars(value) if _is_the_users(value) else {}
        return [(f"{where}.{name}", held[name], names) for name in sorted(names & held.keys())]
    kinds = value.__mro__ if isinstance(value, type) else type(value).__mro__
    shared = {name: part for kind in reversed(kinds) if _is_the_users(kind) for name, part in vars(kind).items()}
    parts = shared if isinstance(value, type) else {**shared, **_attributes(value)}
    own = _name_of(value)
    return [
        (f"{own}.{name}", part, nothing)
        for name, part in parts.items()
        if not name.startswith("__") or isinstance(part, FunctionType)
    ]


_WRAPPED: Mapping[type, Callable[[Any], list[Any]]] = {
    MethodType: lambda method: [method.__func__, method.__self__],
    functools.partial: lambda partial: [partial.func, *partial.args, *partial.keywords.values()],
    staticmethod: lambda method: [method.__func__],
    classmethod: lambda method: [method.__func__],
    property: lambda attribute: [attribute.fget],
}
"""What is called where these are."""


def _of_function(function: FunctionType, where: str) -> Iterator[tuple[str, Any, frozenset[str]]]:
    if not _is_the_users(function):
        return
    names = frozenset(_names(function.__code__))
    given = {**_contents(function), **{f"default {index}": v for index, v in enumerate(function.__defaults__ or ())}}
    given |= function.__kwdefaults__ or {}
    given |= {name: function.__globals__[name] for name in sorted(names & function.__globals__.keys())}
    for name, part in given.items():
        yield name if callable(part) else f"{name} in {where}", part, names


def _contents(function: FunctionType) -> dict[str, Any]:
    """What a function closes over; a cell that is still empty is left out."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _names(code: CodeType) -> Iterator[str]:
    """The globals and attributes that code names, functions inside of it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _attributes(value: Any) -> dict[str, Any]:
    """An object's own attributes, in a dict or in slots."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    held = {name: getattr(value, name) for name in slots if name in dir(value)}
    return {**held, **getattr(value, "__dict__", {})}


def _slots(kind: type) -> list[str]:
    given = vars(kind).get("__slots__", ())
    return [given] if isinstance(given, str) else [*given]


def _is_the_users(value: Any) -> bool:
    """Whether it, or its class, is from a package that is not excluded."""
    wrapped = _WRAPPED.get(type(value))
    if wrapped is not None:
        return any(map(_is_the_users, wrapped(value)))
    return _package(value) not in _NOT_THE_USERS


def _package(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0]
    kind = value if isinstance(value, type | FunctionType) else type(value)
    return str(kind.__module__).partition(".")[0]


def _restorer(value: Any) -> Callable[[], None]:
    """How to make an object hold again what it holds now."""
    if isinstance(value, FunctionType):
        return _restorer_of_function(value)
    if isinstance(value, list | deque | set | dict):
        return _restorer_of_container(value)
    if _package(value) not in _CLOSED and isinstance(getattr(value, "__dict__", None), dict):
        return _restorer_of_container(vars(value))
    return lambda: None


def _restorer_of_container(container: Any) -> Callable[[], None]:
    before = container.copy()

    def restore() -> None:
        container.clear()
        (container.update if isinstance(container, set | dict) else container.extend)(before)

    return restore


def _restorer_of_function(function: FunctionType) -> Callable[[], None]:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    contents = _contents(function)
    names = {*_names(function.__code__)} & function.__globals__.keys()
    before = {name: function.__globals__[name] for name in names} if _is_the_users(function) else {}

    def restore() -> None:
        for name, held in contents.items():
            cells[name].cell_contents = held
        function.__globals__.update(before)

    return restore


def _name_of(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))
