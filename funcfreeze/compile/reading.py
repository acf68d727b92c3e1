"""Which Python values a computation may read: found by following its code.

Functions are disassembled for the names they look up. From `losses`, the modules' methods, hooks, schedules and the
optimizer everything that those names lead to is followed: closures, defaults, globals, attributes of objects and
classes, and the functions called. What belongs to torch or to Python itself is not.
"""

from __future__ import annotations

import dis
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
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


_NOT_IN_A_FORWARD = frozenset(
    f"__{name}__"
    for name in (
        "init", "new", "del", "init_subclass", "class_getitem", "set_name", "post_init", "repr", "str", "hash", "dir",
        "sizeof", "setattr", "reduce", "reduce_ex", "getstate", "setstate", "copy", "deepcopy",
    )
)  # fmt: skip
"""Special methods that are not followed; all others may run without being named (`config.rate` in `__getattr__`)."""


_BY_STRING = frozenset({"getattr", "vars", "__dict__", "__getattribute__"})
"""Code with these names may look attributes up by strings."""


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
        self._own: frozenset[int] = frozenset()
        self._seen: dict[int, Any] = {}  # keeps what was met alive, so that no id is used twice
        self._names: set[str] = {"forward", "__call__"}
        self._objects: list[tuple[Any, str]] = []
        self._taken: set[tuple[int, str]] = set()
        self._value(module, "")
        self._own = frozenset(self.modules)
        for root in roots:
            self._value(root, "")
        known = -1
        while known != len(self._names) + len(self._objects):  # code found in objects has names of its own
            known = len(self._names) + len(self._objects)
            for held, name in list(self._objects):
                self._attributes(held, name)

    @property
    def generators(self) -> list[Any]:
        """Python's and numpy's generators of random numbers that were met."""
        return [value for value in self._seen.values() if random_state(value) is not None]

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
        elif isinstance(value, list | tuple | set | frozenset | deque):
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
            if self._own:  # not the model's own, whose tensors are the state's: a teacher, perhaps
                self.places += (Place(inner._parameters, None, name), Place(inner._buffers, None, name))
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
        globals_, attributes, modules = _names(function.__code__)
        self._names |= attributes
        for imported in modules & sys.modules.keys():
            self._value(sys.modules[imported], imported)
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
                for key in _looked_up(kind, self._names) if _is_followed(kind) else ():
                    self._take(kind, vars(kind), key, f"{kind.__name__}.{key}")

    def _take(self, owner: object, space: Mapping[str, Any], key: str, name: str) -> None:
        if (id(owner), key) in self._taken:
            return
        self._taken.add((id(owner), key))
        value = space[key]
        if not isinstance(value, types.ModuleType | types.BuiltinFunctionType):
            self.places.append(Place(space, (key,), name))
        self._value(value, name)


def random_state(value: Any) -> str | None:
    """The state of one of Python's or numpy's generators of random numbers, to be compared; None for other values."""
    if isinstance(value, random.Random):
        return None if isinstance(value, random.SystemRandom) else repr(value.getstate())  # that one has no state
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        return repr(value.bit_generator.state)
    return repr(value.get_state(legacy=False)) if isinstance(value, numpy.random.RandomState) else None


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


def _looked_up(kind: type, names: set[str]) -> set[str]:
    """What of a class may be looked up: what has one of the names, and special methods."""
    special = {
        key
        for key, value in vars(kind).items()
        if key.startswith("__") and isinstance(value, types.FunctionType) and key not in _NOT_IN_A_FORWARD
    }
    return names & vars(kind).keys() | special


class _Slots(Mapping[str, Any]):
    """The attributes of an object that keeps them in slots."""

    def __init__(self, held: Any) -> None:
        self._held = held
        declared = (vars(kind).get("__slots__", ()) for kind in type(held).__mro__)
        self._names = {name for names in declared for name in ((names,) if isinstance(names, str) else names)}

    def __getitem__(self, key: str) -> Any:
        if key not in self._names:
            raise KeyError(key)
        try:
            return getattr(self._held, key)
        except AttributeError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _namespace(held: Any) -> Mapping[str, Any]:
    """An object's own attributes."""
    try:
        namespace: Mapping[str, Any] = vars(held)
    except TypeError:
        return _Slots(held)
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


class _Names(NamedTuple):
    """What code, and functions defined in it, look up: in its module, as attributes of anything, and by import."""

    globals: frozenset[str]
    attributes: frozenset[str]
    modules: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> _Names:
    globals_: set[str] = set()
    attributes: set[str] = set()
    modules: set[str] = set()
    pending = [code]
    for each in pending:  # grows while it is walked
        for instruction in dis.get_instructions(each):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                globals_.add(instruction.argval)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
                attributes.add(instruction.argval)
            elif instruction.opname == "IMPORT_NAME":
                modules.add(instruction.argval)
        if _BY_STRING.intersection(each.co_names):
            attributes |= {const for const in each.co_consts if isinstance(const, str) and const.isidentifier()}
        pending += (const for const in each.co_consts if isinstance(const, types.CodeType))
    return _Names(frozenset(globals_), frozenset(attributes), frozenset(modules))
