"""Another step's state taken over: what fits is kept, the rest starts afresh, and both are told."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.optim import SparseAdam

from funcfreeze.computation.merging import MERGE, keeps_rules, without_rules
from funcfreeze.computation.specification import Specification
from funcfreeze.computation.state import Fields, State, by_path
from funcfreeze.computation.structure import entries, entries_at, in_several_places, with_entries
from funcfreeze.model.ties import aliases_of
from funcfreeze.optim import Transform
from funcfreeze.optim.cast import cast


@dataclass(frozen=True)
class Adoption:
    """What became of another step's state.

    Attributes:
        kept: what was taken over: `params.<path>`, `buffers.<path>`, `targets.<name>.<path>`, `optimizer.<path>` and
            `optimizer.loss_scale`, and `optimizer.merge.<entry>` where a rule keeps something.
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


def adopted(
    state: State, fresh: State, begun: Any, wanted: Specification, follows: Mapping[str, str]
) -> tuple[Fields, Adoption]:
    """The fields of a state in which all that fits is the other state's, whose tensors are not copied.

    Args:
        state: the other.
        fresh: what this step starts with.
        begun: the optimizer's state after an update, which tells what it keeps where it starts with nothing.
        wanted: what this step's states look like.
        follows: path of each tensor of a target -> path of what it follows.
    """
    notes = _Notes([], [], [])
    params = notes.tensors("params", fresh.params, state.params, wanted.tied_params)
    buffers = notes.tensors("buffers", fresh.buffers, state.buffers, wanted.tied_buffers)
    fields = (
        params,
        {**buffers, **notes.targets(by_path(state.targets), {**params, **buffers}, follows)},
        notes.optimizer(fresh.optimizer, begun, state.optimizer, fresh.params, state.params.keys()),
        state.step.to(fresh.step.device),
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

    def targets(
        self, given: Mapping[str, Tensor], known: Mapping[str, Tensor], follows: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """The tensors of targets: the other's, or copies of what they follow, as that was taken over."""
        found: dict[str, Tensor] = {}
        for path, followed in follows.items():
            own = known[followed]
            problem = "the state does not have it" if path not in given else _misfit(own, given[path])
            self.note(path, None if problem is None else f"{problem}; it begins as a copy of {followed}")
            found[path] = own.clone() if problem else given[path].to(own.device, own.dtype)
        self.left.extend(path for path in given if path not in follows)
        return found

    def optimizer(self, own: Any, begun: Any, given: Any, params: Mapping[str, Tensor], known: Collection[str]) -> Any:
        """The optimizer's state: the other as it is where it is of one form with ours, else what fits, by path."""
        if _is_scaled(own) and _is_scaled(given):
            self.kept.append("optimizer.loss_scale")
            inner = self.optimizer(own["optimizer"], begun["optimizer"], given["optimizer"], params, known)
            return {"loss_scale": given["loss_scale"], "optimizer": inner}
        if _is_scaled(own):
            self.afresh.append("optimizer.loss_scale: the state has none")
            return {**own, "optimizer": self.optimizer(own["optimizer"], begun["optimizer"], given, params, known)}
        if _is_scaled(given):
            self.left.append("optimizer.loss_scale")
            return self.optimizer(own, begun, given["optimizer"], params, known)
        if keeps_rules(own):
            rules = self._rules(own[MERGE], given[MERGE] if keeps_rules(given) else {})
            inner = self.optimizer(own["optimizer"], begun["optimizer"], without_rules(given), params, known)
            return {MERGE: rules, "optimizer": inner}
        if keeps_rules(given):
            self._rules({}, given[MERGE])
            return self.optimizer(own, begun, given["optimizer"], params, known)
        if _of_one_form(begun, given):
            self.kept.extend(dict.fromkeys(f"optimizer.{path}" for path, entry in entries(begun, params) if entry))
            if others := _beside_entries(begun, params):
                self.kept.append(f"optimizer: {others} {_OTHERWISE}")
            return given
        return self.by_entries(own, begun, given, params, known)

    def _rules(self, own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """What merge rules keep: the other's, where it is of the same rule for an entry of the same name and form."""
        found: dict[str, Any] = {}
        for label, kept in own.items():
            fits = label in given and kept.keys() == given[label].keys() and _of_one_form(kept, given[label])
            problem = None if fits else "the state does not have it" if label not in given else "the state has another"
            self.note(f"optimizer.merge.{label}", problem)
            found[label] = given[label] if fits else kept
        self.left.extend(f"optimizer.merge.{label}" for label in given if label not in own)
        return found

    def by_entries(self, own: Any, begun: Any, given: Any, params: Mapping[str, Tensor], known: Collection[str]) -> Any:
        """The optimizer's state, with what the other keeps for a parameter by the same names, wherever that is."""
        kept: dict[str, list[Mapping[str, Any]]] = {}
        for path, found in entries(given, known):
            kept.setdefault(path, []).append(found)
        ours = dict(entries_at(own, begun, params))
        several = in_several_places(path for path, _ in entries_at(own, own, params))

        def entry(path: str, before: Mapping[str, Any]) -> Any:
            others = kept.get(path, ())
            if not ours[path]:
                self.left.extend(f"optimizer.{path}" for other in others if other)
                return before
            if len(others) > 1 or path in several:
                self.afresh.append(f"optimizer.{path}: kept in several places, and which is which is not known")
                return before
            found = _cast(ours[path], others[0], params[path].device) if others else None
            self.note(f"optimizer.{path}", None if found is not None else _difference(ours[path], others))
            return before if found is None else found

        made = with_entries(own, entry, params)
        self.left.extend(f"optimizer.{path}" for path in kept if path not in ours)
        if others := _beside_entries(own, params):
            self.afresh.append(f"optimizer: {others} {_OTHERWISE}")
        if others := _beside_entries(given, known):
            self.left.append(f"optimizer: {others} {_OTHERWISE}")
        return made

    def note(self, name: str, problem: str | None) -> None:
        """Note what became of it."""
        if problem is None:
            self.kept.append(name)
        else:
            self.afresh.append(f"{name}: {problem}")


_OTHERWISE = "tensors that it keeps otherwise than by parameter and name"


def _is_scaled(optimizer: Any) -> bool:
    """Whether a loss scale is around it."""
    is_pair = isinstance(optimizer, Mapping) and optimizer.keys() == {"loss_scale", "optimizer"}
    return is_pair and optimizer["loss_scale"].keys() == {"scale", "growth_tracker"}


def _of_one_form(one: Any, other: Any) -> bool:
    """Whether two optimizer states have the same structure, and tensors of the same form in it."""
    mine, structure = optree.tree_flatten(one, none_is_leaf=True)
    theirs, others = optree.tree_flatten(other, none_is_leaf=True)
    return structure == others and all(map(_alike, mine, theirs))


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return type(one) is type(other)


def _beside_entries(optimizer: Any, paths: Collection[str]) -> int:
    """How many tensors there are outside of what is kept for a parameter."""
    inside = sum(len(_tensors(entry)) for _, entry in entries(optimizer, paths))
    return len(_tensors(optimizer)) - inside


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


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
