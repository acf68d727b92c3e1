"""The tensors that Dynamo sees in a module: one for each of the state's, at every call the same objects.

They are in the module while Dynamo guards, traces and runs, and only then. They have the memory of the state's tensors,
so what `losses` keeps of one is as live as a parameter kept by hand; and they require grad as the routes say, whatever
the module's own do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from funcfreeze.compile.layout import Listed
from funcfreeze.compile.problems import NotAsDeclared
from funcfreeze.computation.back_door import buffer_problem, parameter_problem
from funcfreeze.model.functional import FunctionalModule


class StandIns:
    """Stand-ins for the parameters and buffers of a state, and the dicts of the module's parts that hold them.

    Args:
        functional: the module.
        params: path -> the state's tensor.
        buffers: the same.
        grad: the paths of parameters that require grad.

    Attributes:
        own: path -> the module's own tensor; held, or an id could be another tensor's.
        places: id -> the path of a parameter or buffer, for stand-ins and the module's own tensors alike.
        exchanges: how often a stand-in was exchanged for another.
    """

    def __init__(
        self, functional: FunctionalModule, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], grad: Set[str]
    ) -> None:
        own = {**functional.present_parameters(), **functional.present_buffers()}
        self.own = own
        self._memories = _by_address(own)
        self.tensors: dict[str, Tensor] = {
            path: nn.Parameter(tensor.detach(), requires_grad=path in grad) for path, tensor in params.items()
        } | {path: tensor.detach() for path, tensor in buffers.items()}
        self.places = {id(tensor): path for held in (own, self.tensors) for path, tensor in held.items()}
        self._source: list[Tensor] = [*params.values(), *buffers.values()]
        self._functional = functional
        self._parts = self._made()
        self._own_stores = [held for *_, held in self._parts]
        self._present = self._there(self._own_stores)
        self._buffer_sites = [
            (path, module.__dict__, name) for path, places in functional.buffers.items() for module, name in places
        ]
        self.exchanges = 0

    def _made(self) -> list[tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]]:
        """Of every part of the module: its dict, the name of a store in that, ours for it and its own."""
        at = {
            (id(module), name): self.tensors[path]
            for sites in (self._functional.parameters, self._functional.buffers)
            for path, places in sites.items()
            for module, name in places
        }
        return [
            (module.__dict__, store, {name: at.get((id(module), name), kept) for name, kept in held.items()}, held)
            for module in self._functional.modules
            for store in ("_parameters", "_buffers")
            if (held := module.__dict__[store])
        ]

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Take the memory of these tensors, a state's parameters and buffers."""
        if all(map(is_, tensors, self._source)):
            return
        for stand_in, tensor in zip(self.tensors.values(), tensors, strict=True):
            stand_in.data = tensor
        self._source = [*tensors]

    def look_again(self) -> None:
        """Note where the module's own tensors are now: `model.to(...)` moves them."""
        self._memories = _by_address(self.own)

    def misuse(self, tensors: Sequence[Any], state: Listed, changing: frozenset[str]) -> list[str]:
        """What is wrong with tensors that came by another way than the module: those in its own memory are old.

        Args:
            tensors: what came, numbers among them.
            state: whose memory may be the module's, too.
            changing: the paths of parameters, and of the buffers that change.
        """
        found = []
        for tensor in tensors:
            path = self._own_path(tensor) if isinstance(tensor, Tensor) and not state.shares(tensor) else None
            if path in changing:
                is_buffer = path in state.layout.buffers
                found.append(buffer_problem(path) if is_buffer else parameter_problem(path, ()))
        return found

    def _own_path(self, tensor: Tensor) -> str | None:
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        memory = tensor.untyped_storage().data_ptr()
        path = self._memories.get(memory)
        # the module's tensors may have moved since, and others be where they were
        is_there = path is not None and self.own[path].untyped_storage().data_ptr() == memory
        return path if is_there else None

    @staticmethod
    def _there(stores: Sequence[Mapping[str, Any]]) -> list[bool]:
        """For all that stores may hold, whether it is there."""
        return [tensor is not None for store in stores for tensor in store.values()]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the module holds the stand-ins.

        Raises:
            NotAsDeclared: it has other parameters or buffers than when the Step was built.
        """
        if self._there(self._own_stores) != self._present:
            raise NotAsDeclared  # parts have other parameters or buffers now
        try:
            for part, store, ours, _ in self._parts:
                part[store] = ours
            yield
        finally:
            for part, store, _, own in self._parts:
                part[store] = own

    def reassigned(self) -> dict[str, Tensor]:
        """The buffers that a call put in the place of stand-ins; asked while these are held.

        Whoever kept the tensor that was there has its value for good; another stands in from now on.
        """
        found = {}
        for path, part, name in self._buffer_sites:
            now = part["_buffers"].get(name)
            if now is not self.tensors[path] and now is not None:
                found[path] = now
        for path in found:
            before, fresh = self.tensors[path], self.tensors[path].detach()
            before.data = before.clone()
            self.tensors[path] = fresh
            self.places[id(fresh)] = self.places.pop(id(before))
            self.exchanges += 1
        for path, part, name in self._buffer_sites if found else ():
            if path in found:
                part["_buffers"][name] = self.tensors[path]
        return found

    def problems(self) -> list[str]:
        """What a call did to the set of parameters and buffers, which is undone; asked while stand-ins are held."""
        found = [*self._functional.problems_with_new_ones()]
        stores = [ours for _, _, ours, _ in self._parts]
        if not found and self._there(stores) != self._present:
            found = ["the forward removed a parameter or a buffer, or set it to None; give it a value instead"]
        if found:
            self._parts = self._made()
        return found


def _by_address(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    return {
        tensor.untyped_storage().data_ptr(): path
        for path, tensor in tensors.items()
        if tensor.layout is torch.strided and tensor.numel()
    }
