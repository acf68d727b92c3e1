"""A training loop around a step: what one writes by hand, with a line that moves, evaluations and checkpoints.

All it does with the state is `state, metrics = step(state, batch)`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from funcfreeze.checkpoint.states import AnyStep, refuse_no_step
from funcfreeze.computation.acting import Names
from funcfreeze.computation.state import State
from funcfreeze.fitting.loggers import Logger
from funcfreeze.fitting.options import Options, alone_in, warn_of_epochs_gone
from funcfreeze.fitting.passes import end_of
from funcfreeze.fitting.progress import Progress
from funcfreeze.fitting.running import Run
from funcfreeze.fitting.stopping import stopping_between_steps
from funcfreeze.fitting.watching import Watched


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
    program's own is called. A second Ctrl-C interrupts at once. Where an evaluation, a logger or `Batches` raise, what
    was reached is saved, too; not so where the step does, which had taken a batch, or data that had begun another. One
    command starts a run and goes on with it:

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
    warn_of_epochs_gone(data, epochs)
    end = end_of(data, epochs, count) if epochs is not None else steps
    progress = Progress(end, count) if show else None
    watched = Watched.of(best, options.evaluated_before(count))
    run = Run(step, data, options, progress, state, begun=count, count=count, watched=watched)
    with stopping_between_steps() as wish, alone_in(options.folder):
        run.deaths.hold()
        try:
            try:
                reason = run.until_it_ends(wish)
            except (Exception, SystemExit) as error:
                wish.is_granted = True
                signal = f", and {wish.signal} had come" if wish.signal is not None else ""
                error.add_note(f"in a run of ff.fit{signal}; what was reached is {run.saved_at_last()}")
                raise
            wish.is_granted = True
            told = run.saved_at_last()
        finally:
            run.deaths.release()
            run.deaths.tell(is_stopping=True)
        reason = wish.signal or reason  # also one that came last of all
        if progress is not None:
            if run.count == run.begun:
                progress.tell(f"at step {run.count:,}, and nothing to do: {reason}")
            if reason == wish.signal:
                progress.tell(f"stopped by {reason} after step {run.count:,}; {told}. The command was")
                progress.tell(f"  {shlex.join(sys.orig_argv)}")
            progress.end()
    return run.state, Fitted(reason, run.watched.best, run.watched.step)
