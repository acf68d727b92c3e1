"""Tensors by path in which a tied one answers to all of its names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import optree
import torch.utils._pytree as torch_pytree  # private, but vmap and functional_call know containers by it alone
from optree import registry
from torch import Tensor

T = TypeVar("T")
M = TypeVar("M", bound=Mapping[str, Tensor])


class Tied(dict[str, Tensor]):
    """A dict by path that is also asked by other names: iterating, `len` and `==` know each tensor by its first.

    A plain dict but for a key that is not there, so looking up a path costs nothing. A pytree in optree and in torch.
    Files hold it as an ordered dict, which `torch.load` takes without any code of this library.

    >>> import torch
    >>> weight = torch.zeros(2)
    >>> params = tied({"actor.weight": weight}, {"critic.weight": "actor.weight"})
    >>> params["critic.weight"] is weight, "critic.weight" in params, list(params)
    (True, True, ['actor.weight'])
    >>> optree.tree_map(lambda tensor: tensor + 1, params)["critic.weight"]
    tensor([1., 1.])
    """

    __slots__ = ("aliases",)
    aliases: Mapping[str, str]

    def __missing__(self, name: str) -> Tensor:
        if name not in self.aliases:
            raise KeyError(name)
        return self[self.aliases[name]]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (name in self.aliases and super().__contains__(self.aliases[str(name)]))

    @overload
    def get(self, name: str, default: None = None, /) -> Tensor | None: ...
    @overload
    def get(self, name: str, default: Tensor, /) -> Tensor: ...
    @overload
    def get(self, name: str, default: T, /) -> Tensor | T: ...
    def get(self, name: str, default: Any = None, /) -> Any:
        first = name if super().__contains__(name) else self.aliases.get(name, name)
        return super().get(first, default)

    def __or__(self, other: Mapping[str, Any]) -> Any:  # type: ignore[override]  # a dict's has a form for other types
        return tied({**self, **{self.aliases.get(name, name): tensor for name, tensor in other.items()}}, self.aliases)

    def copy(self) -> Tied:
        return _tied(self, self.aliases)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Tied:
        return _tied({name: deepcopy(tensor, memo) for name, tensor in self.items()}, self.aliases)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())


def _tied(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> Tied:
    made = Tied(tensors)
    made.aliases = aliases
    return made


def tied(tensors: M, aliases: Mapping[str, str]) -> M | Tied:
    """The tensors, found by their aliases (other name -> path) too; just themselves where there are none."""
    return _tied(tensors, aliases) if aliases else tensors


def aliases_of(tensors: Mapping[str, Tensor]) -> Mapping[str, str]:
    """Other name -> path; empty for a plain dict."""
    return tensors.aliases if isinstance(tensors, Tied) else {}


def by_first_names(given: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What replaces tensors, by the paths that those have, from a mapping that may use their other names.

    Where two names of one tensor are given, the one with a new tensor counts: the other says what was there before.

    Raises:
        ValueError: two names of one tensor, with different new ones.

    >>> import torch
    >>> before = tied({"a": torch.zeros(1)}, {"b": "a"})
    >>> by_first_names({**before, "b": torch.ones(1)}, before)["a"]
    tensor([1.])
    >>> by_first_names({"a": torch.ones(1), "b": torch.ones(1)}, before)
    Traceback (most recent call last):
        ...
    ValueError: a and b are names of one tensor, and two different ones were given; give one, by either name
    """
    aliases = aliases_of(before)
    if not aliases:
        return given
    named: dict[str, dict[str, Tensor]] = {}
    for name, tensor in given.items():
        named.setdefault(aliases.get(name, name), {})[name] = tensor
    problems = []
    found = {}
    for path, tensors in named.items():
        new = {id(tensor): tensor for tensor in tensors.values() if tensor is not before.get(path)}
        found[path] = next(iter(new.values())) if new else before[path]
        if len(new) > 1:
            problems.append(
                f"{' and '.join(tensors)} are names of one tensor, and two different ones were given; give one, by "
                "either name"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return tied(found, aliases)


@dataclass(frozen=True)
class _Names:
    """What a pytree notes of a `Tied` beside its tensors, which are in the order of sorted paths, as a dict's are."""

    sorted: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...]
    paths: tuple[str, ...] = field(compare=False)


def _flatten(tensors: Tied) -> tuple[list[Tensor], _Names, tuple[str, ...]]:
    paths = tuple(sorted(tensors))
    names = _Names(paths, tuple(sorted(tensors.aliases.items())), tuple(tensors))
    return [tensors[path] for path in paths], names, paths


def _unflatten(names: _Names, tensors: Iterable[Tensor]) -> Tied:
    found = dict(zip(names.sorted, tensors, strict=True))
    return _tied({path: found[path] for path in names.paths}, dict(names.aliases))


optree.register_pytree_node(
    Tied,
    _flatten,  # type: ignore[arg-type]  # optree's stub wants its own protocols
    _unflatten,  # type: ignore[arg-type]
    path_entry_type=optree.MappingEntry,
    namespace=vars(registry)["__GLOBAL_NAMESPACE"],  # every namespace, as for a State
)
torch_pytree.register_pytree_node(
    Tied, lambda tensors: _flatten(tensors)[:2], lambda tensors, names: _unflatten(names, tensors)
)
