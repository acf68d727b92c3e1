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

from torch import nn

from funcfreeze.checkpoint.batches import Batches
from funcfreeze.checkpoint.resumable import Resumable
from funcfreeze.checkpoint.saving import AnyStep, checked, save, wait_for
from funcfreeze.computation.acting import Names
from funcfreeze.computation.state import State
from funcfreeze.fitting.loggers import Logger
from funcfreeze.fitting.numbers import numbers_in
from funcfreeze.fitting.progress import Progress
from funcfreeze.fitting.stopping import Wish, stopping_between_steps
from funcfreeze.fitting.watching import AIMS, Watched

BEST = "best"
"""The folder of the best so far, in that of the run."""

FIT = "fit"
"""Where `extra` of a checkpoint keeps what evaluations came to."""


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


@dataclass
class _Run:
    """A run under way: what changes from step to step beside the state."""

    state: State
    count: int
    watched: Watched
    evaluated: dict[str, float] = field(default_factory=dict)
    saved: float = field(default_factory=time.monotonic)
    looked: int = -1


@dataclass(frozen=True, eq=False)
class _Plan:
    """What was asked for; see `fit`."""

    step: AnyStep
    data: Any
    evaluate: Callable[[nn.Module], Any] | None
    evaluate_every: int
    patience: int | None
    folder: Path | None
    save_every: int | None
    save_minutes: float | None
    keep: int | None
    generators: Mapping[str, Any] | None
    targets: Names
    extra: Mapping[str, Any]
    log: Sequence[Logger]
    show_every: int
    progress: Progress | None


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

    Metrics are read off the device where they are shown, every `show_every` steps, and at no other step. Ctrl-C and
    SIGTERM let the step end, save if there is a folder, and return; a second Ctrl-C interrupts at once. One command
    starts a run and goes on with it. Where an evaluation, a logger or the data raises, what was reached is saved, too:

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
            by `step.call`, the model in the mode in which it is.
        evaluate_every: so many steps.
        best: "min" or "max", what is better.
        patience: end after so many evaluations without a better one.
        folder: for checkpoints, which are written in the background, and at the end; the best goes to `folder/best`.
        save_every: so many steps; None goes by time.
        save_minutes: so many minutes; None does not.
        keep: so many checkpoints stay.
        extra: what goes into each beside; of a run that goes on what `resume` gave.
        generators: of the user's own, by name, which go into each as well.
        targets: of averaged twins, which `evaluate` sees in the place of what they are of.
        log: loggers, `log(step, metrics)`, which get what is shown.
        show_every: so many steps.
        show: False is silent.

    Returns:
        The state, and how the run ended.

    Raises:
        ValueError, TypeError: an option is no good; whatever the step raises.

    >>> import torch
    >>> import funcfreeze as ff
    >>> losses = lambda model, x: {"fit": (model(x) - 1).square().mean()}
    >>> step = ff.Step(nn.Linear(2, 1), losses, {"fit": "*"}, optimizer=ff.optim.adam(0.1))
    >>> data = [torch.randn(4, 2) for _ in range(5)]
    >>> state, fitted = ff.fit(step, step.init(), data, epochs=4, show=False)
    >>> int(state.step), fitted.reason
    (20, 'epochs')
    """
    loggers = tuple(log) if isinstance(log, Sequence) else (log,)
    kept = {} if extra is None else dict(extra)
    counts = {
        "evaluate_every": evaluate_every,
        "show_every": show_every,
        "save_every": save_every,
        "patience": patience,
    }
    _refuse(steps, epochs, data, best, counts, loggers)
    if patience is not None and evaluate is None:
        raise ValueError("fit: patience= waits for better evaluations; give evaluate=, too")
    if not isinstance(kept.get(FIT, {}), Mapping):
        raise ValueError(f"fit: extra[{FIT!r}] is where fit keeps what evaluations came to; call yours otherwise")
    if folder is not None:  # now, and not when all is done
        checked(data if isinstance(data, Resumable) else None, kept, keep)
        Path(folder).mkdir(parents=True, exist_ok=True)
    if folder is not None and not isinstance(data, Resumable):
        warnings.warn(
            f"{type(data).__name__} cannot say where it is: a run that is stopped will go on at the beginning of its "
            "data; ff.checkpoint.Batches and torchdata's StatefulDataLoader can",
            stacklevel=2,
        )
    watched = Watched.of(best, kept.pop(FIT, {}))
    run = _Run(state, int(state.step), watched)
    total = steps if steps is not None else _end_of(data, epochs, run.count)
    plan = _Plan(
        step,
        data,
        evaluate,
        evaluate_every,
        patience,
        None if folder is None else Path(folder).absolute(),
        save_every,
        save_minutes,
        keep,
        generators,
        targets,
        kept,
        loggers,
        show_every,
        Progress(total, run.count) if show else None,
    )
    with stopping_between_steps() as wish:
        try:
            reason = _run(plan, run, _batches(data, steps, epochs), steps, wish)
        except Exception as error:
            _save_what_there_is(plan, run, wish, error)
            raise
        if plan.folder is not None:
            wish.is_granted = True
            at = _save(plan, run, background=False)
            wait_for(plan.folder / BEST)
            if plan.progress is not None and reason == wish.signal:
                plan.progress.tell(f"stopped by {reason} after step {run.count:,}; saved as {at}. It goes on with")
                plan.progress.tell(f"  {shlex.join(sys.orig_argv)}")
    if plan.progress is not None:
        plan.progress.end()
    return run.state, Fitted(reason, run.watched.best, run.watched.step)


def _save_what_there_is(plan: _Plan, run: _Run, wish: Wish, error: Exception) -> None:
    """Before an error goes on: nothing that was reached is to be lost; the error says what became of it."""
    if plan.folder is None:
        return
    wish.is_granted = True
    try:
        error.add_note(f"what was reached is saved as {_save(plan, run, background=False)}")
    except Exception as other:
        error.add_note(f"what was reached could not be saved: {type(other).__name__}: {other}")


def _run(plan: _Plan, run: _Run, batches: Iterator[Any], steps: int | None, wish: Wish) -> str:
    """Take steps until there is a reason to stop, which is returned."""
    if steps is not None and run.count >= steps:
        return "steps"
    if _is_out_of_patience(plan, run):
        return "patience"
    metrics: Mapping[str, Any] = {}
    for batch in batches:
        run.state, metrics = plan.step(run.state, batch)
        run.count += 1
        is_last = run.count == steps
        _look(plan, run, metrics, is_last)
        if _is_time_to_save(plan, run):
            _save(plan, run, background=True)
        if _is_out_of_patience(plan, run):
            return "patience"
        if wish.signal is not None:
            return wish.signal
        if is_last:
            return "steps"
    _look(plan, run, metrics, is_last=True)
    return "epochs" if steps is None else "data"


def _is_out_of_patience(plan: _Plan, run: _Run) -> bool:
    return plan.patience is not None and run.watched.since >= plan.patience


def _look(plan: _Plan, run: _Run, metrics: Mapping[str, Any], is_last: bool) -> None:
    """Evaluate and show, where it is due and was not done after this step."""
    is_due = run.looked != run.count
    is_evaluated = plan.evaluate is not None and is_due and (run.count % plan.evaluate_every == 0 or is_last)
    if is_evaluated:
        _evaluate(plan, run)
    if is_due and metrics and (run.count % plan.show_every == 0 or is_last):
        _show(plan, run, metrics, run.evaluated if is_evaluated else {})
    elif is_evaluated:
        _log(plan, run, run.evaluated)
    if is_last or is_evaluated or run.count % plan.show_every == 0:
        run.looked = run.count


def _evaluate(plan: _Plan, run: _Run) -> None:
    assert plan.evaluate is not None
    found = plan.step.call(run.state, plan.evaluate, targets=plan.targets)
    numbers = numbers_in(found if isinstance(found, Mapping) else {"value": found})
    if not numbers:
        raise TypeError(f"evaluate returns a number, or numbers by name; it returned {type(found).__name__}")
    run.watched = run.watched.after(run.count, next(iter(numbers.values())))
    run.evaluated = {f"eval/{name}": value for name, value in numbers.items()}
    if plan.folder is not None and run.watched.step == run.count:
        save(plan.folder / BEST, plan.step, run.state, extra=_extra(plan, run), keep=1, background=True)


def _show(plan: _Plan, run: _Run, metrics: Mapping[str, Any], evaluated: Mapping[str, float]) -> None:
    if plan.progress is None and not plan.log:
        return
    numbers = numbers_in(metrics)
    _log(plan, run, {**numbers, **evaluated})
    if plan.progress is not None:
        plan.progress.show(run.count, {**numbers, **run.evaluated})


def _log(plan: _Plan, run: _Run, numbers: Mapping[str, float]) -> None:
    for logger in plan.log:
        logger.log(run.count, numbers)


def _is_time_to_save(plan: _Plan, run: _Run) -> bool:
    if plan.folder is None:
        return False
    if plan.save_every is not None:
        return run.count % plan.save_every == 0
    return plan.save_minutes is not None and time.monotonic() - run.saved >= 60 * plan.save_minutes


def _save(plan: _Plan, run: _Run, *, background: bool) -> Path:
    assert plan.folder is not None
    run.saved = time.monotonic()
    where = plan.data if isinstance(plan.data, Resumable) else None
    return save(
        plan.folder,
        plan.step,
        run.state,
        data=where,
        extra=_extra(plan, run),
        generators=plan.generators,
        keep=plan.keep,
        background=background,
    )


def _extra(plan: _Plan, run: _Run) -> dict[str, Any]:
    return {**plan.extra, FIT: run.watched.to_dict()}


def _batches(data: Iterable[Any], steps: int | None, epochs: int | None) -> Iterator[Any]:
    """Batch after batch: through the data so many times, or without end where it can be gone through again."""
    passes = empty = 0
    while True:
        if epochs is not None and (data.epoch if isinstance(data, Batches) else passes) >= epochs:
            return
        empty += 1
        for batch in data:
            empty = 0
            yield batch
        passes += 1
        if empty > 1 or isinstance(data, Iterator):  # a pass that was stopped at its very end has nothing left
            return


def _end_of(data: Any, epochs: int | None, count: int) -> int | None:
    """The count at which so many epochs end, if the data says how long it is."""
    assert epochs is not None
    if isinstance(data, Batches):
        return count + (epochs - data.epoch) * len(data) - data.position
    try:
        return count + epochs * len(data)
    except TypeError:  # a stream, or a loader of one
        return None


def _refuse(
    steps: int | None,
    epochs: int | None,
    data: object,
    best: str,
    counts: Mapping[str, int | None],
    loggers: Sequence[Any],
) -> None:
    """Raise for all problems with the options at once."""
    problems = []
    if (steps is None) == (epochs is None):
        problems.append(f"one of steps= and epochs= says when it ends, got steps={steps!r} and epochs={epochs!r}")
    if best not in AIMS:
        problems.append(f"best is 'min' or 'max', got {best!r}")
    if not isinstance(data, Iterable):
        problems.append(f"data is iterable, batch after batch; got {type(data).__name__}")
    problems += [
        f"{name} is a whole number, at least 1, got {value!r}"
        for name, value in {**counts, "epochs": epochs}.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
    ]
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
        problems.append(f"steps is a whole number, got {steps!r}")
    problems += [
        f"a logger has a method log(step, metrics), {logger!r} has none" for logger in loggers if _is_none(logger)
    ]
    if problems:
        raise ValueError(f"fit: {'; '.join(problems)}")


def _is_none(logger: Any) -> bool:
    return not callable(getattr(logger, "log", None))
