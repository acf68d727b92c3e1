"""Which Python values a computation may read: found by following its code.

Functions are disassembled for the names they look up. From `losses`, the modules' methods, hooks, schedules and the
optimizer everything that those names lead to is followed: closures, defaults, globals, attributes of objects and
classes, and the functions called. What belongs to torch or to Python itself is not.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
"""What is compared by value where it is not the same object."""

NEVER_READ = frozenset(nn.Module().__dict__) - {"training"} | {"_flat_weights", "_flat_weight_refs"}
"""Attributes that stand for something looked at elsewhere: a module's dicts of parameters, buffers, children and hooks;
and what recurrent layers derive from their parameters, anew whenever those are exchanged."""

_MACHINERY = frozenset({"torch", "numpy", "optree", "funcfreeze", "logging", "threading", "_thread"})
_NOT_FOLLOWED = sys.stdlib_module_names | _MACHINERY


class Place(NamedTuple):
    """Where values are: some keys of a dict (None: all of them, and no others may be added), and a name for it."""

    held: Mapping[str, Any]
    keys: tuple[str, ...] | None
    name: str


class Cell(NamedTuple):
    """A variable in a closure, and a name for it."""

    cell: types.CellType
    name: str


class Reading:
    """Everything that may be read, starting from a module and some functions.

    Attributes:
        places: dicts and their keys.
        cells: variables in closures.
        modules: all modules met.
    """

    def __init__(self, module: nn.Module, roots: Iterable[Any]) -> None:
        self.places: list[Place] = []
        self.cells: list[Cell] = []
        self.modules: dict[int, nn.Module] = {}
        self._seen: dict[int, Any] = {}  # keeps what was met alive, so that no id is used twice
        self._names: set[str] = {"forward", "__call__"}
        self._objects: list[tuple[Any, str]] = []
        self._taken: set[tuple[int, str]] = set()
        self._value(module, "")
        for root in roots:
            self._value(root, "")
        known = -1
        while known != len(self._names) + len(self._objects):  # code found in objects has names of its own
            known = len(self._names) + len(self._objects)
            for held, name in list(self._objects):
                self._attributes(held, name)

    def _value(self, value: Any, name: str) -> None:
        """Follow a value, known by a name."""
        if isinstance(value, (*PLAIN, Tensor)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Module):
            self._module(value, name)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._value(value.__self__, type(value.__self__).__name__)
            self._value(value.__func__, name)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._value(part, name)
        elif isinstance(value, property):
            self._value(value.fget, name)
        elif isinstance(value, staticmethod | classmethod):
            self._value(value.__func__, name)
        elif isinstance(value, dict):
            for inner in value.values():
                self._value(inner, name)
        elif isinstance(value, list | tuple | set | frozenset):
            for inner in value:
                self._value(inner, name)
        elif not _is_followed(value):
            return
        elif isinstance(value, types.ModuleType | type):
            self._objects.append((value, value.__name__))
        else:
            self._objects.append((value, name or type(value).__name__))

    def _module(self, module: nn.Module, prefix: str) -> None:
        for path, inner in module.named_modules():
            name = ".".join(part for part in (prefix, path) if part) or type(inner).__name__
            if id(inner) in self.modules:
                continue
            self.modules[id(inner)] = self._seen[id(inner)] = inner
            self.places += (Place(inner.__dict__, None, name), Place(inner._modules, None, name))
            for key, value in inner.__dict__.items():
                if key not in NEVER_READ:
                    self._value(value, f"{name}.{key}")
            for hooks in hook_dicts(inner):
                self._value(list(hooks.values()), f"a hook of {name}")
            self._objects.append((inner, name))

    def _function(self, function: types.FunctionType) -> None:
        where = function.__qualname__
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.cells.append(Cell(cell, f"{name} in the closure of {where}"))
            self._value(contents(cell), name)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._value(default, f"a default of {where}")
            if isinstance(default, list | dict | set):
                self.places.append(Place({where: default}, (where,), f"a default of {where}"))
        if not _is_followed(function):
            return
        globals_, attributes = _names(function.__code__)
        self._names |= attributes
        for name in globals_ & function.__globals__.keys():
            self._take(function.__globals__, function.__globals__, name, f"the global {name} read by {where}")

    def _attributes(self, held: Any, name: str) -> None:
        """The attributes of an object, its class, a class or a namespace that the code met so far may look up."""
        if not isinstance(held, nn.Module):  # its own are watched whole
            space = _namespace(held)
            for key in self._names & space.keys():
                self._take(held, space, key, f"{name}.{key}")
        if not isinstance(held, type | types.ModuleType):
            for kind in type(held).__mro__:
                for key in self._names & vars(kind).keys() if _is_followed(kind) else ():
                    self._take(kind, vars(kind), key, f"{kind.__name__}.{key}")

    def _take(self, owner: object, space: Mapping[str, Any], key: str, name: str) -> None:
        if (id(owner), key) in self._taken:
            return
        self._taken.add((id(owner), key))
        value = space[key]
        if not isinstance(value, types.ModuleType | types.BuiltinFunctionType):
            self.places.append(Place(space, (key,), name))
        self._value(value, name)


def hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    """The dicts that hold a module's forward and backward hooks."""
    return [
        value
        for key, value in module.__dict__.items()
        if key.endswith("_hooks") and key.startswith(("_forward", "_backward"))
    ]


def contents(cell: types.CellType) -> Any:
    """What a closure's variable is now; None if it is not assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _namespace(held: Any) -> Mapping[str, Any]:
    """An object's own attributes; none if it keeps them in slots."""
    try:
        namespace: Mapping[str, Any] = vars(held)
    except TypeError:
        return {}
    return namespace


def _is_followed(value: Any) -> bool:
    """Whether a function, module or class is neither torch's nor Python's own; other objects nearly always are."""
    if isinstance(value, types.ModuleType):
        return _package(value.__name__) not in _NOT_FOLLOWED
    if isinstance(value, types.FunctionType | type):
        return _package(value.__module__) not in _NOT_FOLLOWED
    return _package(type(value).__module__) not in _MACHINERY


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names that code, and functions defined in it, look up in its module, and as attributes of anything."""
    found: tuple[set[str], set[str]] = (set(), set())
    pending = [code]
    for each in pending:  # grows while it is walked
        for instruction in dis.get_instructions(each):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                found[0].add(instruction.argval)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                found[1].add(instruction.argval)
        pending += (const for const in each.co_consts if isinstance(const, types.CodeType))
    return frozenset(found[0]), frozenset(found[1])
