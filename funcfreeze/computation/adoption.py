"""Another step's state taken over: what fits is kept, the rest starts afresh, and both are told."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SparseAdam

from funcfreeze.computation.specification import Specification
from funcfreeze.computation.state import State
from funcfreeze.computation.structure import entries, is_entry
from funcfreeze.model.ties import aliases_of
from funcfreeze.optim import Transform
from funcfreeze.optim.cast import cast


@dataclass(frozen=True)
class Adoption:
    """What became of another step's state.

    Attributes:
        kept: what was taken over: `params.<path>`, `buffers.<path>`, `optimizer.<path>` and `optimizer.loss_scale`.
        afresh: what this step has and the other state has not, or has in another form, and why.
        left: what the other state has and this step does not.

    >>> print(Adoption(("params.w",), ("optimizer.w: the state keeps momentum_buffer, the Step step, exp_avg",), ()))
    1 kept
    1 starts afresh:
      optimizer.w: the state keeps momentum_buffer, the Step step, exp_avg
    """

    kept: tuple[str, ...]
    afresh: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        told = [f"{len(self.kept)} kept"]
        for name, found in (
            ("starts afresh" if len(self.afresh) == 1 else "start afresh", self.afresh),
            ("left out", self.left),
        ):
            if found:
                told += [f"{len(found)} {name}:", *(f"  {line}" for line in found)]
        return "\n".join(told)


Fields = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Any, Tensor]
"""Params, buffers, optimizer and step of a state."""


def adopted(state: State, fresh: Fields, begun: Any, wanted: Specification) -> tuple[Fields, Adoption]:
    """The fields of a state in which all that fits is the other state's, whose tensors are not copied.

    Args:
        state: the other.
        fresh: the fields that this step starts with.
        begun: the optimizer's state after an update, which tells what it keeps where it starts with nothing.
        wanted: what this step's states look like.
    """
    params, buffers, optimizer, step = fresh
    notes = _Notes([], [], [])
    fields = (
        notes.tensors("params", params, state.params, wanted.tied_params),
        notes.tensors("buffers", buffers, state.buffers, wanted.tied_buffers),
        notes.optimizer(optimizer, begun, state.optimizer, params, state.params.keys()),
        state.step.to(step.device),
    )
    return fields, Adoption(tuple(notes.kept), tuple(notes.afresh), tuple(notes.left))


def begun_state(transform: Transform, state: Any, params: Mapping[str, Tensor], step: Tensor) -> Any:
    """The optimizer's state after an update by gradients of zero, which makes what it starts without."""
    algorithms = transform.algorithms(params) if transform.algorithms is not None else {}
    sparse = {path for path, algorithm in algorithms.items() if SparseAdam in algorithm.kinds}
    still = {path: torch.zeros_like(param) for path, param in params.items()}
    still |= {path: still[path].to_sparse() for path in sparse}  # it takes no others
    return transform.update(still, state, params, step=step)[1]


@dataclass(frozen=True)
class _Notes:
    kept: list[str]
    afresh: list[str]
    left: list[str]

    def tensors(
        self, noun: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], aliases: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """Parameters or buffers by this step's paths; what is tied in one of the two has several names there."""
        by_alias = {alias: given[path] for alias, path in aliases_of(given).items()}
        other_names = {aliases[name]: tensor for name, tensor in given.items() if name in aliases}
        named = {**by_alias, **other_names, **given}
        found: dict[str, Tensor] = {}
        used: set[int] = set()
        for path, tensor in own.items():
            problem = "the state does not have it" if path not in named else _misfit(tensor, named[path])
            self.note(f"{noun}.{path}", problem)
            if problem:
                found[path] = tensor
                continue
            other = named[path].to(tensor.device, tensor.dtype)
            found[path] = other.clone() if id(named[path]) in used else other  # tied there, and not here
            used.add(id(named[path]))
        self.left.extend(f"{noun}.{path}" for path, tensor in given.items() if id(tensor) not in used)
        return found

    def optimizer(self, own: Any, begun: Any, given: Any, params: Mapping[str, Tensor], known: Collection[str]) -> Any:
        """The optimizer's state, with what the other keeps for a parameter by the same names, wherever that is."""
        kept: dict[str, list[Mapping[str, Any]]] = {}
        for path, found in entries(given, known):
            kept.setdefault(path, []).append(found)

        visited: set[str] = set()

        def filled(own: Any, begun: Any) -> Any:
            if isinstance(own, Mapping):
                return {key: entry(key, own[key], begun[key]) for key in own}
            return tuple(map(filled, own, begun)) if type(own) is tuple else own

        def entry(key: str, own: Any, begun: Any) -> Any:
            if key == "loss_scale" and isinstance(given, Mapping) and "loss_scale" in given:
                self.note("optimizer.loss_scale", None)
                return given["loss_scale"]
            if not is_entry(key, own, params):
                return filled(own, begun)
            visited.add(key)
            if not begun:
                self.left.extend(f"optimizer.{key}" for other in kept.get(key, ()) if other)
                return own
            casts = [_cast(begun, other, params[key].device) for other in kept.get(key, ())]
            found = next((entry for entry in casts if entry is not None), None)
            self.note(f"optimizer.{key}", None if found is not None else _difference(begun, kept.get(key, ())))
            return own if found is None else found

        made = filled(own, begun)
        self.left.extend(f"optimizer.{path}" for path in kept if path not in visited)
        return made

    def note(self, name: str, problem: str | None) -> None:
        """Note what became of it."""
        if problem is None:
            self.kept.append(name)
        else:
            self.afresh.append(f"{name}: {problem}")


def _misfit(own: Tensor, other: Tensor) -> str | None:
    if own.shape != other.shape:
        return f"the state has shape {tuple(other.shape)}, the Step {tuple(own.shape)}"
    if own.dtype != other.dtype and not (own.is_floating_point() and other.is_floating_point()):
        return f"the state has {other.dtype}, the Step {own.dtype}"
    return None


def _cast(begun: Mapping[str, Any], other: Mapping[str, Any], device: torch.device) -> Mapping[str, Any] | None:
    """What the other keeps, in the form in which this step does, or None if it keeps something else."""
    if begun.keys() != other.keys():
        return None
    found = {
        slot: cast(other[slot], slot, kept.shape, kept.dtype, device) if isinstance(kept, Tensor) else other[slot]
        for slot, kept in begun.items()
    }
    return None if any(found[slot] is None for slot in found if begun[slot] is not None) else found


def _difference(begun: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    if not others:
        return "the state keeps nothing for it"
    seen = " and ".join(", ".join(other) or "nothing" for other in others)
    return f"the state keeps {seen}, the Step {', '.join(begun)}" + (
        ", of other shapes or in more digits" if any(other.keys() == begun.keys() for other in others) else ""
    )
