"""The demos as one sees them: each computes, and says what it found as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from torch import Tensor

from funcfreeze.demos import adversarial, finetune, speed
from funcfreeze.demos.files import results, write_json
from funcfreeze.demos.plots import draw_curves
from funcfreeze.demos.progress import progress
from funcfreeze.demos.tables import finetune_table, speed_in_words, speed_table, trials_in_words, trials_table
from funcfreeze.demos.trials import Trials, run_trials

UPDATE_EVERY = 10
"""After how many steps the progress is told: reading a loss waits for it."""


def show_adversarial(
    console: Console, out: Path, seeds: range, settings: adversarial.Settings, *, seconds: float, size: speed.Size
) -> bool:
    """The main demo; whether the step was verified. If not, it ends there.

    Args:
        console: where to say it.
        out: the folder for `curves.png`, `plan.json` and `results.json`, made if need be.
        seeds: train and measure for each of these.
        settings: of the training.
        seconds: how long to measure the speed.
        size: of the network whose speed is measured.

    Raises:
        OSError: `out` cannot be written to. This is found before the training.
    """
    step = adversarial.make_step(seeds.start, adversarial.WEIGHTS["adversarial"], settings)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "plan.json", step.plan.to_dict())
    _say(console, "Which loss updates what", str(step.plan))
    report = adversarial.verify_step(seeds.start, settings)
    _say(console, "Proof against the recipe, on this model and data", str(report))
    if not report.ok:
        return False
    trials = _train(console, seeds, settings)
    console.print(trials_table(trials))
    for sentence in trials_in_words(trials):
        _line(console, sentence)
    _line(console, "A domain probe of 0.5 is chance: no linear classifier can tell the domain any more.\n")
    with progress(console, "timing") as show:
        timings = speed.measure(seconds, size, lambda share: show(share, ""))
    console.print(speed_table(timings, size))
    _line(console, speed_in_words(timings) + "\n")
    draw_curves(trials, out / "curves.png")
    write_json(out / "results.json", results(trials, report, timings, settings))
    _line(console, f"wrote {out / 'curves.png'}, {out / 'plan.json'} and {out / 'results.json'}")
    return True


def _train(console: Console, seeds: range, settings: adversarial.Settings) -> Trials:
    runs = [*adversarial.WEIGHTS]
    total = len(seeds) * len(runs) * settings.steps
    with progress(console, "training") as show:

        def watch(run: str, seed: int, step: int, losses: Mapping[str, Tensor]) -> None:
            if step % UPDATE_EVERY == 0 or step == settings.steps:
                done = (seeds.index(seed) * len(runs) + runs.index(run)) * settings.steps + step
                show(done / total, f"seed {seed} {run:11} {_shown(losses)}")

        return run_trials(settings, seeds, watch)


def show_finetune(console: Console, seeds: range, steps: int) -> None:
    """The second demo: a new head over a frozen body, and over one that is trained on."""
    found: dict[str, list[finetune.Outcome]] = {way: [] for way in finetune.ROUTES}
    parts = 1 + len(found)
    with progress(console, "training") as show:
        for index, seed in enumerate(seeds):

            def watch(step: int, losses: Mapping[str, Tensor], part: int, seed: int = seed, index: int = index) -> None:
                if step % UPDATE_EVERY == 0 or step == steps:
                    share = (index * parts + part + step / steps) / (len(seeds) * parts)
                    show(share, f"seed {seed} {_shown(losses)}")

            model = finetune.pretrain(seed, steps, lambda step, losses: watch(step, losses, 0))  # noqa: B023
            for part, (way, routes) in enumerate(finetune.ROUTES.items(), start=1):
                found[way].append(
                    finetune.finetune(
                        model, routes, seed, steps, lambda step, losses, part=part: watch(step, losses, part)
                    )
                )
    console.print(finetune_table(found))


def _shown(losses: Mapping[str, Tensor]) -> str:
    return " ".join(f"{name} {float(loss):.3f}" for name, loss in losses.items())


def _say(console: Console, title: str, text: str) -> None:
    console.print(title, style="bold", markup=False, highlight=False)
    _line(console, text + "\n")


def _line(console: Console, text: str) -> None:
    """Text as it is: nothing in it is markup, and a wide table is not wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
