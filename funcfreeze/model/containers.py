"""Containers of every kind as their leaves and a structure: pytrees, and what people return beside those.

optree knows dicts, lists, tuples and what was registered with it; the rest are leaves to it. Opened here as well are
dataclasses, mappings that are no dicts (`UserDict`, a tokenizer's encoding), `SimpleNamespace`, and subclasses of
dict, list and tuple (a model's output in transformers). They are put together again as objects of the same type, from
their items and attributes, without running their `__init__`; what was given is never written to.
"""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn

LEAVES = frozenset({Tensor, nn.Parameter, int, float, bool, str, type(None)})
"""Types that are never opened and hold nothing: asked first, because nearly all leaves are of them."""

_HOLDS_NOTHING = (Tensor, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Structure(NamedTuple):
    """A tree but for its leaves. Compares by value.

    Attributes:
        spec: what optree knows of it.
        opened: the leaves of that which are containers: their position, type, and the structure of what they hold.
    """

    spec: optree.PyTreeSpec
    opened: tuple[tuple[int, type, Structure], ...]

    @property
    def num_leaves(self) -> int:
        """How many leaves there are."""
        return self.spec.num_leaves - len(self.opened) + sum(inner.num_leaves for _, _, inner in self.opened)

    def unflatten(self, leaves: Iterable[Any]) -> Any:
        """A tree of this structure, made of new containers."""
        return self._take(iter(leaves)) if self.opened else optree.tree_unflatten(self.spec, leaves)

    def names(self) -> list[str]:
        """Where each leaf is, as Python would write it behind the tree's name.

        >>> flatten({"a": [1, types.SimpleNamespace(b=2)]})[1].names()
        ["['a'][0]", "['a'][1].b"]
        """
        return list(self._names(_by_keys))

    def _names(self, shown: Callable[[tuple[Any, ...]], str]) -> Iterator[str]:
        known = {index: inner for index, _, inner in self.opened}
        for index, path in enumerate(self.spec.paths()):
            inside = known[index]._names(_by_parts) if index in known else [""]
            yield from (shown(path) + name for name in inside)

    def _take(self, leaves: Iterator[Any]) -> Any:
        known = {index: (kind, inner) for index, kind, inner in self.opened}
        outer = []
        for index in range(self.spec.num_leaves):
            kind, inner = known.get(index, (None, None))
            outer.append(next(leaves) if kind is None or inner is None else _closed(kind, **inner._take(leaves)))
        return optree.tree_unflatten(self.spec, outer)


def _by_keys(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path)


def _by_parts(path: tuple[Any, ...]) -> str:
    part, key, *keys = path
    return (f"[{key!r}]" if part == "items" else f".{key}") + _by_keys(tuple(keys))


def flatten(tree: Any, prepare: Callable[[Any], Any] | None = None) -> tuple[list[Any], Structure]:
    """The leaves of a tree (None is one), and its structure.

    Args:
        tree: any Python value.
        prepare: what to open in the place of each container that optree does not know, if not that itself.

    Raises:
        ValueError: a container holds itself.

    >>> from collections import UserDict
    >>> leaves, structure = flatten({"a": [1, None], "b": UserDict(c=types.SimpleNamespace(d=2))})
    >>> leaves
    [1, None, 2]
    >>> structure.unflatten("xyz")
    {'a': ['x', 'y'], 'b': {'c': namespace(d='z')}}
    """
    return _flatten(tree, prepare, ())


def _flatten(tree: Any, prepare: Callable[[Any], Any] | None, inside: tuple[int, ...]) -> tuple[list[Any], Structure]:
    outer, spec = optree.tree_flatten(tree, none_is_leaf=True)
    if LEAVES.issuperset(map(type, outer)):
        return outer, Structure(spec, ())
    leaves: list[Any] = []
    opened: list[tuple[int, type, Structure]] = []
    for index, leaf in enumerate(outer):
        if not opens(leaf):
            leaves.append(leaf)
            continue
        if id(leaf) in inside:
            raise ValueError(f"a {type(leaf).__name__} holds itself, so what is in it cannot be listed")
        parts = parts_of(leaf if prepare is None else prepare(leaf))
        held, structure = _flatten(parts, prepare, (*inside, id(leaf)))
        leaves += held
        opened.append((index, type(leaf), structure))
    return leaves, Structure(spec, tuple(opened))


_BASES = (object, dict, OrderedDict, list, tuple, types.SimpleNamespace, types.MappingProxyType)
_WRITTEN_IN_PYTHON = 1 << 9  # CPython's Py_TPFLAGS_HEAPTYPE


def _base(kind: type) -> type:
    """The type written in C that a class derives from."""
    return next(base for base in kind.__mro__ if not base.__flags__ & _WRITTEN_IN_PYTHON)


def opens(value: Any) -> bool:
    """Whether a leaf of optree's is a container to `flatten`."""
    if isinstance(value, _HOLDS_NOTHING) or (base := _base(type(value))) not in _BASES:
        return False
    if isinstance(value, (type, nn.Module)):
        return False
    return base is not object or dataclasses.is_dataclass(value) or isinstance(value, Mapping)


def parts_of(container: Any) -> dict[str, Any]:
    """The items of a dict, list or tuple, the attributes, and those in slots, as far as there are any."""
    base = _base(type(container))
    items: Any = None
    if base is OrderedDict:
        items = dict(OrderedDict.items(container))
    elif base is dict:
        items = dict(dict.items(container))
    elif base is types.MappingProxyType:
        items = dict(container)
    elif base is list or base is tuple:
        items = list(base.__iter__(container))
    parts = {"items": items, "variables": dict(_variables(container)), "slots": _slots(container)}
    return {name: held for name, held in parts.items() if held}


_NOTHING: Mapping[str, Any] = types.MappingProxyType({})


def _closed(
    kind: type, items: Any = (), variables: Mapping[str, Any] = _NOTHING, slots: Mapping[str, Any] = _NOTHING
) -> Any:
    """An object of that type which holds these parts."""
    base: Any = _base(kind)
    if base is types.MappingProxyType:
        return types.MappingProxyType(dict(items))
    made: Any = tuple.__new__(kind, items) if base is tuple else base.__new__(kind)
    if base is list:
        list.extend(made, items)
    elif base is dict or base is OrderedDict:
        for key, value in dict(items).items():
            base.__setitem__(made, key, value)
    _variables(made).update(variables)
    for name, value in slots.items():
        object.__setattr__(made, name, value)
    return made


def _variables(value: Any) -> dict[str, Any]:
    """The attributes in its `__dict__`, or an empty dict where it has none."""
    found: dict[str, Any] = getattr(value, "__dict__", {})
    return found


def _slots(value: Any) -> dict[str, Any]:
    """The attributes in its slots."""
    names = [
        f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        for base in type(value).__mro__
        for name in _listed(base.__dict__.get("__slots__", ()))
    ]
    found = {name: getattr(value, name, _UNSET) for name in names if name not in ("__dict__", "__weakref__")}
    return {name: kept for name, kept in found.items() if kept is not _UNSET}


_UNSET = object()


def _listed(slots: str | Iterable[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


_NOT_SEARCHED = (*_HOLDS_NOTHING, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
_DEPTH, _MOST = 4, 1000


def hidden_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the attributes of an object that is no container, with the names that lead there.

    A search, not an inventory: modules are left out, and it ends after four levels or a thousand objects.

    >>> from torch.distributions import Normal
    >>> [name for name, _ in hidden_tensors(Normal(torch.zeros(2), torch.ones(2)))]
    ['.loc', '.scale']
    """
    return islice(_search([("", value)]), _MOST)


def _search(level: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for _ in range(_DEPTH):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            if isinstance(value, _NOT_SEARCHED) or id(value) in seen or len(seen) > _MOST:
                continue
            seen.add(id(value))
            for inner, held in {**_variables(value), **_slots(value)}.items():
                paths, leaves, _ = optree.tree_flatten_with_path(held)
                below += [(f"{name}.{inner}{_by_keys(path)}", leaf) for path, leaf in zip(paths, leaves, strict=True)]
        yield from ((name, leaf) for name, leaf in below if isinstance(leaf, Tensor))
        level = [(name, leaf) for name, leaf in below if not isinstance(leaf, Tensor)]
