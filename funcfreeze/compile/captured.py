"""What Dynamo captures: one call of the user's losses on the user's module, with marks for the backend to find.

It runs in Dynamo's hands alone, and no check of ours may raise there. What is wrong with what `losses` returned is
only marked (`end`), and told by an eager call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcfreeze.compile.problems import SwitchedOff
from funcfreeze.declare.names import is_own

_LIBRARY = torch.library.Library("funcfreeze", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's
_LIBRARY.define("loss(Tensor loss, str name) -> Tensor")  # type: ignore[no-untyped-call]  # torch's
_LIBRARY.define("held(Tensor tensor) -> Tensor")  # type: ignore[no-untyped-call]  # torch's
_LIBRARY.define("end(bool is_odd, str key) -> Tensor")  # type: ignore[no-untyped-call]  # torch's

_FAKES: Mapping[str, Callable[..., Tensor]] = {
    "loss": lambda loss, name: torch.empty_like(loss),
    "held": torch.empty_like,
    "end": lambda is_odd, key: torch.empty(0),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"funcfreeze::{_name}", _fake, lib=_LIBRARY)

LOSS = torch.ops.funcfreeze.loss.default
"""Marks a loss, detached, by its name."""

HELD = torch.ops.funcfreeze.held.default
"""Marks a tensor that a metric holds where it cannot be exchanged while Dynamo looks."""

END = torch.ops.funcfreeze.end.default
"""Marks the end, so that no graph is empty and the key is guarded, and whether what was returned was not declared."""


class Captured(NamedTuple):
    """What a captured call returns.

    Attributes:
        losses: every present loss by name.
        metrics: what came beside them.
        held: tensors that metrics hold in other than plain containers, and what they are in the graph.
        end: nothing of interest.
    """

    losses: dict[str, Any]
    metrics: Mapping[str, Any]
    held: list[tuple[Tensor, Tensor]]
    end: Tensor


def captured(
    losses: Callable[..., Any],
    module: Any,
    batch: Any,
    named: dict[str, Any],
    declared: tuple[str, ...],
    frozen_norms: tuple[Any, ...],
    key: str,
) -> Captured:
    """Call the losses, and mark what they return.

    Args:
        losses: the user's function.
        module: the user's module.
        batch: the user's batch.
        named: what else the function asks for.
        declared: the names of the losses that have routes.
        frozen_norms: the parts of the module that have to stay in eval mode.
        key: stands for all that a compiled step takes for granted beside what Dynamo guards.
    """
    if not torch.compiler.is_dynamo_compiling():
        raise SwitchedOff
    returned = losses(module, batch, **named)
    is_pair = isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)
    found, metrics = returned if is_pair else (returned, {})
    marked: dict[str, Any] = {}
    is_odd = not isinstance(found, Mapping)
    if not is_odd:
        for name, value in found.items():
            if isinstance(value, Tensor) and name in declared and name not in metrics:
                marked[name] = LOSS(value.detach(), name)
            else:
                is_odd = is_odd or value is not None or name not in declared
        for name in declared:
            is_odd = is_odd or not (name in found or name in _field_names(found))
    for norm in frozen_norms:
        is_odd = is_odd or norm.training
    for name in metrics:
        is_odd = is_odd or is_own(name)
    held: list[tuple[Tensor, Tensor]] = []
    return Captured(marked, {name: _apart(value, held) for name, value in metrics.items()}, held, END(is_odd, key))


def _field_names(value: Any) -> list[str]:
    """The fields of a dataclass, none of anything else. Not every release of Dynamo traces `dataclasses.fields`."""
    return [*getattr(value, "__dataclass_fields__", ())]


def _apart(value: Any, held: list[tuple[Tensor, Tensor]]) -> Any:
    """The metric in new plain containers, its tensors detached; those in other containers are noted."""
    if isinstance(value, Tensor):
        return value.detach()
    kind = type(value)
    if kind is dict:
        return {key: _apart(part, held) for key, part in value.items()}
    if kind is list:
        return [_apart(part, held) for part in value]
    if kind is tuple:
        return tuple([_apart(part, held) for part in value])
    _note(value, held)
    return value


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _note(value: Any, held: list[tuple[Tensor, Tensor]]) -> None:
    if isinstance(value, Tensor):
        held.append((value, HELD(value.detach())))
    elif isinstance(value, Mapping):
        for part in value.values():
            _note(part, held)
    elif isinstance(value, list | tuple):
        for part in value:
            _note(part, held)
    elif not isinstance(value, _PLAIN):
        for name in _field_names(value):
            _note(getattr(value, name), held)
