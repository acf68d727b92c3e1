"""Twins of parts of a model: real modules, copied once, each of whose tensors knows which of the model's it follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from funcfreeze.model.copying import copy_of
from funcfreeze.model.sites import clear_modules, grouped, present


@dataclass(frozen=True, eq=False)
class Twin:
    """A copy of a part of a model, whose parameters do not require grad.

    Attributes:
        module: the copy.
        pairs: every part of the original, as it was when it was copied, with its copy.
        parameters: path in the copy -> path in the model of the parameter that it follows.
        buffers: the same for buffers.

    >>> net = nn.ModuleDict({"online": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    >>> twin = Twin.of(net, "online")
    >>> twin.parameters
    {'weight': 'online.weight', 'bias': 'online.bias'}
    >>> twin.module.weight is net["online"].weight, twin.module.weight.requires_grad
    (False, False)
    """

    module: nn.Module
    pairs: tuple[tuple[nn.Module, nn.Module], ...]
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]

    @staticmethod
    def of(model: nn.Module, path: str) -> Twin:
        """Copy the part at a path of a model that has one there; "*" is the model itself."""
        original = model if path == "*" else clear_modules(model)[path]
        module = copy_of(original)
        module.requires_grad_(False)
        _share_memory(original, module)
        return Twin(
            module,
            tuple(zip(original.modules(), module.modules(), strict=True)),
            _followed(model, original, "_parameters"),
            _followed(model, original, "_buffers"),
        )

    def set_mode(self, mode: str | None) -> None:
        """Put the copy into train or eval mode; None is the original's, part by part."""
        for own, copied in self.pairs:
            training = own.training if mode is None else mode == "train"
            if copied.training is not training:  # a write would have a compiler look again
                vars(copied)["training"] = training

    @cached_property
    def followed(self) -> dict[str, str]:
        """Path in the copy -> path in the model, of parameters and buffers."""
        return {**self.parameters, **self.buffers}


def _share_memory(original: nn.Module, copied: nn.Module) -> None:
    """Have the copy's tensors in the original's memory: their values are a state's, and nobody reads these."""
    for store in ("_parameters", "_buffers"):
        for (_, own), (_, sites) in zip(grouped(original, store), grouped(copied, store), strict=True):
            present(sites[0], store).data = present(own[0], store).detach()


def _followed(model: nn.Module, part: nn.Module, store: str) -> dict[str, str]:
    """Path in a part of a model -> the path by which the whole model knows the tensor."""
    known = {id(present(sites[0], store)): names[0] for names, sites in grouped(model, store)}
    return {names[0]: known[id(present(sites[0], store))] for names, sites in grouped(part, store)}
