"""Containers of every kind that people return from `losses` or hand to a step, each made of two values."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

Point = namedtuple("Point", "x y")


class Named(NamedTuple):
    one: Any
    two: Any


@dataclasses.dataclass
class Plain:
    one: Any
    two: Any
    note: str = "kept"


@dataclasses.dataclass(frozen=True)
class Frozen:
    one: Any
    inner: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    one: Any
    two: Any


@dataclasses.dataclass
class Derived:
    """A dataclass whose `__init__` must not run again, and with an attribute that is no field."""

    one: Any
    made: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        self.made += 1
        self.beside = {"two": None}


class Own(Mapping):
    """A mapping by hand."""

    def __init__(self, data):
        self._data = data

    def __getitem__(self, key):
        return self._data[key]

    def __iter__(self):
        return iter(self._data)

    def __len__(self):
        return len(self._data)


class Hidden(MutableMapping):
    """A mapping whose data are in a slot with a private name."""

    __slots__ = ("__data",)

    def __init__(self, data):
        self.__data = data

    def __getitem__(self, key):
        return self.__data[key]

    def __setitem__(self, key, value):
        raise AssertionError("written to")

    def __delitem__(self, key):
        raise AssertionError("written to")

    def __iter__(self):
        return iter(self.__data)

    def __len__(self):
        return len(self.__data)


class Items(dict):
    """A dict with attributes."""

    def __init__(self, items, beside):
        super().__init__(items)
        self.beside = beside

    def __setitem__(self, key, value):
        raise AssertionError("written to")


class Ordered(OrderedDict):
    pass


class Rows(list):
    pass


class Pair(tuple):
    __slots__ = ()


def derived(one, two):
    made = Derived(one)
    made.beside["two"] = two
    return made


def moved(one, two):
    made = Ordered(b=one, a=two)
    made.move_to_end("b")
    return made


CONTAINERS = {
    "dict": lambda one, two: {"b": one, "a": two},
    "nested lists": lambda one, two: [[one, [two]], "text", 3, None],
    "tuple": lambda one, two: (one, (two,)),
    "namedtuple": lambda one, two: Point(one, {"y": two}),
    "NamedTuple": lambda one, two: Named(one, two),
    "OrderedDict": lambda one, two: OrderedDict(b=one, a=two),
    "defaultdict": lambda one, two: defaultdict(list, {"b": one, "a": two}),
    "deque": lambda one, two: deque([one, two], maxlen=5),
    "dataclass": lambda one, two: Plain(one, [two]),
    "frozen dataclasses": lambda one, two: Frozen(one, Frozen(two, {"deep": [two]})),
    "dataclass with slots": lambda one, two: Slotted(one, two),
    "dataclass with more": derived,
    "UserDict": lambda one, two: UserDict(b=one, a=[two]),
    "mapping by hand": lambda one, two: Own({"b": one, "a": {"c": two}}),
    "mapping with slots": lambda one, two: Hidden({"b": one, "a": two}),
    "mappingproxy": lambda one, two: types.MappingProxyType({"b": one, "a": two}),
    "namespace": lambda one, two: types.SimpleNamespace(one=one, two=[two]),
    "dict with attributes": lambda one, two: Items({"b": one}, {"two": two}),
    "OrderedDict of one's own": moved,
    "list of one's own": lambda one, two: Rows([one, Rows([two])]),
    "tuple of one's own": lambda one, two: Pair([one, two]),
    "everything in everything": lambda one, two: [Plain(UserDict(a=Point(one, Own({"c": Slotted(two, one)}))), None)],
}
"""Name -> how to make one of two values. Each holds both, somewhere."""


def held(value: Any) -> list[Any]:
    """All that is in a container, found by other means than the library's: as `vars`, iteration and slots give it."""
    if isinstance(value, Mapping):
        beside = list(vars(value).values()) if isinstance(value, Items) else []
        return [inner for item in [*value.values(), *beside] for inner in held(item)]
    if isinstance(value, Slotted):
        return [*held(value.one), *held(value.two)]
    if isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value):
        return [inner for item in vars(value).values() for inner in held(item)]
    if isinstance(value, list | tuple | deque):
        return [inner for item in value for inner in held(item)]
    return [value]


def kinds(value: Any) -> list[type]:
    """The types of a container and of all those in it, in the order of `held`."""
    if isinstance(value, Mapping):
        inside = [*value.values(), *(vars(value).values() if isinstance(value, Items) else [])]
    elif isinstance(value, Slotted):
        inside = [value.one, value.two]
    elif isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value):
        inside = [*vars(value).values()]
    elif isinstance(value, list | tuple | deque):
        inside = [*value]
    else:
        return [type(value)]
    return [type(value), *(kind for item in inside for kind in kinds(item))]
