"""Values as JSON with the tensors taken out: what a checkpoint can hold, with nothing in it that could run.

Tensors are named by where they are, `optimizer/encoder.weight/exp_avg`. Tuples, bytes, and dicts with keys that are no
strings, in the names of which these are counted, are marked by a key that begins with `$`.
"""

from __future__ import annotations

import base64
import copy
import sys
from collections import deque
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

_TENSOR, _TUPLE, _BYTES, _ITEMS = "$tensor", "$tuple", "$bytes", "$items"
_MARKS = frozenset({_TENSOR, _TUPLE, _BYTES, _ITEMS})

_BITS = 10_000
"""Of larger numbers Python makes no text."""


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON.

    Args:
        value: dicts, lists, tuples, deques, strings, bytes, numbers, None and tensors.
        name: what it is called.
        tensors: gets the tensors in it, by name.

    Raises:
        TypeError: naming everything in it that is no such value.

    >>> import torch
    >>> found = {}
    >>> packed({"w": torch.zeros(2), "at": (1, None)}, "extra", found)
    {'w': {'$tensor': 'extra/w'}, 'at': {'$tuple': [1, None]}}
    >>> found
    {'extra/w': tensor([0., 0.])}
    """
    others: list[str] = []
    made = _packed(value, name, tensors, others)
    if others:
        raise TypeError(
            f"a checkpoint holds plain data (dicts, lists, tuples, strings, bytes, numbers, None, tensors); not "
            f"{', '.join(others)}"
        )
    return made


def _packed(value: Any, name: str, tensors: dict[str, Tensor], others: list[str]) -> Any:
    if value is None or type(value) in (bool, float, str) or (type(value) is int and value.bit_length() < _BITS):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, list | deque):
        return [_packed(part, f"{name}/{index}", tensors, others) for index, part in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(part, f"{name}/{index}", tensors, others) for index, part in enumerate(value)]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            parts = {key: _packed(part, _below(name, key), tensors, others) for key, part in value.items()}
            return {_ITEMS: [[key, part] for key, part in parts.items()]} if _MARKS & value.keys() else parts
        if all(type(key) in (bool, int, float, str) for key in value):
            items = enumerate(value.items())
            return {_ITEMS: [[key, _packed(part, f"{name}/{at}", tensors, others)] for at, (key, part) in items]}
        kinds = sorted({type(key).__name__ for key in value} - {"bool", "int", "float", "str"})
        others.append(f"{_dotted(name)} ({type(value).__name__} with keys that are {', '.join(kinds)})")
        return None
    if _is_numpys_number(value):
        return value.item()
    others.append(f"{_dotted(name)} ({type(value).__name__})")
    return None


def _is_numpys_number(value: Any) -> bool:
    """One that Python has, too: no `longdouble`."""
    numpy = sys.modules.get("numpy")
    plain = numpy is not None and isinstance(value, numpy.number | numpy.bool_ | numpy.str_)
    return plain and type(value.item()) in (bool, int, float, str)


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _below(name: str, key: str) -> str:
    return f"{name}/{key.replace('~', '~0').replace('/', '~1')}"


def plainly(name: str) -> str:
    """A key that is a part of a name, as it was: that of a parameter `a/b` is `a~1b` there.

    >>> plainly("a~1b~01.weight")
    'a/b~1.weight'
    """
    return name.replace("~1", "/").replace("~0", "~")


def unpacked(made: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `packed` made this of; what was a named tuple is a plain one, a deque a list, a mapping a dict.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(made, list):
        return [unpacked(part, tensors) for part in made]
    if not isinstance(made, dict):
        return made
    if len(made) == 1:
        ((key, inside),) = made.items()
        if key == _TENSOR:
            return tensors[inside]
        if key == _TUPLE:
            return tuple(unpacked(part, tensors) for part in inside)
        if key == _BYTES:
            return base64.b64decode(inside)
        if key == _ITEMS:
            return {key: unpacked(part, tensors) for key, part in inside}
    return {key: unpacked(part, tensors) for key, part in made.items()}


def in_form_of(wanted: Any, value: Any) -> Any:
    """A value with named tuples, deques and kinds of dicts where these are in the same place of another."""
    if isinstance(wanted, Mapping) and isinstance(value, dict):
        parts = {key: in_form_of(wanted[key], part) if key in wanted else part for key, part in value.items()}
        return _filled(wanted, parts) if isinstance(wanted, MutableMapping) else parts
    if isinstance(wanted, deque) and isinstance(value, list):
        ends = [in_form_of(one, other) for one, other in zip(wanted, value, strict=False)]
        return deque([*ends, *value[len(ends) :]], maxlen=wanted.maxlen)
    if isinstance(wanted, list) and isinstance(value, list) and len(wanted) == len(value):
        return [in_form_of(one, other) for one, other in zip(wanted, value, strict=True)]
    if isinstance(wanted, tuple) and isinstance(value, tuple) and len(wanted) == len(value):
        inside = [in_form_of(one, other) for one, other in zip(wanted, value, strict=True)]
        return tuple(inside) if type(wanted) is tuple else type(wanted)(*inside)
    return value


def _filled(wanted: MutableMapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """Such a mapping of these parts: an `OrderedDict`, a `defaultdict` with its factory."""
    if type(wanted) is dict:
        return parts
    made = copy.copy(wanted)
    made.clear()
    made.update(parts)
    return made
