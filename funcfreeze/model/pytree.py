"""Paths of a pytree's leaves: its keys joined by dots, whatever the containers are."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import optree


def flatten_by_path(tree: Any) -> tuple[tuple[str, ...], list[Any], optree.PyTreeSpec]:
    """The paths of a pytree's leaves, the leaves (None is one), and the structure to unflatten them with.

    Raises:
        ValueError: two leaves have the same path.

    >>> flatten_by_path({"enc": [1, 2], "head": None})[:2]
    (('enc.0', 'enc.1', 'head'), [1, 2, None])
    >>> flatten_by_path({"enc": [1], "enc.0": 2})
    Traceback (most recent call last):
        ...
    ValueError: two leaves of one pytree have the path 'enc.0'; rename a key
    """
    leaves, structure = optree.tree_flatten(tree, none_is_leaf=True)
    return _paths(structure), leaves, structure


@lru_cache(maxsize=256)
def _paths(structure: optree.PyTreeSpec) -> tuple[str, ...]:
    paths = tuple(".".join(_key(entry) for entry in accessor) for accessor in structure.accessors())
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"two leaves of one pytree have the path {path!r}; rename a key")
        seen.add(path)
    return paths


def _key(entry: optree.PyTreeEntry) -> str:
    """A dict's key, a sequence's index, the name of a field."""
    if isinstance(entry, optree.NamedTupleEntry):
        return entry.field
    if isinstance(entry, optree.GetAttrEntry):
        return entry.name
    return str(entry.entry)
