"""What a loop is told, and what is wrong with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from funcfreeze.checkpoint.files import Damaged
from funcfreeze.checkpoint.folder import checkpoints_in, name_of, step_of
from funcfreeze.checkpoint.manifest import MANIFEST, Manifest
from funcfreeze.checkpoint.resumable import Resumable
from funcfreeze.checkpoint.saving import refuse_what_cannot_be_saved
from funcfreeze.computation.acting import Names
from funcfreeze.fitting.loggers import Logger
from funcfreeze.fitting.watching import AIMS, Watched

FIT = "fit"
"""Where `extra` of a checkpoint keeps what is of this loop: what evaluations came to, and the metrics of the step."""

EVALUATIONS, METRICS = "evaluations", "metrics"


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

    def refuse(self, data: object) -> None:
        """Raise for all problems at once, before the first step.

        Raises:
            ValueError, TypeError: telling them.
        """
        problems = []
        if (self.steps is None) == (self.epochs is None):
            given = f"steps={self.steps!r} and epochs={self.epochs!r}"
            problems.append(f"one of steps= and epochs= says when it ends, got {given}")
        if self.steps is not None and not _is_whole(self.steps):
            problems.append(f"steps is a whole number, got {self.steps!r}")
        counted = ("epochs", "evaluate_every", "show_every", "save_every", "patience")
        problems += [
            f"{name} is a whole number, at least 1, got {value!r}"
            for name in counted
            if (value := getattr(self, name)) is not None and not (_is_whole(value) and value >= 1)
        ]
        if self.best not in AIMS:
            problems.append(f"best is 'min' or 'max', got {self.best!r}")
        if self.patience is not None and self.evaluate is None:
            problems.append("patience= waits for better evaluations; give evaluate=, too")
        if not isinstance(data, Iterable):
            problems.append(f"data is iterable, batch after batch; got {type(data).__name__}")
        if FIT in self.extra and not _is_ours(self.extra[FIT]):
            problems.append(f"extra[{FIT!r}] is where fit keeps what evaluations came to; call yours otherwise")
        problems += [
            f"a logger has a method log(step, metrics), {logger!r} has none"
            for logger in self.loggers
            if not callable(getattr(logger, "log", None))
        ]
        if problems:
            raise ValueError(f"fit: {'; '.join(problems)}")

    def look_at_folder(self, data: object, count: int) -> None:
        """Make the folder, refuse what could not be saved in it later, and warn of what would go on wrong.

        Args:
            data: the batches.
            count: the step at which the run begins.

        Raises:
            ValueError, TypeError, OSError: it would not work.
        """
        if self.folder is None:
            return
        resumable = data if isinstance(data, Resumable) else None
        refuse_what_cannot_be_saved(resumable, self.extra, self.keep)
        self.folder.mkdir(parents=True, exist_ok=True)
        if resumable is None:
            warnings.warn(
                f"{type(data).__name__} cannot say where it is: a run that is stopped will go on at the beginning of "
                "its data; ff.checkpoint.Batches and torchdata's StatefulDataLoader can",
                stacklevel=3,
            )
        newest = max(map(step_of, checkpoints_in(self.folder)), default=0)
        if newest > count:
            warnings.warn(
                f"{self.folder} holds a checkpoint of step {newest:,}, and this run begins at {count:,}: "
                "ff.checkpoint.resume will take the other run's. Begin with resume, or in a folder of its own",
                stacklevel=3,
            )

    def evaluated_before(self, count: int) -> Mapping[str, Any]:
        """What evaluations came to before a step: `extra` says it, or the checkpoint of that step in the folder."""
        found = self.extra[FIT] if FIT in self.extra else self._in_folder(count)
        return dict(found[EVALUATIONS]) if _is_ours(found) else {}

    def _in_folder(self, count: int) -> Any:
        """What the checkpoint of a step has from this loop."""
        path = None if self.folder is None else self.folder / name_of(count)
        if path is None or not (path / MANIFEST).is_file():
            return None
        try:
            return Manifest.read(path).extra.get(FIT)
        except Damaged:  # the run does not come from there then
            return None


def _is_ours(kept: object) -> bool:
    """Whether it is what this loop keeps in `extra`."""
    names = {field.name for field in fields(Watched)}
    return isinstance(kept, Mapping) and EVALUATIONS in kept and kept[EVALUATIONS].keys() == names


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
