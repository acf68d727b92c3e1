"""What somebody declares of an averaged twin: of which part of the model, how it follows, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from funcfreeze.declare.plan_data import number_from_data, number_to_data
from funcfreeze.declare.timing import ALWAYS, Timing, as_count, timing_problems
from funcfreeze.schedules.calling import value_at
from funcfreeze.schedules.schedule import Schedule

Decay = float | Tensor | Callable[[Any], float | Tensor]
"""What is kept of a twin when it moves: a number from 0 to 1, a 0-d tensor, or a schedule of the owner's clock."""

BUFFERS = ("own", "copied", "averaged")
"""What a twin's buffers may follow."""

MODES = ("train", "eval")
"""The modes that a twin may be kept in."""


@dataclass(frozen=True)
class Ema:
    """An averaged twin of a part of the model, as `ema` declares it.

    Attributes:
        module_path: of the part; "*" is the whole model.
        decay: what is kept of the twin when it moves.
        timing: at which counts of its owner's clock it moves.
        buffers: "own", "copied" or "averaged".
        mode: "train" or "eval"; None is the original's.
    """

    module_path: str
    decay: Decay
    timing: Timing = ALWAYS
    buffers: str = "own"
    mode: str | None = None

    def __str__(self) -> str:
        return self.told()

    def told(self, owner: str | None = None) -> str:
        """In words, as one that moves after a member's update if its name is given."""
        what = "copy" if isinstance(self.decay, Real) and self.decay == 0 else f"ema {_shown(self.decay)}"
        how = what if self.timing == ALWAYS else f"{what} {self.timing}"
        after = [] if owner is None else [f"after {owner}"]
        return ", ".join(
            [how, *after, f"{self.buffers} buffers", *([] if self.mode is None else [f"{self.mode} mode"])]
        )

    def decay_at(self, step: Tensor) -> float | Tensor:
        """The decay at a count of its owner's clock.

        Raises:
            ValueError: a schedule gave something else than a number from 0 to 1 or a 0-d tensor.
        """
        decay = self.decay
        if isinstance(decay, Tensor):
            return decay
        if isinstance(decay, Real):
            return float(decay)
        found: float | Tensor = value_at(decay, step, partial(_checked, decay))  # type: ignore[arg-type]  # a function
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        timing = {name: value for name, value in self.timing.to_dict().items() if name != "reset"}
        return {
            "module_path": self.module_path,
            "decay": number_to_data(self.decay),
            **timing,
            "buffers": self.buffers,
            "mode": self.mode,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Ema:
        """The declaration that `to_dict` wrote down; `RouteError` for a decay that was a function."""
        return ema(**{**data, "decay": number_from_data(data["decay"], "decay")})


def ema(
    module_path: str,
    decay: Decay,
    *,
    every: int = 1,
    start: int = 0,
    stop: int | None = None,
    buffers: str = "own",
    mode: str | None = None,
) -> Ema:
    """An averaged twin of a part of the model: a teacher, a momentum encoder, a target network.

    Given to a step as `targets={"teacher": ema("online", 0.99)}`, it is a real module, copied once, that `losses` finds
    as `targets["teacher"]`. After the step's update each of its parameters becomes `decay * twin + (1 - decay) * own`.
    They are constants for every loss: gradients flow through the twin to its inputs, and never into it.

    Args:
        module_path: of a part of the model, as in `named_modules()`; "*" is the whole model.
        decay: from 0 to 1: a number, a 0-d tensor, or a schedule of the clock of the step that declares it (the count
            before the update). 0 copies, as DQN does every so many steps.
        every: it moves at every so many counts of that clock; with `start` and `stop` at `range(start, stop, every)`.
        start: the count at which it moves first.
        stop: the count from which on it moves no more.
        buffers: "own" (moved by the twin's own forward, if by anything), "copied" (the original's as the step leaves
            them) or "averaged" (as parameters are; those of integers are copied).
        mode: "train" or "eval" for the twin; None follows the original's flags, part by part.

    Raises:
        TypeError, ValueError: everything that is wrong with the arguments.

    >>> import funcfreeze as ff
    >>> print(ff.ema("online", 0.99)), print(ff.ema("q", 0, every=1000))
    ema 0.99, own buffers
    copy every 1000, own buffers
    (None, None)
    >>> ff.ema("q", 1.5, buffers="mine")
    Traceback (most recent call last):
        ...
    ValueError: ema of 'q':
      decay is from 0 to 1, got 1.5
      buffers is 'own', 'copied' or 'averaged', got 'mine'
    """
    if isinstance(module_path, torch.nn.Module):
        raise TypeError(
            f"ema takes the path of a part of the model, as in model.named_modules(); got the {_kind(module_path)} "
            "itself"
        )
    if not isinstance(module_path, str):
        raise TypeError(f"ema takes the path of a part of the model, a string; got {module_path!r}")
    numbers = {"every": as_count(every), "start": as_count(start), "stop": as_count(stop)}
    problems = [*_decay_problems(decay), *timing_problems(**numbers, reset=False)]
    if not isinstance(buffers, str) or buffers not in BUFFERS:
        problems.append(f"buffers is 'own', 'copied' or 'averaged', got {buffers!r}")
    if mode is not None and (not isinstance(mode, str) or mode not in MODES):
        problems.append(f"mode is 'train', 'eval' or None, got {mode!r}")
    if problems:
        raise ValueError("\n".join([f"ema of {module_path!r}:", *(f"  {problem}" for problem in problems)]))
    return Ema(module_path, decay, Timing(**numbers), buffers, mode)


def shown_targets(targets: Sequence[tuple[str, Ema]], owner: str | None = None) -> Iterator[str]:
    """Twins in words, those that follow alike in one line.

    >>> twins = [("q", ema("q", 0.995)), ("encoder", ema("encoder", 0.995)), ("teacher", ema("net", 0.9))]
    >>> print(*shown_targets(twins, "critic"), sep="; ")
    q, encoder: ema 0.995, after critic, own buffers; teacher of net: ema 0.9, after critic, own buffers
    """
    alike: dict[str, list[str]] = {}
    for name, declared in targets:
        of = "" if name == declared.module_path else f" of {_part(declared.module_path)}"
        alike.setdefault(declared.told(owner), []).append(f"{name}{of}")
    for told, names in alike.items():
        yield f"{', '.join(names)}: {told}"


def cut_ties(targets: Sequence[tuple[str, Ema]], tied: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """In words, the ties between a part that has a twin and what is outside of it: the twin does not have them.

    >>> print(*cut_ties([("teacher", ema("online", 0.9))], [("online.w", "head.w"), ("online.b",)]))
    teacher: not tied to head.w, as online.w is
    """
    groups = [*tied]
    for name, declared in targets:
        for names in groups:
            inside = [path for path in names if path.startswith(f"{declared.module_path}.")]
            outside = [path for path in names if path not in inside]
            if inside and outside:
                yield f"{name}: not tied to {', '.join(outside)}, as {inside[0]} is"


def _part(module_path: str) -> str:
    return "the model" if module_path == "*" else module_path


_COUNTS = torch.cat([torch.arange(100), torch.logspace(2, 7, 200, dtype=torch.float64).long()])
"""Counts at which a schedule is looked at."""


def _decay_problems(decay: object) -> Iterator[str]:
    if isinstance(decay, Tensor):
        if decay.ndim != 0 or not decay.is_floating_point():
            yield f"a decay that is a tensor is 0-d and floating, got shape {tuple(decay.shape)} and {decay.dtype}"
        elif not 0 <= decay <= 1:
            yield f"decay is from 0 to 1, got {decay!r}"
    elif isinstance(decay, Schedule):
        values = decay(_COUNTS)
        outside = ((values < -1e-9) | (values > 1 + 1e-9)).nonzero().flatten().tolist()
        if outside:
            count, value = _COUNTS[outside[0]], values[outside[0]]
            yield f"decay is from 0 to 1, and {decay!r} is {float(value):g} at count {int(count)}"
    elif isinstance(decay, Real) and not isinstance(decay, bool):
        if not 0 <= float(decay) <= 1:
            yield f"decay is from 0 to 1, got {decay!r}"
    elif isinstance(decay, type) or not callable(decay):
        yield f"decay is a number from 0 to 1, a 0-d tensor or a schedule, got {_kind(decay)}: {decay!r}"


def _checked(schedule: object, value: Any) -> float | Tensor:
    if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
        return value.detach()
    if isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1:
        return float(value)
    seen = f"a tensor of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(f"the decay {schedule!r} must return a number from 0 to 1 or a floating 0-d tensor, got {seen}")


def _shown(decay: Decay) -> str:
    return f"{float(decay):g}" if isinstance(decay, Real) else repr(decay)


def _kind(value: object) -> str:
    return type(value).__name__
