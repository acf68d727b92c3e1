"""What a loop is told, and what is wrong with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from funcfreeze.checkpoint.batches import Batches
from funcfreeze.checkpoint.files import Damaged
from funcfreeze.checkpoint.folder import checkpoints_in, held, make, name_of, step_of
from funcfreeze.checkpoint.looking import look_into
from funcfreeze.checkpoint.manifest import MANIFEST, Manifest
from funcfreeze.checkpoint.plain import packed
from funcfreeze.checkpoint.resumable import Resumable, position_of
from funcfreeze.checkpoint.saving import refuse_what_cannot_be_saved, wait_for
from funcfreeze.checkpoint.states import AnyStep, packed_state
from funcfreeze.computation.acting import Names
from funcfreeze.computation.state import State
from funcfreeze.declare.plans import Plans
from funcfreeze.fitting.loggers import Logger
from funcfreeze.fitting.watching import AIMS, Watched

FIT = "fit"
"""Where `extra` of a checkpoint keeps what is of this loop: what evaluations came to, and the metrics of the step."""

EVALUATIONS, METRICS = "evaluations", "metrics"

_PATIENCE = 7.0
"""Seconds for which the workers of a run that was killed may hold its folder: they look every five for their parent."""

_COUNTED = {"epochs": True, "evaluate_every": False, "show_every": False, "save_every": True, "patience": True}
"""Options that count something, and whether they may be None."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Options:
    """As `fit` takes them."""

    steps: int | None
    epochs: int | None
    evaluate: Callable[[nn.Module], Any] | None
    evaluate_every: int
    best: str
    patience: int | None
    folder: Path | None
    save_every: int | None
    save_minutes: float | None
    keep: int | None
    extra: Mapping[str, Any]
    generators: Mapping[str, Any] | None
    targets: Names
    loggers: Sequence[Logger]
    show_every: int

    def refuse(self, step: AnyStep, data: object) -> None:
        """Raise for all problems at once, before the first step.

        Args:
            step: what is trained by.
            data: the batches.

        Raises:
            ValueError, TypeError: telling them.
        """
        problems = []
        if (self.steps is None) == (self.epochs is None):
            given = f"steps={self.steps!r} and epochs={self.epochs!r}"
            problems.append(f"one of steps= and epochs= says when it ends, got {given}")
        if self.steps is not None and not (_is_whole(self.steps) and self.steps >= 0):
            problems.append(f"steps is a whole number, at least 0, got {self.steps!r}")
        for name, may_be_none in _COUNTED.items():
            value = getattr(self, name)
            if not (value is None and may_be_none) and not (_is_whole(value) and value >= 1):
                problems.append(f"{name} is a whole number, at least 1, got {value!r}")
        minutes = self.save_minutes
        if minutes is not None and (isinstance(minutes, bool) or not isinstance(minutes, Real) or not minutes >= 0):
            problems.append(f"save_minutes is a number of minutes, or None, got {minutes!r}")
        if self.evaluate is not None and not callable(self.evaluate):
            problems.append(f"evaluate is called with the model, got {self.evaluate!r}")
        problems += _unknown_targets(step, self.targets)
        if self.best not in AIMS:
            problems.append(f"best is 'min' or 'max', got {self.best!r}")
        if self.patience is not None and self.evaluate is None:
            problems.append("patience= waits for better evaluations; give evaluate=, too")
        if not isinstance(data, Iterable):
            problems.append(f"data is iterable, batch after batch; got {type(data).__name__}")
        if isinstance(self.extra, Mapping) and FIT in self.extra and not of_fit(self.extra):
            problems.append(f"extra[{FIT!r}] is where fit keeps what evaluations came to; call yours otherwise")
        problems += [
            f"a logger has a method log(step, metrics), {logger!r} has none"
            for logger in self.loggers
            if not callable(getattr(logger, "log", None))
        ]
        if problems:
            raise ValueError(f"fit: {'; '.join(problems)}")

    def look_at_folder(self, state: State, data: object, count: int) -> None:
        """Make the folder, refuse what could not be saved in it later, and warn of what would go on wrong.

        Args:
            state: where it begins.
            data: the batches.
            count: the step at which the run begins.

        Raises:
            ValueError, TypeError, OSError: it would not work.
        """
        if self.folder is None:
            return
        wait_for(self.folder)
        refuse_what_cannot_be_saved(self.extra, self.generators, self.keep)
        packed_state(state, {})
        resumable = data if isinstance(data, Resumable) else None
        if resumable is not None:
            packed(position_of(resumable), "data", {})
        make(self.folder)
        if resumable is None:
            warnings.warn(
                f"{type(data).__name__} cannot say where it is: a run that is stopped will go on at the beginning of "
                f"its data{_counted_from_there(self.epochs)}; ff.checkpoint.Batches and torchdata's StatefulDataLoader "
                "can say it",
                stacklevel=3,
            )
        newer = [path for path in checkpoints_in(self.folder) if step_of(path) > count]
        newest = next((step_of(path) for path in newer if not look_into(path)[0].problems), count)
        if newest > count:
            warnings.warn(
                f"{self.folder} holds a checkpoint of step {newest:,}, and this run begins at {count:,}: "
                "ff.checkpoint.resume will take the other run's. Begin with resume, or in a folder of its own",
                stacklevel=3,
            )
        dropped = [] if self.extra else [name for name in self._extra_of(count) if name != FIT]
        if dropped:
            warnings.warn(
                f"{self.folder} holds {', '.join(map(repr, dropped))} in `extra` of step {count:,}, and what this run "
                "saves will not: give what resume returned, extra=extra",
                stacklevel=3,
            )

    def evaluated_before(self, count: int) -> Mapping[str, Any]:
        """What evaluations came to before a step: the checkpoint of that step in the folder says it, or `extra`.

        The latter is older where a program fits twice.
        """
        return dict((of_fit(self._extra_of(count)) or of_fit(self.extra)).get(EVALUATIONS, {}))

    def _extra_of(self, count: int) -> Mapping[str, Any]:
        """What the folder's checkpoint of a step holds beside, as JSON."""
        path = None if self.folder is None else self.folder / name_of(count)
        if path is None or not (path / MANIFEST).is_file():
            return {}
        try:
            found: Mapping[str, Any] = Manifest.read(path).extra
        except Damaged:  # the run does not come from there then
            return {}
        return found


def warn_of_epochs_gone(data: object, epochs: int | None) -> None:
    """Of `Batches` that have been gone through so often: `epochs` counts all, and a loop over it would train once."""
    if epochs is not None and isinstance(data, Batches) and data.epoch >= epochs:
        warnings.warn(
            f"nothing to do: these Batches have been gone through {data.epoch} times, and epochs={epochs} counts "
            f"those, too; for another one ask for epochs={data.epoch + 1}",
            stacklevel=3,
        )


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Warn where another run of now saves into this one's folder."""
    if folder is None:
        yield
        return
    with held(folder, patience=_PATIENCE) as is_ours:
        if is_ours is False:
            warnings.warn(
                f"another run holds {folder}: two that save into it remove each other's checkpoints; give each a "
                "folder of its own",
                stacklevel=4,
            )
        yield


def _counted_from_there(epochs: int | None) -> str:
    return "" if epochs is None else ", and count its epochs from there (steps= counts all)"


def of_fit(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """What this loop keeps in `extra`; empty if there is nothing, or something of the user's by that name."""
    kept = extra.get(FIT)
    evaluations = kept.get(EVALUATIONS) if isinstance(kept, Mapping) else None
    is_ours = isinstance(evaluations, Mapping) and evaluations.keys() == {field.name for field in fields(Watched)}
    return kept if is_ours and isinstance(kept, Mapping) else {}


def _unknown_targets(step: AnyStep, targets: Names) -> Iterator[str]:
    asked = [targets] if isinstance(targets, str) else [*(targets or ())]
    plans = step.plan.plans.values() if isinstance(step.plan, Plans) else [step.plan]
    known = {name for plan in plans for name, _ in plan.targets}
    for name in asked:
        if name not in known:
            has = f"the step has {', '.join(map(repr, sorted(known)))}" if known else "the step has none"
            yield f"targets= names averaged twins, of which {has}; got {name!r}"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
