"""A training loop around a step: what one writes by hand, with a line that moves, evaluations and checkpoints.

All it does with the state is `state, metrics = step(state, batch)`.
"""

from __future__ import annotations

import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from funcfreeze.checkpoint.resumable import Resumable
from funcfreeze.checkpoint.saving import Saving, saving, wait_for
from funcfreeze.checkpoint.states import AnyStep, refuse_no_step
from funcfreeze.computation.acting import Names
from funcfreeze.computation.state import State
from funcfreeze.fitting.loggers import Logger
from funcfreeze.fitting.numbers import numbers_in
from funcfreeze.fitting.options import EVALUATIONS, FIT, METRICS, Options, alone_in
from funcfreeze.fitting.passes import batch_after_batch, end_of
from funcfreeze.fitting.progress import Progress
from funcfreeze.fitting.stopping import Wish, deaths_of_workers_after, stopping_between_steps
from funcfreeze.fitting.watching import Watched
from funcfreeze.model.functional import marks_of
from funcfreeze.seeding import kept

BEST = "best"
"""The folder of the best so far, in that of the run."""


class Fitted(NamedTuple):
    """What became of a run.

    Attributes:
        reason: why it ended: "steps", "epochs", "data" (there is no more), "patience", or the signal that stopped it.
        best: the best evaluation; None without any.
        best_step: where that was.
    """

    reason: str
    best: float | None
    best_step: int | None


def fit(
    step: AnyStep,
    state: State,
    data: Iterable[Any],
    *,
    steps: int | None = None,
    epochs: int | None = None,
    evaluate: Callable[[Any], Any] | None = None,
    evaluate_every: int = 500,
    best: str = "min",
    patience: int | None = None,
    folder: str | Path | None = None,
    save_every: int | None = None,
    save_minutes: float | None = 10.0,
    keep: int | None = 3,
    extra: Mapping[str, Any] | None = None,
    generators: Mapping[str, Any] | None = None,
    targets: Names = None,
    log: Logger | Sequence[Logger] = (),
    show_every: int = 50,
    show: bool = True,
) -> tuple[State, Fitted]:
    """Train until so many steps are taken, or so many times through the data.

    Metrics are read off the device where they are shown, every `show_every` steps, or saved. Ctrl-C and SIGTERM let the
    step end, save if there is a folder, and return, with the signal's name as the reason; then a handler of the
    program's own is called. A second Ctrl-C interrupts at once. Where an evaluation, a logger or the data raises, what
    was reached is saved, too; where the step does, it is not, since its batch was taken. One command starts a run and
    goes on with it:

        state, extra = ff.checkpoint.resume(folder, step, data=batches)
        state, fitted = ff.fit(step, state, batches, steps=10_000, folder=folder, extra=extra)

    Args:
        step: a `Step` or an alternation.
        state: where to begin; spent afterwards, if the step is donating.
        data: batches: `ff.checkpoint.Batches`, a DataLoader, any iterable. With `steps` it is gone through again and
            again; an iterator, such as an endless stream, once.
        steps: the count of steps, `state.step`, at which the run ends, those before it included.
        epochs: times through the data: those of `Batches` in all, of anything else from here on.
        evaluate: `evaluate(model) -> number`, or numbers by name, of which the first is the one that is judged; called
            by `step.call`, the model in the mode in which it is. What it draws of Python's, NumPy's and torch's global
            generators is put back: training goes on as it would have without it.
        evaluate_every: so many steps.
        best: "min" or "max", what is better.
        patience: end after so many evaluations without a better one.
        folder: for checkpoints, which are written in the background, and at the end; the best goes to `folder/best`,
            a folder that `resume` takes as well.
        save_every: so many steps; None goes by time.
        save_minutes: so many minutes; None does not.
        keep: so many checkpoints stay.
        extra: what goes into each beside; of a run that goes on what `resume` gave. What evaluations came to, and the
            metrics of the step, are in it under "fit"; if they are not, they are taken from the folder's checkpoint of
            the step at which this begins.
        generators: of the user's own, by name, which go into each as well.
        targets: of averaged twins, which `evaluate` sees in the place of what they are of.
        log: loggers, `log(step, metrics)`, which get what is shown.
        show_every: so many steps.
        show: False is silent.

    Returns:
        The state, and how the run ended.

    Raises:
        ValueError, TypeError: an option is no good, or data gives no batch; whatever the step raises.

    >>> import torch
    >>> from torch import nn
    >>> import funcfreeze as ff
    >>> losses = lambda model, x: {"fit": (model(x) - 1).square().mean()}
    >>> step = ff.Step(nn.Linear(2, 1), losses, {"fit": "*"}, optimizer=ff.optim.adam(0.1))
    >>> data = [torch.randn(4, 2) for _ in range(5)]
    >>> state, fitted = ff.fit(step, step.init(), data, epochs=4, show=False)
    >>> int(state.step), fitted.reason
    (20, 'epochs')
    """
    refuse_no_step(step, state)
    options = Options(
        steps=steps,
        epochs=epochs,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        best=best,
        patience=patience,
        folder=None if folder is None else Path(folder).absolute(),
        save_every=save_every,
        save_minutes=save_minutes,
        keep=keep,
        extra={} if extra is None else extra,
        generators=generators,
        targets=targets,
        loggers=tuple(log) if isinstance(log, Sequence) and not isinstance(log, str) else (log,),
        show_every=show_every,
    )
    options.refuse(step, data)
    count = int(state.step)
    options.look_at_folder(state, data, count)
    end = end_of(data, epochs, count) if epochs is not None else steps
    progress = Progress(end, count) if show else None
    watched = Watched.of(best, options.evaluated_before(count))
    run = _Run(step, data, options, progress, state, begun=count, count=count, watched=watched)
    with stopping_between_steps() as wish, alone_in(options.folder):
        try:
            reason = run.until_it_ends(wish)
        except (Exception, SystemExit) as error:
            wish.is_granted = True
            error.add_note(f"in a run of ff.fit; what was reached is {run.saved_at_last()}")
            raise
        wish.is_granted = True
        told = run.saved_at_last()
    reason = wish.signal or reason  # also one that came last of all
    if progress is not None:
        if run.count == run.begun:
            progress.tell(f"at step {run.count:,}, and nothing to do: {reason}")
        if reason == wish.signal:
            progress.tell(f"stopped by {reason} after step {run.count:,}; {told}. The command was")
            progress.tell(f"  {shlex.join(sys.orig_argv)}")
        progress.end()
    return run.state, Fitted(reason, run.watched.best, run.watched.step)


@dataclass
class _Run:
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

    def until_it_ends(self, wish: Wish) -> str:
        """Take steps until there is a reason to stop, which is returned."""
        steps = self.options.steps
        if steps is not None and self.count >= steps:
            return "steps"
        if self._is_out_of_patience():
            return "patience"
        for batch in self._batches(wish):
            with deaths_of_workers_after(wish):
                self._take(batch)
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
            try:
                batch = next(batches)
            except StopIteration:
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
        marks = marks_of(self.state.params)
        try:
            with kept():
                found = self.step.call(self.state, evaluate, targets=self.options.targets)
        except BaseException:
            if marks_of(self.state.params) != marks:
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
