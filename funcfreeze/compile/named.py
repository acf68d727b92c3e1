"""What code names, followed from functions of the user's: how they come to numbers that no tensor holds.

That is: its closure, its globals, the attributes of these and of its own object, of modules and of classes, and the
functions of the user's that it calls so. Lists, dicts and tuples are looked into. No code of the user's is run.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import sysconfig
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcfreeze.merge.rule import Rule
from funcfreeze.model.attributes import MANY
from funcfreeze.optim import Transform

_NOT_THE_USERS = frozenset({"funcfreeze", "numpy", "optree", "scipy", "torch", "torchjd"})
"""Packages whose functions do not change what they compute from step to step, beside Python's own."""

_VALUES = frozenset(
    {bool, int, float, complex, str, bytes, type(None), itertools.count, torch.dtype, torch.device, torch.Size}
)
"""Kinds that show all that they are."""

_CONTAINERS = (tuple, list, dict)


class Reading(NamedTuple):
    """Something that is read.

    Attributes:
        where: in words.
        value: what it is; equal if nothing changed.
    """

    where: str
    value: Any


class _Same:
    """Equal to what stands for the very same tensor, which it does not keep alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        tensor = self._tensor()
        return tensor is not None and isinstance(other, _Same) and other._tensor() is tensor


def transforms_within(held: Any) -> list[Callable[..., Any]]:
    """The functions of transforms of the user's among those that a transform was made of, and its own."""
    return [*_updates(held, set())]


def _updates(held: Any, seen: set[int]) -> Iterator[Callable[..., Any]]:
    if id(held) in seen:
        return
    seen.add(id(held))
    if type(held) is Transform:
        for function in (held.update, held.in_place):
            if function is not None and _is_the_users(function):
                yield function
            yield from _updates(function, seen)
    elif type(held) is FunctionType and not _is_the_users(held):
        yield from _updates([*_cells(held).values()], seen)
    elif type(held) in (tuple, list):
        for part in held:
            yield from _updates(part, seen)
    elif type(held) is dict:
        yield from _updates([*held.values()], seen)


class Walk:
    """Follows what functions name.

    Attributes:
        found: what they read.
        undo: how to bring it back.
    """

    def __init__(self) -> None:
        self.found: list[Reading] = []
        self.undo: list[Callable[[], None]] = []
        self._called: set[tuple[int, int]] = set()
        self._held: set[tuple[int, frozenset[str]]] = set()

    def call(self, function: Any, owner: Any = None) -> None:
        """What a function reads when it is called, as a method of an owner."""
        kind = type(function)
        if kind is MethodType:
            self.call(function.__func__, function.__self__)
        elif kind is functools.partial:
            self.value("an argument of a partial", [*function.args, *function.keywords.values()], frozenset())
            self.call(function.func)
        elif kind is functools._lru_cache_wrapper:
            size = function.cache_info().currsize
            self.undo.append(lambda: None if function.cache_info().currsize == size else function.cache_clear())
            self.found.append(Reading(f"the cache of {function.__name__}", size))
            self.call(function.__wrapped__)
        elif kind is FunctionType:
            if (id(function), id(owner)) not in self._called:
                self._called.add((id(function), id(owner)))
                if _is_the_users(function):
                    self._function(function, owner)
                else:  # ours, perhaps around one of the user's
                    for update in transforms_within(function):
                        self.call(update)
        elif _is_the_users(kind):
            self.call(_in_class(kind, "forward" if issubclass(kind, nn.Module) else "__call__"), function)

    def _function(self, function: FunctionType, owner: Any) -> None:
        globals_, attributes, modules = _named_in(function.__code__)
        name = function.__name__
        for part, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._in_cell(f"{part} in {name}", cell, attributes)
        for part in sorted(globals_):
            self._in_dict(part, function.__globals__, part, attributes)
        for part in sorted(modules & sys.modules.keys()):
            self.value(part, sys.modules[part], attributes)
        for place, default in enumerate([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]):
            self.value(f"default {place} of {name}", default, attributes)
        for part in sorted(attributes & vars(function).keys()):
            self._in_dict(f"{name}.{part}", vars(function), part, attributes)
        if owner is not None:
            self._attributes(type(owner).__name__, owner, attributes)

    def _in_cell(self, where: str, cell: Any, attributes: frozenset[str]) -> None:
        try:
            held = cell.cell_contents
        except ValueError:  # it is still empty
            self.found.append(Reading(where, "nothing"))
            self.undo.append(lambda: _emptied(cell))
            return
        self.undo.append(lambda: setattr(cell, "cell_contents", held))
        self.value(where, held, attributes)

    def _in_dict(self, where: str, held: dict[str, Any], name: str, attributes: frozenset[str]) -> None:
        if name not in held:
            self.found.append(Reading(where, "nothing"))
            self.undo.append(lambda: held.pop(name, None))
            return
        value = held[name]
        self.undo.append(lambda: held.__setitem__(name, value))
        self.value(where, value, attributes)

    def value(self, where: str, value: Any, attributes: frozenset[str]) -> None:
        """What there is to read of something that is at hand, and of those of its attributes that code names."""
        kind = type(value)
        if kind in _VALUES:  # by what they look like, since NaN is not equal to itself
            self.found.append(Reading(where, (kind, value if kind in (str, bytes) else repr(value))))
        elif issubclass(kind, Tensor):
            self.found.append(Reading(where, _Same(value)))
        elif kind is Rule:
            self.call(value.decide)
        elif _is_numpys(kind):
            self.found.append(Reading(where, (kind, value.tobytes() if value.size <= MANY else value.shape)))
        elif issubclass(kind, _CONTAINERS):
            self._container(where, value, attributes)
            if kind not in _CONTAINERS:
                self._attributes(where, value, attributes)
        elif callable(value) and not issubclass(kind, type):
            self.call(value)
            self._attributes(where, value, attributes)
        else:
            self._attributes(where, value, attributes)

    def _container(self, where: str, value: Any, attributes: frozenset[str]) -> None:
        size = next(base for base in _CONTAINERS if issubclass(type(value), base)).__len__(value)
        self.found.append(Reading(where, (type(value), size)))
        key = id(value), attributes
        if size > MANY or key in self._held:
            return
        self._held.add(key)
        entries: list[tuple[Any, Any]]
        if issubclass(type(value), dict):
            entries = list(dict.items(value))
            self.undo.append(functools.partial(_refilled, value, entries))
        elif issubclass(type(value), list):
            entries = list(enumerate(list.__iter__(value)))
            self.undo.append(lambda: list.__setitem__(value, slice(None), [part for _, part in entries]))
        else:
            entries = list(enumerate(tuple.__iter__(value)))
        for place, (label, part) in enumerate(entries):
            shown = repr(label) if type(label) in (str, int) else f"entry {place}"
            self.value(f"{where}[{shown}]", part, attributes)

    def _attributes(self, where: str, value: Any, names: frozenset[str]) -> None:
        """Those of an object, a class or a module that code names, without running any code of theirs."""
        key = id(value), names
        if key in self._held or (type(value) is ModuleType and not _is_the_users(value)):
            return
        self._held.add(key)
        own = _dict_of(value)
        kind = value if issubclass(type(value), type) else type(value)
        for name in sorted(names):
            in_class = _in_class(kind, name)
            if name in own or (in_class is None and own is not _NOTHING and kind is not ModuleType):
                self._in_dict(f"{where}.{name}", own, name, names)
            elif in_class is not None:
                self._of_class(f"{where}.{name}", value, kind, in_class, names)
        self.call(_in_class(kind, "__getattr__"), value)

    def _of_class(self, where: str, value: Any, kind: type, held: Any, names: frozenset[str]) -> None:
        if isinstance(held, FunctionType):
            self.call(held, value)
        elif isinstance(held, property | functools.cached_property):
            self.call(held.fget if isinstance(held, property) else held.func, value)
        elif isinstance(held, staticmethod | classmethod):
            self.call(held.__func__, kind)
        elif type(held).__name__ == "member_descriptor":
            self._slot(where, value, held, names)
        else:
            self.value(where, held, names)

    def _slot(self, where: str, value: Any, slot: Any, names: frozenset[str]) -> None:
        try:
            held = slot.__get__(value)
        except AttributeError:
            self.found.append(Reading(where, "nothing"))
            return
        self.undo.append(lambda: slot.__set__(value, held))
        self.value(where, held, names)


@functools.lru_cache(maxsize=1024)
def _named_in(code: CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The globals, the attributes and the modules that code names, functions inside of it too."""
    found: dict[str, set[str]] = {"GLOBAL": set(), "ATTR": set(), "IMPORT": set()}
    for instruction in dis.get_instructions(code):
        operation = instruction.opname
        if operation in ("LOAD_GLOBAL", "STORE_GLOBAL"):
            found["GLOBAL"].add(instruction.argval)
        elif operation in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "LOAD_SUPER_ATTR"):
            found["ATTR"].add(instruction.argval)
        elif operation == "IMPORT_NAME":
            found["IMPORT"].add(instruction.argval)
        elif operation == "LOAD_CONST" and isinstance(instruction.argval, str) and instruction.argval.isidentifier():
            found["ATTR"].add(instruction.argval)  # getattr(config, "temperature")
    inside = [_named_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    globals_, attributes, modules = (
        frozenset(own).union(*(names[kind] for names in inside)) for kind, own in enumerate(found.values())
    )
    return globals_, attributes, modules


def _cells(function: FunctionType) -> Mapping[str, Any]:
    """What a function closes over; a cell that is still empty is left out."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _emptied(cell: Any) -> None:
    try:
        del cell.cell_contents
    except ValueError:
        return


_NOTHING: dict[str, Any] = {}


def _dict_of(value: Any) -> dict[str, Any]:
    """An object's own attributes, without asking the object."""
    if issubclass(type(value), type):
        return _NOTHING
    try:
        held = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return _NOTHING
    return held if type(held) is dict else _NOTHING


def _refilled(container: dict[Any, Any], entries: list[tuple[Any, Any]]) -> None:
    dict.clear(container)
    dict.update(container, entries)


def _is_numpys(kind: type) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and issubclass(kind, numpy.ndarray | numpy.generic)


def _in_class(kind: type, name: str) -> Any:
    """What a class of the user's, or one that it was made of, has by a name; None if none has."""
    for one in kind.__mro__:
        if name in vars(one):
            return vars(one)[name] if _is_the_users(one) else None
    return None


def _is_the_users(value: Any) -> bool:
    """Whether a function, a class or a module, or the class of anything else, is from a package of the user's."""
    kind = type(value)
    if kind is ModuleType:
        package = value.__name__
    elif kind is MethodType:
        return _is_the_users(value.__func__) or _is_the_users(type(value.__self__))
    elif kind is functools.partial:
        return _is_the_users(value.func)
    else:
        package = value.__module__ if kind is FunctionType or issubclass(kind, type) else kind.__module__
    return _is_a_package_of_the_users(str(package).partition(".")[0])


@functools.lru_cache(maxsize=1024)
def _is_a_package_of_the_users(name: str) -> bool:
    """Also of one that has the name of a module of Python's own, `trace.py`, and is another."""
    if name not in sys.stdlib_module_names:
        return name not in _NOT_THE_USERS
    origin = getattr(getattr(sys.modules.get(name), "__spec__", None), "origin", None)
    return origin is not None and origin.endswith(".py") and not origin.startswith(sysconfig.get_path("stdlib"))
