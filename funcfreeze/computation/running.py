"""A running optimizer of torch.optim: its state taken into a step's own, and given back to it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.optim import Optimizer

from funcfreeze.computation.structure import entries_at, in_several_places, with_entries
from funcfreeze.declare.plan import Plan
from funcfreeze.optim import Transform
from funcfreeze.optim.algorithm import SCHEDULED, Algorithm
from funcfreeze.optim.cast import COUNT, cast, problem
from funcfreeze.optim.transform import lines

Entry = Mapping[str, Any]
"""What is kept for one parameter, by torch.optim's names."""


@dataclass(frozen=True, eq=False)
class Running:
    """A running optimizer beside a step: whose parameters are which, and what each keeps.

    Attributes:
        optimizer: the running one.
        groups: path -> the index of its parameter group, for the parameters of both.
        own: path -> the module's own tensor.
        algorithms: path -> what the step's optimizer is called in torch.optim, for all of them that a loss may update.
        problems: parameters that only one side has, and optimizers that torch.optim has no name for.
    """

    optimizer: Optimizer
    groups: Mapping[str, int]
    own: Mapping[str, Tensor]
    algorithms: Mapping[str, Algorithm]
    problems: Sequence[str]

    @staticmethod
    def of(optimizer: object, transform: Transform, plan: Plan, own: Mapping[str, Tensor]) -> Running:
        """Put the two side by side.

        Raises:
            TypeError: not an optimizer of torch.optim.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "optimizer= is a running optimizer such as torch.optim.AdamW(model.parameters(), lr=1e-3), got "
                f"{type(optimizer).__name__}; the Step's own was given when it was built"
            )
        paths = {id(tensor): path for path, tensor in own.items()}
        groups: dict[str, int] = {}
        strangers = []
        for index, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) in paths:
                    groups[paths[id(parameter)]] = index
                else:
                    shape = tuple(parameter.shape)
                    strangers.append(f"param_groups[{index}]['params'][{place}] of shape {shape}: not of this model")
        algorithms = transform.algorithms(plan.routed) if transform.algorithms is not None else {}
        problems = [
            *strangers,
            *(
                f"{path}: a loss may update it, and the running optimizer does not have it"
                for path in plan.routed
                if path not in groups
            ),
            *(
                f"{path}: the running optimizer keeps {', '.join(optimizer.state[own[path]])} for it, and no loss of "
                "the Step may update it (take the optimizer over by a Step that routes all of its parameters; Steps "
                "that update some of them share that State)"
                for path in groups
                if path not in plan.routed and _has_begun(optimizer.state.get(own[path], {}))
            ),
            *(
                f"{path}: its part of the Step's optimizer has no counterpart in torch.optim"
                for path in plan.routed
                if path not in algorithms
            ),
        ]
        both = {path: algorithm for path, algorithm in algorithms.items() if path in groups}
        return Running(optimizer, groups, own, both, problems)

    def counted(self) -> int:
        """The largest count of updates that it keeps for a parameter, or 0."""
        kept = [entry[COUNT] for entry in self.optimizer.state.values() if COUNT in entry]
        return max((int(count) for count in kept), default=0)

    def taken(self, initial: Any, step: int, copy: bool) -> Any:
        """The step's optimizer state, with what the running optimizer keeps.

        Args:
            initial: the optimizer's initial state.
            step: the number of steps taken, which schedules read.
            copy: whether tensors are copied.

        Raises:
            ValueError: all options that differ, and all that is kept in another way.
        """
        problems = [*self.problems, *self._option_problems(step)]
        taken: list[str] = []

        def entry(path: str, own: Entry) -> Entry:
            taken.append(path)
            found, wrong = _in_our_form(self.algorithms[path], own, self._kept(path), self.own[path].device)
            problems.extend(f"{path}: {what}" for what in wrong)
            return _copied(found) if copy else found

        made = with_entries(initial, entry, self.algorithms)
        problems += _in_several_places(taken)
        if problems:
            raise ValueError(_told(self.optimizer, problems))
        return made

    def given_back(self, initial: Any, state: Any, step: int) -> dict[str, Any]:
        """The state dict with which the running optimizer goes on.

        Args:
            initial: the step's initial optimizer state, of tensors without storage.
            state: its present one.
            step: the number of steps taken, which schedules read.

        Raises:
            ValueError: all options that differ, and all that the running optimizer cannot keep.
        """
        found = [*entries_at(initial, state, self.algorithms)]
        kept = dict(found)
        scheduled = self._scheduled(step)
        problems = [
            *self.problems,
            *self._option_problems(step, but=scheduled.keys()),
            *_in_several_places([path for path, _ in found]),
            *(
                f"{option}: param_groups[{index}] has one, the Step gives {' and '.join(map(repr, sorted(given)))}"
                for (index, option), given in scheduled.items()
                if len(given) > 1
            ),
            *(
                f"{path}: {slot} is {value.dtype} in the State, and load_state_dict would make it the parameter's "
                f"{self.own[path].dtype}, which loses digits"
                for path, entry in kept.items()
                for slot, value in entry.items()
                if slot != COUNT and isinstance(value, Tensor) and _loses(value, self.own[path])
            ),
            *(
                f"{path}: the running optimizer has begun, and the State has not; make a new optimizer"
                for path, entry in kept.items()
                if self.algorithms[path].slots is None and _has_begun(self._kept(path)) and not _has_begun(entry)
            ),
        ]
        if problems:
            raise ValueError(_told(self.optimizer, problems))
        made = self.optimizer.state_dict()
        numbers = self._numbers()
        after = {
            numbers[path]: _as_torchs(self.algorithms[path], entry, self._kept(path))
            for path, entry in kept.items()
            if _has_begun(entry) or _has_begun(self._kept(path))
        }
        groups = [
            {
                option: _like(value, next(iter(scheduled[index, option]))) if (index, option) in scheduled else value
                for option, value in group.items()
            }
            for index, group in enumerate(made["param_groups"])
        ]
        return {**made, "state": {**made["state"], **after}, "param_groups": groups}

    def _scheduled(self, step: int) -> dict[tuple[int, str], set[float]]:
        """What options are at this step, by the index of a parameter group, where one in it is a schedule."""
        found = {
            (self.groups[path], option): set[float]()
            for path, algorithm in self.algorithms.items()
            for option in SCHEDULED
            if algorithm.is_scheduled(option)
        }
        for (index, option), values in found.items():
            values |= {
                float(algorithm.value(option, step))
                for path, algorithm in self.algorithms.items()
                if self.groups[path] == index and option in algorithm.options
            }
        return found

    def _option_problems(self, step: int, but: Collection[tuple[int, str]] = ()) -> Iterator[str]:
        """Classes and options that differ, each with the parameters that it is about.

        Args:
            step: the number of steps taken, which schedules read.
            but: groups and options of theirs that do not matter.
        """
        found: dict[str, list[str]] = {}
        for path, algorithm in self.algorithms.items():
            index = self.groups[path]
            if type(self.optimizer) not in algorithm.kinds:
                kind = type(self.optimizer)
                hint = "" if kind.__module__.startswith("torch.") else "; if that wraps another, give the inner one"
                head = f"the Step's optimizer is {algorithm.name}, the running one {kind.__name__}{hint}"
                found.setdefault(head, []).append(path)
                continue
            for option, own, other in algorithm.differences(self.optimizer.param_groups[index], step):
                if (index, option) not in but:
                    head = f"{option}: the Step has {own!r}, param_groups[{index}] has {other!r}"
                    found.setdefault(head, []).append(path)
        for head, paths in found.items():
            yield f"{head}, for {', '.join(paths[:3])}" + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")

    def _kept(self, path: str) -> Entry:
        """What the running optimizer keeps for a parameter."""
        entry = self.optimizer.state.get(self.own[path], {})
        return {slot: value for slot, value in entry.items() if value is not None}

    def _numbers(self) -> dict[str, int]:
        """The numbers by which a state dict knows the parameters."""
        given = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        number = {id(parameter): index for index, parameter in enumerate(given)}
        return {path: number[id(self.own[path])] for path in self.groups}


def _in_several_places(paths: Sequence[str]) -> Iterator[str]:
    for path in in_several_places(paths):
        yield f"{path}: the Step's optimizer keeps something for it in several places, torch.optim in one"


def _like(rate: Any, new: float) -> Any:
    """The new rate as the old one is kept, which may be a tensor."""
    return torch.full_like(rate, new) if isinstance(rate, Tensor) else new


def _told(optimizer: Optimizer, problems: Sequence[str]) -> str:
    return lines(f"the running {type(optimizer).__name__} is not as the Step's optimizer:", problems)


def _in_our_form(algorithm: Algorithm, own: Any, kept: Entry, device: torch.device) -> tuple[Entry, list[str]]:
    """What is kept for one parameter, as the step keeps it, and what in it cannot be that."""
    if algorithm.slots is None:
        return kept, []
    if not kept or not isinstance(own, Mapping):
        return own, []
    counted = {COUNT: torch.ones_like(own[COUNT])} if algorithm.is_counted else {}
    slots = [slot for slot in algorithm.slots if slot not in counted]
    if kept.keys() != set(slots):
        has, wants = (", ".join(names) or "nothing" for names in (kept, slots))
        return own, [f"the running optimizer keeps {has}, the Step's {wants}"]
    found, problems = dict(counted), []
    for slot in slots:
        shape, dtype = own[slot].shape, own[slot].dtype
        tensor = cast(kept[slot], slot, shape, dtype, device)
        if tensor is None:
            problems.append(f"{slot} {problem(kept[slot], shape, dtype)}")
        else:
            found[slot] = tensor
    return found, problems


def _as_torchs(algorithm: Algorithm, entry: Entry, kept: Entry) -> dict[str, Any]:
    """What is kept for one parameter, as the running optimizer keeps it: nothing where it has yet to begin."""
    if not _has_begun(entry):
        return {}
    found = _copied({slot: kept for slot, kept in entry.items() if not (algorithm.is_counted and slot == COUNT)})
    if COUNT in found and algorithm.slots is not None:
        found[COUNT] = _count(found[COUNT], kept.get(COUNT))
    return found


def _has_begun(entry: Entry) -> bool:
    """Whether there was an update: some optimizers keep an entry from the start."""
    return bool(entry) and (COUNT not in entry or bool(entry[COUNT] > 0))


def _count(own: Tensor, kept: Any) -> Any:
    """The count in the form in which it was, or in which torch.optim begins one."""
    if isinstance(kept, Tensor):
        return own.to(kept.device, kept.dtype)
    if kept is not None:
        return type(kept)(own)
    return own.to("cpu", torch.promote_types(torch.float32, torch.get_default_dtype()))


def _copied(entry: Entry) -> dict[str, Any]:
    """What is kept for a parameter with tensors of its own, however deep they are."""

    def copied(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    return {slot: optree.tree_map(copied, kept) for slot, kept in entry.items()}


def _loses(value: Tensor, own: Tensor) -> bool:
    return torch.promote_types(value.dtype, own.dtype) != own.dtype
