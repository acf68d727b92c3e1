"""Averaged twins of parts of a model: what a step declares, and how they move after its update.

Their tensors go with the buffers through everything that a step computes (see `FunctionalModule`): a forward may write
to a twin's buffers, and only reads its parameters. They move here, outside of any graph: it is one pass, and there is
no graph more for the steps in which some rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from funcfreeze.computation.back_door import form_of
from funcfreeze.computation.finite import Found
from funcfreeze.computation.statistics import has_statistics
from funcfreeze.declare.ema import Ema
from funcfreeze.declare.plan import raise_problems
from funcfreeze.declare.selectors import closest
from funcfreeze.model.functional import in_twin
from funcfreeze.model.sites import clear_modules
from funcfreeze.model.twins import Twin
from funcfreeze.optim.reals import as_real
from funcfreeze.optim.skip import choose


@dataclass(frozen=True, eq=False)
class Target:
    """A twin, and how it follows.

    Attributes:
        declared: how.
        twin: the copy.
        moves: whether the step that has it moves it; members of an alternation see those of the others, too.
    """

    declared: Ema
    twin: Twin
    moves: bool = True


Moves = Sequence[tuple[str, Target, float | Tensor]]
"""The twins that move in a step, with what is kept of each."""


@dataclass(frozen=True, eq=False)
class Targets:
    """The twins that `losses` finds under `targets`.

    Attributes:
        by_name: in the order in which they were declared.
    """

    by_name: Mapping[str, Target] = field(default_factory=dict)

    @staticmethod
    def of(
        targets: object, model: nn.Module, planned: Sequence[tuple[str, Ema]], parameters: Collection[str]
    ) -> Targets:
        """What was declared, with a copy of every part of the model that is to have a twin.

        Args:
            targets: name -> `Ema`, or the `Target` of another step over this model; None are those of a plan.
            model: whose parts they are.
            planned: what a plan declares.
            parameters: the paths of the model's parameters.

        Raises:
            RouteError: everything that is wrong with them.
        """
        if targets is not None and not isinstance(targets, Mapping):
            seen = "an ema without a name" if isinstance(targets, Ema) else repr(targets)
            raise TypeError(f'targets is a mapping such as {{"teacher": funcfreeze.ema("online", 0.99)}}, got {seen}')
        given = dict(planned) if targets is None else dict(targets)
        raise_problems(
            [
                *(problem for name, target in given.items() for problem in _problems(name, target, model, parameters)),
                *_differences(given, planned),
            ]
        )
        return Targets(
            {
                name: target if isinstance(target, Target) else Target(target, Twin.of(model, target.module_path))
                for name, target in given.items()
            }
        )

    def over(self, model: nn.Module) -> dict[str, Target]:
        """The same over another model, a copy of the one that they are of."""
        return {
            name: replace(target, twin=Twin.of(model, target.declared.module_path))
            for name, target in self.by_name.items()
        }

    @property
    def declared(self) -> tuple[tuple[str, Ema], ...]:
        """What the step declares itself."""
        return tuple((name, target.declared) for name, target in self.by_name.items() if target.moves)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The twins by name."""
        return {name: target.twin.module for name, target in self.by_name.items()}

    @cached_property
    def follows(self) -> dict[str, str]:
        """Path of each parameter and buffer of a twin -> path of what it follows."""
        return {
            in_twin(name, path): followed
            for name, target in self.by_name.items()
            for path, followed in target.twin.followed.items()
        }

    def warn_of_still_statistics(self, stacklevel: int) -> None:
        """Warn of norms' statistics that nothing moves, where no losses call the twins: no good for evaluation."""
        for name, target in self.by_name.items():
            norms = [norm for norm in target.twin.module.modules() if has_statistics(norm)]
            if norms and target.declared.buffers == "own":
                warnings.warn(
                    f"no losses name `targets`, so nothing moves the running statistics of target {name!r}: it keeps "
                    f"those that the {len(norms)} norms of {target.declared.module_path!r} begin with. For evaluation "
                    'say buffers="copied" or buffers="averaged"',
                    stacklevel=stacklevel,
                )

    def begun(self, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of what the twins follow: what they begin with."""
        return {path: known[followed].clone() for path, followed in self.follows.items()}

    def moving(self, count: int, step: Tensor) -> Moves:
        """The twins that move after the update of a count; asked before anything is overwritten, since it may raise.

        Args:
            count: of the clock.
            step: the same as a tensor.
        """
        return [
            (name, target, target.declared.decay_at(step))
            for name, target in self.by_name.items()
            if target.moves and count in target.declared.timing.counts
        ]

    def set_modes(self) -> None:
        """Put every twin into the mode that it should be in."""
        for target in self.by_name.values():
            target.twin.set_mode(target.declared.mode)

    def in_place_of(self, names: Sequence[str], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model's parameters and buffers are with some twins in the place of what they are of, by path."""
        unknown = [repr(name) for name in names if name not in self.by_name]
        if unknown:
            known = ", ".join(self.by_name) or "none"
            raise ValueError(f"no target is called {', '.join(unknown)}; the step's targets are {known}")
        found: dict[str, Tensor] = {}
        for name in names:
            twin = self.by_name[name].twin
            for path, followed in twin.followed.items():
                if followed in found:
                    raise ValueError(f"{followed}: more than one of the targets {', '.join(names)} has a twin of it")
                found[followed] = buffers[in_twin(name, path)]
        return found


def moved_by(moves: Moves) -> set[str]:
    """The paths of all tensors of the twins that move."""
    return {in_twin(name, path) for name, target, _ in moves for path in target.twin.followed}


def following_buffers(moves: Moves) -> set[str]:
    """The paths of the twins' buffers that are overwritten."""
    return {
        in_twin(name, path)
        for name, target, _ in moves
        if target.declared.buffers != "own"
        for path in target.twin.buffers
    }


def move(
    moves: Moves,
    twins: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    found: Found | None,
) -> dict[str, Tensor]:
    """Overwrite the twins that move; returns the buffers of theirs that take another form, which a forward may give.

    Args:
        moves: which, and what is kept of each.
        twins: path -> the twins' tensors, which are overwritten.
        params: path -> the model's parameters after the update.
        buffers: path -> its buffers as the forward left them.
        found: what of the step is not finite, if that is looked for: nothing moves in a step that is skipped.
    """
    renewed: dict[str, Tensor] = {}
    for name, target, decay in moves:
        averaged, copied = _followed(name, target, params, buffers)
        if isinstance(decay, float) and decay == 0:
            averaged, copied = {}, {**averaged, **copied}
        others = {path for path, value in {**averaged, **copied}.items() if form_of(value) != form_of(twins[path])}
        for path in others:  # a mean with what was there has no meaning
            value = averaged.pop(path, None)
            value = copied.pop(path) if value is None else value
            renewed[path] = value.clone() if found is None else choose(found.skip, twins[path], value, path).clone()
        if found is not None:  # what is kept comes out as it was, bit by bit
            means = {path: _mean(twins[path], value, decay) for path, value in averaged.items()}
            new = {**means, **copied}
            averaged, copied = {}, {path: choose(found.skip, twins[path], value, path) for path, value in new.items()}
        if copied:
            torch._foreach_copy_([twins[path] for path in copied], [*copied.values()])
        _average([twins[path] for path in averaged], [*averaged.values()], decay)
    return renewed


def _followed(
    name: str, target: Target, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a twin's tensors are averaged with, and what others are copies of, by the twin's paths."""
    averaged: dict[str, Tensor] = {}
    copied: dict[str, Tensor] = {}
    for path, followed in target.twin.parameters.items():
        (averaged if _is_floating(params[followed]) else copied)[in_twin(name, path)] = params[followed]
    if target.declared.buffers != "own":
        for path, followed in target.twin.buffers.items():
            is_mean = target.declared.buffers == "averaged" and _is_floating(buffers[followed])
            (averaged if is_mean else copied)[in_twin(name, path)] = buffers[followed]
    return averaged, copied


def _average(twins: Sequence[Tensor], values: Sequence[Tensor], decay: float | Tensor) -> None:
    """`decay * twin + (1 - decay) * value`, in one pass over tensors of one device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for twin, value in zip(map(as_real, twins), map(as_real, values), strict=True):
        mine, others = alike.setdefault((twin.device, twin.dtype), ([], []))
        mine.append(twin)
        others.append(value)
    for (device, dtype), (mine, others) in alike.items():
        if isinstance(decay, Tensor):
            part = (1 - decay).to(device, dtype, non_blocking=device.type != "cpu")
            torch._foreach_lerp_(mine, others, [part] * len(mine))
        else:
            torch._foreach_lerp_(mine, others, 1 - decay)


def _mean(twin: Tensor, value: Tensor, decay: float | Tensor) -> Tensor:
    mean = twin.clone()
    _average([mean], [value], decay)
    return mean


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _problems(name: object, target: object, model: nn.Module, parameters: Collection[str]) -> Iterator[str]:
    """What is wrong with one declaration."""
    if not isinstance(name, str) or not name or "." in name:
        yield f"a target is named by a non-empty string without dots, got {name!r}"
    elif name in parameters:
        yield f"target {name!r} is named like a parameter of the model; give it another name"
    if isinstance(target, Target):
        return
    if not isinstance(target, Ema):
        yield f'target {name!r} is what funcfreeze.ema("path of a module", decay) gives, got {_shown(target)}'
        return
    path = target.module_path
    known = clear_modules(model)
    if f"targets.{name}" in known:
        yield f"target {name!r}: the model has a module targets.{name}, which is how its tensors go; name it otherwise"
    if path in parameters:
        yield f"target {name!r}: {path} is a parameter, and a twin is of a module; give the path of the module it is in"
    elif path != "*" and (path not in known or not path):
        yield f"target {name!r}: the model has no module {path!r}{closest(path, [part for part in known if part])}"
    elif not any(True for _ in (model if path == "*" else known[path]).parameters()):
        yield f"target {name!r}: module {path} has no parameters to average"


def _differences(given: Mapping[Any, Any], planned: Sequence[tuple[str, Ema]]) -> Iterator[str]:
    """Where a plan that was given as routes says another thing."""
    own = [(name, target) for name, target in given.items() if not isinstance(target, Target) or target.moves]
    own = [(name, target.declared if isinstance(target, Target) else target) for name, target in own]
    if planned and own != [*planned]:
        yield (
            f"targets are {', '.join(map(str, given))}, and the plan that was given as routes has "
            f"{', '.join(name for name, _ in planned)}, or declares them otherwise; leave one of them out"
        )


def _shown(target: object) -> str:
    return type(target).__name__ if isinstance(target, nn.Module) else repr(target)
