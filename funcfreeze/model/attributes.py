"""What a forward leaves on its modules as plain Python attributes: hidden states, counters, auxiliary losses."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from funcfreeze.model.wrappers import beneath

_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""Parameters, buffers, submodules, hooks: what every module has."""

_SEQUENCES = (list, deque)
_MAPPINGS = (dict, OrderedDict, defaultdict)
_CONTAINERS = (tuple, *_SEQUENCES, *_MAPPINGS)


_HOLDS_NOTHING = frozenset({bool, int, float, str, type(None)})

MANY = 1_000
"""Containers of more entries than this are not looked into: a vocabulary or a replay memory, at every step."""


def attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without what every module has."""
    own = vars(module)
    return {name: own[name] for name in own.keys() - _OF_TORCH}


def nodes_made() -> int:
    """How many nodes of autograd graphs this thread has made so far; private to torch, which has no public count."""
    return int(torch._C._autograd._get_sequence_nr())


def let_go_of_graphs(modules: Iterable[nn.Module], since: int) -> None:
    """Detach the tensors that modules keep of a graph made since then: it has been used up, and would be kept alive.

    Lists and dicts of Python's own are looked into, up to `MANY` entries, and stay the same objects.

    Args:
        modules: whose attributes to look at.
        since: what `nodes_made` said before the graph was made; what hangs on older nodes is not a step's to cut off.
    """
    seen: set[int] = set()
    for module in modules:
        own = vars(module)
        for name in own.keys() - _OF_TORCH:
            value = own[name]
            kind = type(value)
            if kind not in _HOLDS_NOTHING and not (kind is tuple and _HOLDS_NOTHING.issuperset(map(type, value))):
                kept = _detached(value, since, seen)
                if kept is not value:
                    own[name] = kept


def _detached(value: Any, since: int, seen: set[int]) -> Any:
    """The value, detached where it is a tensor with such a graph; containers keep their identity, tuples cannot."""
    if isinstance(value, Tensor):
        plain = beneath(value)  # what was computed inside of torch.func is still wrapped
        node = plain.grad_fn
        return plain if node is None or node._sequence_nr() < since else plain.detach()
    kind = type(value)
    if kind not in _CONTAINERS or not 0 < len(value) <= MANY or id(value) in seen:
        return value
    if kind is tuple:
        parts = [_detached(part, since, seen) for part in value]
        return value if all(map(is_, parts, value)) else tuple(parts)
    seen.add(id(value))
    for key, part in list(value.items() if kind in _MAPPINGS else enumerate(value)):
        kept = part if type(part) in _HOLDS_NOTHING else _detached(part, since, seen)
        if kept is not part:
            value[key] = kept
    return value


@contextmanager
def attributes_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Leave these modules' attributes as they were: what they are bound to, what lists, dicts and sets hold, the
    values of tensors, the state of generators. Objects of other classes are not looked into.
    """
    undo: list[Callable[[], None]] = []
    seen: dict[int, Any] = {}
    before = [attributes(inner) for inner in modules]
    for values in before:
        for value in values.values():
            _remember(value, undo, seen)
    try:
        yield
    finally:
        for inner, values in zip(modules, before, strict=True):
            own = vars(inner)
            for name in attributes(inner).keys() - values.keys():
                del own[name]
            own.update(values)
        for restore in undo:
            restore()


def _remember(value: Any, undo: list[Callable[[], None]], seen: dict[int, Any]) -> None:
    """Note how to make a value what it is now."""
    kind = type(value)
    known = isinstance(value, Tensor | torch.Generator) or kind in (tuple, set, *_MAPPINGS, *_SEQUENCES)
    if id(value) in seen or not known:
        return
    seen[id(value)] = value
    if isinstance(value, Tensor):
        undo.append(_restorer_of_tensor(value))
        return
    if isinstance(value, torch.Generator):
        undo.append(_restorer_of_generator(value))
        return
    if kind is not tuple:
        undo.append(_restorer(value, kind is set or kind in _MAPPINGS))
    for part in list(value.values() if kind in _MAPPINGS else value):
        _remember(part, undo, seen)


def _restorer(container: Any, by_update: bool) -> Callable[[], None]:
    before = container.copy()

    def restore() -> None:
        container.clear()
        (container.update if by_update else container.extend)(before)

    return restore


def _restorer_of_generator(generator: torch.Generator) -> Callable[[], None]:
    before = generator.get_state()

    def restore() -> None:
        generator.set_state(before)

    return restore


def _restorer_of_tensor(tensor: Tensor) -> Callable[[], None]:
    copy, version = tensor.detach().clone(), tensor._version

    def restore() -> None:
        if tensor._version != version:
            with torch.no_grad():
                tensor.detach().copy_(copy)

    return restore


@contextmanager
def flags_kept(module: nn.Module) -> Iterator[None]:
    """Leave every module in train or eval mode as it was."""
    flags = [(inner, inner.training) for inner in module.modules()]
    try:
        yield
    finally:
        for inner, training in flags:
            inner.training = training
