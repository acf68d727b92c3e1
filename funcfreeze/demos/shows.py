"""The demos as one sees them: each computes, and says what it found as it goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from funcfreeze.demos import adversarial, finetune, speed
from funcfreeze.demos.files import results, write_json
from funcfreeze.demos.plots import draw_curves
from funcfreeze.demos.progress import Show, progress
from funcfreeze.demos.tables import (
    finetune_in_words,
    finetune_table,
    speed_in_words,
    speed_table,
    trials_in_words,
    trials_table,
)
from funcfreeze.demos.trials import Trials, run_trials

UPDATE_EVERY = 10
"""After how many steps the progress is told: reading a loss waits for it."""


def show_adversarial(
    console: Console,
    out: Path,
    seeds: range,
    settings: adversarial.Settings,
    *,
    seconds: float,
    size: speed.Size,
    resume: bool = False,
) -> bool:
    """The main demo; whether the step was verified. If not, it ends there.

    Args:
        console: where to say it.
        out: the folder for `curves.png`, `plan.json` and `results.json`, made if need be.
        seeds: train and measure for each of these.
        settings: of the training.
        seconds: how long to measure the speed.
        size: of the network whose speed is measured.
        resume: whether to go on with the training that was stopped.

    Raises:
        Stopped: by a signal, while training.
        OSError: `out` cannot be written to. This is found before the training.
    """
    step = adversarial.make_step(seeds.start, adversarial.WEIGHTS["adversarial"], settings)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "plan.json", step.plan.to_dict())
    _block(console, "Which loss updates what", str(step.plan))
    report = adversarial.verify_step(seeds.start, settings)
    _block(console, "Proof against the recipe, on this model and data", str(report))
    if not report.ok:
        return False
    kept = out / "checkpoints"
    if not resume:
        shutil.rmtree(kept, ignore_errors=True)
    trials = _train(console, seeds, settings, kept)
    _title(console, f"\nHeld-out images after the last step, {' -> '.join(trials.curves)}")
    console.print(trials_table(trials))
    for sentence in trials_in_words(trials):
        _prose(console, sentence)
    console.print()
    with progress(console, "timing") as show:
        timings = speed.measure(seconds, size, lambda share: show(share, ""))
    _title(
        console,
        f"\nOne training step: encoder of {size.layers} x {size.width}, {size.heads} class and {size.heads} domain "
        f"heads, batch {size.batch}",
    )
    console.print(speed_table(timings))
    for sentence in speed_in_words(timings):
        _prose(console, sentence)
    console.print()
    draw_curves(trials, out / "curves.png")
    write_json(out / "results.json", results(trials, report, timings, settings))
    shutil.rmtree(kept, ignore_errors=True)
    _verbatim(console, f"wrote {out / 'curves.png'}, {out / 'plan.json'} and {out / 'results.json'}")
    return True


def _train(console: Console, seeds: range, settings: adversarial.Settings, folder: Path) -> Trials:
    watch = _watch(seeds, [*adversarial.WEIGHTS], settings.steps)
    with progress(console, "training") as tell:
        return run_trials(settings, seeds, partial(watch, tell), folder)


def show_finetune(console: Console, seeds: range, steps: int) -> None:
    """The second demo: a new head over a frozen body, and over one that is trained on."""
    for way, routes in finetune.ROUTES.items():
        plan = finetune.make_step(finetune.make_model(seeds.start), routes).plan
        _block(console, f"Which loss updates what: {way}", str(plan))
    watch = _watch(seeds, [finetune.PRETRAINING, *finetune.ROUTES], steps)
    with progress(console, "training") as tell:
        found = finetune.run(seeds, steps, partial(watch, tell))
    _title(console, f"\nFine-tuning on the digits 5 to 9, {len(seeds)} seeds, held-out images")
    console.print(finetune_table(found))
    _prose(console, finetune_in_words(found))


def _watch(seeds: range, runs: Sequence[str], steps: int) -> Callable[[Show, int, str, int, Mapping[str, Any]], None]:
    """Tell a progress how far a training of all runs for all seeds is."""
    width = max(map(len, runs))

    def watch(show: Show, seed: int, run: str, step: int, losses: Mapping[str, Any]) -> None:
        if step % UPDATE_EVERY == 0 or step == steps:
            done = (seeds.index(seed) * len(runs) + runs.index(run)) * steps + step
            shown = " ".join(f"{name} {float(loss):.3f}" for name, loss in losses.items())
            show(done / (len(seeds) * len(runs) * steps), f"seed {seed} {run:{width}} {shown}")

    return watch


def _block(console: Console, title: str, text: str) -> None:
    _title(console, title)
    _verbatim(console, text + "\n")


def _title(console: Console, text: str) -> None:
    console.print(text, style="bold", markup=False, highlight=False)


def _prose(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _verbatim(console: Console, text: str) -> None:
    """Text whose lines stay as they are, however narrow the terminal."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
