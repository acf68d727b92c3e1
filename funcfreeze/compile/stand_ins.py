"""The tensors that Dynamo sees in a module: one for each of the state's, at every call the same objects.

They are in the module while Dynamo guards, traces and runs, and only then. They have the memory of the state's tensors,
so what `losses` keeps of one is as live as a parameter kept by hand; and they require grad as the routes say, whatever
the module's own do.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from funcfreeze.compile.layout import Listed
from funcfreeze.compile.stores import Stores
from funcfreeze.computation.back_door import buffer_problem, parameter_problem
from funcfreeze.model.functional import FunctionalModule


class StandIns:
    """Stand-ins for the parameters and buffers of a state, and the dicts of the module's parts that hold them.

    Args:
        functional: the module.
        params: path -> the state's tensor.
        buffers: the same, with the twins' parameters among them.
        grad: the paths of parameters that require grad.

    Attributes:
        own: path -> the module's own tensor; held, or an id could be another tensor's.
        places: id -> the path of a parameter or buffer, for stand-ins and the module's own tensors alike.
        stores: what puts the stand-ins into the module, and takes them back.
        exchanges: how often a stand-in was exchanged for another.
    """

    def __init__(
        self, functional: FunctionalModule, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], grad: Set[str]
    ) -> None:
        constants = functional.present_constants()
        held = functional.present_buffers()
        own = {  # the twins first: they are in the memory of what they follow, which is known by its own name
            **constants,
            **{path: held[path] for path in held if path in functional.of_twins},
            **functional.present_parameters(),
            **{path: held[path] for path in held if path not in functional.of_twins},
        }
        self.own = own
        self._memories = _by_address(own)
        self.tensors: dict[str, Tensor] = {
            path: nn.Parameter(tensor.detach(), requires_grad=path in grad) for path, tensor in params.items()
        } | {
            path: nn.Parameter(tensor.detach(), requires_grad=False) if path in constants else tensor.detach()
            for path, tensor in buffers.items()
        }
        self.places = {id(tensor): path for held in (own, self.tensors) for path, tensor in held.items()}
        self._source: weakref.ref[Listed] | None = None
        self._functional = functional
        self.stores = Stores(functional.modules)
        of_parameters = {**functional.parameters, **functional.constants}
        for store, sites in (("_parameters", of_parameters), ("_buffers", functional.buffers)):
            for path, places in sites.items():
                self.stores.exchange(store, places, self.tensors[path])
        self._buffer_sites = [
            (path, vars(module), name) for path, places in functional.buffers.items() for module, name in places
        ]
        self.exchanges = 0

    def follow(self, state: Listed) -> None:
        """Take the memory of a state's parameters and buffers."""
        if self._source is not None and self._source() is state:
            return
        for stand_in, tensor in zip(self.tensors.values(), state.own, strict=True):
            stand_in.data = tensor
        self._source = weakref.ref(state)  # it keeps the optimizer's state, too

    def stands_in(self, given: Any) -> bool:
        """Whether it is a stand-in, and not a tensor of the module or another thing."""
        path = self.places.get(id(given))
        return path is not None and given is self.tensors[path]

    def known_as(self, given: Any) -> tuple[str, bool] | None:
        """The path of a tensor of the module, and whether it is a stand-in; None for another thing."""
        path = self.places.get(id(given))
        return None if path is None else (path, given is self.tensors[path])

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

    def reassigned(self, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The buffers that a call put in the place of stand-ins; asked while these are held.

        Whoever kept the tensor that was there has its value for good; another stands in from now on. It is the only
        one who exchanges stand-ins.

        Args:
            written: the new values of the buffers that the call wrote to: one may be at another place by now.
        """
        found = {}
        for path, part, name in self._buffer_sites:
            now = part["_buffers"].get(name)
            if now is not self.tensors[path] and now is not None:
                found[path] = written.get(self.places[id(now)], now) if self.stands_in(now) else now
        for path in found:
            before, fresh = self.tensors[path], self.tensors[path].detach()
            before.data = before.clone()
            self.tensors[path] = fresh
            self.places[id(fresh)] = self.places.pop(id(before))
            self.stores.exchange("_buffers", self._functional.buffers[path], fresh)
            self.exchanges += 1
        return found

    def problems(self) -> list[str]:
        """What a call did to the set of parameters and buffers, which is undone; asked while stand-ins are held."""
        found = [*self._functional.problems_with_new_ones()]
        if not found and self.stores.has_lost():
            found = ["the forward removed a parameter or a buffer, or set it to None; give it a value instead"]
        return found


def _by_address(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    return {
        tensor.untyped_storage().data_ptr(): path
        for path, tensor in tensors.items()
        if tensor.layout is torch.strided and tensor.numel()
    }
