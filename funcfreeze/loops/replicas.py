"""Models under `DistributedDataParallel`, which averages gradients by hooks that fire in `loss.backward()` alone."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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


@dataclass
class _Known:
    """All wrappers that there were when the process was last searched for them."""

    references: int
    wrappers: list[ref[DistributedDataParallel]]


_KNOWN = _Known(-1, [])


def _all() -> list[DistributedDataParallel | None]:
    """All wrappers in the process.

    A search takes longer than the step of a small network. But everyone refers to the class: as long as it has as many
    references as then, there is no new one.
    """
    if sys.getrefcount(DistributedDataParallel) != _KNOWN.references:
        _KNOWN.wrappers = [ref(held) for held in gc.get_objects() if type(held) is DistributedDataParallel]
        _KNOWN.references = sys.getrefcount(DistributedDataParallel)
    return [wrapper() for wrapper in _KNOWN.wrappers]


def is_averaging(wrapper: DistributedDataParallel) -> bool:
    """Whether it wants to average the gradients of a backward now: outside of `no_sync()`."""
    found: bool = wrapper.require_backward_grad_sync
    return found


def averaged(wrapper: DistributedDataParallel) -> list[Tensor]:
    """The parameters whose gradients it averages."""
    ignored = wrapper.parameters_to_ignore
    named = wrapper.module.named_parameters()
    return [parameter for name, parameter in named if parameter.requires_grad and name not in ignored]


def waits_for_all(wrapper: DistributedDataParallel) -> bool:
    """Whether it waits for the gradient of every parameter, also of those that a forward did not use."""
    return not wrapper.find_unused_parameters or wrapper.static_graph


def begin_backward(wrapper: DistributedDataParallel) -> None:
    """Inside a backward: have gradients averaged at its end.

    With `static_graph=True` the first backward does that in a callback, which a node that is put around the forward's
    outputs asks for. That node runs in an engine call of ours, at whose end there are no gradients yet; hence this one
    asks before it does. Both names of it are private to torch; there is no public way.
    """
    if wrapper.static_graph and not wrapper._static_graph_delay_allreduce_enqueued:
        wrapper._static_graph_delay_allreduce_enqueued = True
        at_end_of_backward(wrapper.reducer._delay_all_reduce)  # type: ignore[attr-defined]  # its stub forgets it
