"""A run under way: step after step, what is due after each, and what was reached saved at last."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from funcfreeze.checkpoint.batches import Batches
from funcfreeze.checkpoint.resumable import Resumable
from funcfreeze.checkpoint.saving import Saving, saving, wait_for
from funcfreeze.checkpoint.states import AnyStep
from funcfreeze.computation.state import State, by_path
from funcfreeze.fitting.numbers import numbers_in
from funcfreeze.fitting.options import EVALUATIONS, FIT, METRICS, Options
from funcfreeze.fitting.passes import batch_after_batch
from funcfreeze.fitting.progress import Progress
from funcfreeze.fitting.stopping import Deaths, Wish
from funcfreeze.fitting.watching import Watched
from funcfreeze.model.functional import marks_of
from funcfreeze.seeding import kept

BEST = "best"
"""The folder of the best so far, in that of the run."""


@dataclass
class Run:
    """A run under way: what it was told, and what changes from step to step.

    Attributes:
        begun: the step at which it began.
        watched: what evaluations came to.
        evaluated: the numbers of the last one, and `evaluated_at` where it was.
        metrics: those of the last step, wherever they are computed.
        shown_at: where they were shown last.
        saved: when a checkpoint was, by a clock that only goes on.
        saved_with: of which step it was, with which evaluations, and how it went.
        spoiled: why what was reached is no point of the run; empty if it is one.
        deaths: of workers, which are told between steps.
    """

    step: AnyStep
    data: Any
    options: Options
    progress: Progress | None
    state: State
    begun: int
    count: int
    watched: Watched
    evaluated: Mapping[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    metrics: Mapping[str, Any] = field(default_factory=dict)
    shown_at: int = -1
    saved: float = field(default_factory=time.monotonic)
    saved_with: tuple[int, Watched, Saving] | None = None
    spoiled: str = ""
    deaths: Deaths = field(default_factory=Deaths)

    def until_it_ends(self, wish: Wish) -> str:
        """Take steps until there is a reason to stop, which is returned."""
        steps = self.options.steps
        if steps is not None and self.count >= steps:
            return "steps"
        if self._is_out_of_patience():
            return "patience"
        for batch in self._batches(wish):
            self.deaths.hold()
            self._take(batch)
            self.deaths.tell(is_stopping=wish.signal is not None)
            if self._is_out_of_patience():
                return "patience"
            if wish.signal is not None:
                return wish.signal
            if self.count == steps:
                return "steps"
        if wish.signal is not None:
            return wish.signal
        if self.count > self.begun:
            self._look(is_last=True)
        return "epochs" if steps is None else "data"

    def _batches(self, wish: Wish) -> Iterator[Any]:
        """The data, until it ends or fails where the run is to stop: the workers of a loader get the signal, too."""
        batches = batch_after_batch(self.data, self.options.epochs)
        while True:
            self.spoiled = "" if _counts_what_it_gave(self.data) else "the data had begun its next batch"
            try:
                batch = next(batches)
            except StopIteration:
                self.spoiled = ""
                return
            except Exception:
                if wish.signal is None:
                    raise
                return
            yield batch

    def _take(self, batch: Any) -> None:
        """One step, and what is due after it."""
        self.spoiled = "the step after it had taken its batch"
        self.state, self.metrics = self.step(self.state, batch)
        self.count += 1
        self.spoiled = ""
        self._look(is_last=self.count == self.options.steps)
        if self._is_time_to_save():
            self._save_here(background=True)

    def _look(self, is_last: bool) -> None:
        """Evaluate and show, each where it is due and has not been done yet."""
        options, count = self.options, self.count
        is_evaluated = options.evaluate is not None and self.evaluated_at != count
        is_evaluated &= is_last or count % options.evaluate_every == 0
        if is_evaluated:
            self._evaluate()
        is_shown = self.shown_at != count and (is_last or count % options.show_every == 0)
        if not is_shown and not is_evaluated:
            return
        told = numbers_in(self.metrics) if is_shown and (self.progress is not None or options.loggers) else {}
        for logger in options.loggers:
            logger.log(count, {**told, **(self.evaluated if is_evaluated else {})})
        if is_shown:
            self.shown_at = count
            if self.progress is not None:
                self.progress.show(count, {**told, **self.evaluated})

    def _evaluate(self) -> None:
        evaluate = self.options.evaluate
        assert evaluate is not None
        marks = marks_of({**self.state.params, **by_path(self.state.targets)})
        try:
            with kept():
                found = self.step.call(self.state, evaluate, targets=self.options.targets)
        except BaseException:
            if marks_of({**self.state.params, **by_path(self.state.targets)}) != marks:
                self.spoiled = "evaluate had written to its parameters"
            raise
        numbers = numbers_in(found if isinstance(found, Mapping) else {"value": found})
        if not numbers:
            raise TypeError(f"evaluate returns a number, or numbers by name; it returned {type(found).__name__}")
        name, judged = next(iter(numbers.items()))
        self.watched = self.watched.after(self.count, name, judged)
        self.evaluated, self.evaluated_at = {f"eval/{name}": value for name, value in numbers.items()}, self.count
        folder = self.options.folder
        if folder is not None and self.watched.step == self.count:
            self._save(folder / BEST, keep=1, background=True)

    def _is_out_of_patience(self) -> bool:
        return self.options.patience is not None and self.watched.since >= self.options.patience

    def _is_time_to_save(self) -> bool:
        if self.options.folder is None:
            return False
        if self.options.save_every is not None:
            return self.count % self.options.save_every == 0
        minutes = self.options.save_minutes
        return minutes is not None and time.monotonic() - self.saved >= 60 * minutes

    def _save_here(self, *, background: bool) -> Path:
        assert self.options.folder is not None
        self.saved = time.monotonic()
        begun = self._save(self.options.folder, keep=self.options.keep, background=background)
        self.saved_with = self.count, self.watched, begun
        return begun.path

    def _save(self, folder: Path, *, keep: int | None, background: bool) -> Saving:
        of_fit = {EVALUATIONS: self.watched.to_dict(), METRICS: numbers_in(self.metrics)}
        return saving(
            folder,
            self.step,
            self.state,
            data=self.data if isinstance(self.data, Resumable) else None,
            extra={**self.options.extra, FIT: of_fit},
            generators=self.options.generators,
            keep=keep,
            background=background,
        )

    def saved_at_last(self) -> str:
        """Save what was reached, and say where; a failure is a warning, since the state is still to be had."""
        if self.options.folder is None:
            return "not saved, since there is no folder"
        if self.spoiled:
            is_one = self.saved_with is not None and self.saved_with[2].is_there()
            before = f"; the checkpoint before is of step {self.saved_with[0]:,}" if self.saved_with and is_one else ""
            return f"step {self.count:,}, not saved, since {self.spoiled}{before}"
        if self.count == self.begun:
            return "not saved, since no step was taken"
        try:
            at = self._saved_already() or self._save_here(background=False)
        except Exception as error:
            warnings.warn(f"no checkpoint was saved: {type(error).__name__}: {error}", stacklevel=3)
            return f"not saved: {error}"
        wait_for(self.options.folder / BEST)
        return f"saved as {at}"

    def _saved_already(self) -> Path | None:
        """Where what was reached is, if it was saved with the last step."""
        if self.saved_with is None or self.saved_with[:2] != (self.count, self.watched):
            return None
        begun = self.saved_with[2]
        return begun.path if begun.is_there() else None


def _counts_what_it_gave(data: Any) -> bool:
    """Whether its position is that after the last batch it gave, also where the next one fails.

    One without workers has often counted before it makes a batch; one with workers goes by what they delivered.
    """
    return not isinstance(data, Resumable) or isinstance(data, Batches) or bool(getattr(data, "num_workers", 0))
