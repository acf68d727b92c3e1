"""A mapping of modules and parameters as one module."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from torch import nn

Model = nn.Module | Mapping[str, nn.Module | nn.Parameter]
"""What people have as a model: a module, or modules and bare parameters by name."""


class Parts(nn.Module):
    """What `nn.ModuleDict` is to modules, for modules and bare parameters: `model["actor"]`, `model["log_alpha"]`.

    >>> import torch
    >>> model = Parts({"actor": nn.Linear(2, 1), "log_alpha": nn.Parameter(torch.zeros(()))})
    >>> [path for path, _ in model.named_parameters()]
    ['log_alpha', 'actor.weight', 'actor.bias']
    >>> list(model), model["log_alpha"].shape
    (['actor', 'log_alpha'], torch.Size([]))
    """

    def __init__(self, parts: Mapping[str, nn.Module | nn.Parameter]) -> None:
        super().__init__()
        self._names = tuple(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def keys(self) -> KeysView[str]:
        """The names."""
        return dict.fromkeys(self._names).keys()

    def values(self) -> ValuesView[Any]:
        """The parts, in the order in which they were given."""
        return {name: self[name] for name in self._names}.values()

    def items(self) -> ItemsView[str, Any]:
        """The names with the parts."""
        return {name: self[name] for name in self._names}.items()
