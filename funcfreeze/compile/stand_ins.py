"""The tensors that Dynamo sees in a module: one for each of the state's, the same objects at every call.

They are in the module while Dynamo guards, traces and runs, and only then. They have the memory of the state's tensors,
so what `losses` keeps of one is as live as a parameter kept by hand; and they require grad as the routes say, whatever
the module's own do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import Tensor, nn

from funcfreeze.model.functional import FunctionalModule


class StandIns:
    """Stand-ins for the parameters and buffers of a state, and the dicts of the module's parts that hold them.

    Args:
        functional: the module.
        tensors: path -> the state's tensor, parameters and buffers.
        requires_grad: the paths of parameters that require grad.

    Attributes:
        places: id -> the path of a parameter or buffer, for stand-ins and the module's own tensors alike.
    """

    def __init__(
        self, functional: FunctionalModule, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], grad: Any
    ) -> None:
        own = {**functional.present_parameters(), **functional.present_buffers()}
        self._own = own  # held, or an id could be another tensor's
        self.tensors: dict[str, Tensor] = {
            path: nn.Parameter(tensor.detach(), requires_grad=path in grad) for path, tensor in params.items()
        } | {path: tensor.detach() for path, tensor in buffers.items()}
        self.places = {id(tensor): path for held in (own, self.tensors) for path, tensor in held.items()}
        self._source: list[Tensor] = [*params.values(), *buffers.values()]
        at = {
            (id(module), name): self.tensors[path]
            for sites in (functional.parameters, functional.buffers)
            for path, places in sites.items()
            for module, name in places
        }
        self._parts = [
            (module.__dict__, store, {name: at.get((id(module), name), kept) for name, kept in held.items()})
            for module in functional.modules
            for store in ("_parameters", "_buffers")
            if (held := module.__dict__[store])
        ]
        self._buffer_sites = [
            (path, module.__dict__, name) for path, places in functional.buffers.items() for module, name in places[:1]
        ]

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Take the memory of these tensors, a state's parameters and buffers."""
        if all(map(is_, tensors, self._source)):
            return
        for stand_in, tensor in zip(self.tensors.values(), tensors, strict=True):
            stand_in.data = tensor
        self._source = [*tensors]

    def parameter_hooks(self) -> list[tuple[str, Callable[[Tensor], Tensor | None]]]:
        """The hooks on the module's own parameters."""
        return [(path, hook) for path, own in self._own.items() for hook in (own._backward_hooks or {}).values()]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the module holds the stand-ins."""
        kept = [part[store] for part, store, _ in self._parts]
        try:
            for part, store, ours in self._parts:
                part[store] = ours
            yield
        finally:
            for (part, store, _), before in zip(self._parts, kept, strict=True):
                part[store] = before

    def reassigned(self) -> dict[str, Tensor]:
        """The buffers that a call put in the place of stand-ins, which come back; asked while these are held."""
        found = {}
        for path, part, name in self._buffer_sites:
            now = part["_buffers"].get(name)
            if now is not self.tensors[path]:
                found[path] = now
                part["_buffers"][name] = self.tensors[path]
        return found
