"""Models under `DistributedDataParallel`, which averages gradients by hooks that fire in `loss.backward()` alone."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from funcfreeze.gradients.walk import at_end_of_backward
from funcfreeze.model.mapping import Model


def unwrapped(model: Model) -> Model:
    """The model without data parallelism around it, or around the modules of a mapping."""
    if isinstance(model, _WRAPPERS):
        inner: nn.Module = model.module
        return inner
    if isinstance(model, Mapping) and any(isinstance(inner, _WRAPPERS) for inner in model.values()):
        return {name: inner.module if isinstance(inner, _WRAPPERS) else inner for name, inner in model.items()}
    return model


_WRAPPERS = (DistributedDataParallel, nn.DataParallel)


def wrappers(model: Model) -> list[DistributedDataParallel]:
    """What is wrapped around the model, or around parts of it: given with it, or found around it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    given = [*model.values()] if isinstance(model, Mapping) else [model]
    found = {id(wrapper): wrapper for wrapper in (*given, *_all()) if isinstance(wrapper, DistributedDataParallel)}
    modules = [module for module in given if isinstance(module, nn.Module)]
    parts = {id(part) for module in modules for part in module.modules()} if found else set()
    return [wrapper for wrapper in found.values() if id(wrapper.module) in parts]


_KNOWN: WeakSet[DistributedDataParallel] = WeakSet()
"""All wrappers in the process, once somebody has asked for them."""

_WATCHING: list[RemovableHandle] = []
"""The handle of what notes them."""


def _all() -> Iterable[DistributedDataParallel]:
    """All wrappers in the process.

    A search takes longer than the step of a small network: there is one, at the first call in a process that has ranks;
    from then on they are noted when a module becomes theirs.
    """
    if not _WATCHING:
        _WATCHING.append(register_module_module_registration_hook(_note))
        for held in gc.get_objects():
            if issubclass(type(held), DistributedDataParallel):
                _KNOWN.add(held)
    return [*_KNOWN]


def _note(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(module, DistributedDataParallel):
        _KNOWN.add(module)


def is_averaging(wrapper: DistributedDataParallel) -> bool:
    """Whether it wants to average the gradients of a backward now: outside of `no_sync()`."""
    found: bool = wrapper.require_backward_grad_sync
    return found


def averaged(wrapper: DistributedDataParallel) -> list[Tensor]:
    """The parameters whose gradients it averages."""
    ignored = wrapper.parameters_to_ignore
    named = wrapper.module.named_parameters()
    return [parameter for name, parameter in named if parameter.requires_grad and name not in ignored]


def unknown_to(around: Sequence[DistributedDataParallel], named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of parameters that are in none of the wrapped modules, where one of these averages over ranks now."""
    if not any(is_averaging(each) and torch.distributed.get_world_size(each.process_group) > 1 for each in around):
        return []
    known = {id(parameter) for wrapper in around for parameter in wrapper.module.parameters()}
    return [name for name, parameter in named if id(parameter) not in known]


def waits_for_all(wrapper: DistributedDataParallel) -> bool:
    """Whether it waits for the gradient of every parameter, also of those that a forward did not use."""
    return not wrapper.find_unused_parameters or wrapper.static_graph


def walks_other_outputs(around: Sequence[DistributedDataParallel]) -> bool:
    """Whether this is inside of a forward of which a backward walks all outputs, those without a gradient on zeros.

    With unused parameters to find, or a static graph, one node is put around them.
    """
    active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]  # torch's
    ties = active is not None and (active.find_unused_parameters or active.static_graph)
    return ties and any(wrapper is active for wrapper in around)


def begin_backward(wrapper: DistributedDataParallel) -> None:
    """Inside a backward: have gradients averaged at its end.

    With `static_graph=True` the first backward does that in a callback, which a node that is put around the forward's
    outputs asks for. That node runs in an engine call of ours, at whose end there are no gradients yet; hence this one
    asks before it does. Both names of it are private to torch; there is no public way.
    """
    if wrapper.static_graph and not wrapper._static_graph_delay_allreduce_enqueued:
        wrapper._static_graph_delay_allreduce_enqueued = True
        at_end_of_backward(wrapper.reducer._delay_all_reduce)  # type: ignore[attr-defined]  # its stub forgets it
