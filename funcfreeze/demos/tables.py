"""What the demos found, as tables for a terminal, and in words."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

from funcfreeze.demos.finetune import Outcome
from funcfreeze.demos.speed import Timings
from funcfreeze.demos.trials import MEASURES, Trials, compare, mean_and_spread

TITLES = {
    "source_accuracy": "source accuracy",
    "target_accuracy": "target accuracy",
    "domain_probe": "domain probe",
}

CONTENDERS = {
    "recipe": "the recipe, 3 backwards, torch.optim.Adam",
    "recipe, fused Adam": "  with Adam(fused=True)",
    "reversal": "gradient-reversal layer, torch.optim.Adam",
    "reversal, fused Adam": "  with Adam(fused=True)",
    "routed": "funcfreeze, ff.optim.adam",
}

FEWEST_ROUNDS = 5
"""With fewer rounds than this nothing is said about who is faster."""


def trials_table(trials: Trials) -> Table:
    """Every seed, the mean and the spread, both runs side by side."""
    table = _table()
    table.add_column("seed", justify="right")
    for measure in MEASURES:
        table.add_column(TITLES[measure], justify="right")
    found = [[trials.outcome(run, measure) for run in trials.curves] for measure in MEASURES]
    for index, seed in enumerate(trials.seeds):
        table.add_row(str(seed), *(_arrow([values[index] for values in pair]) for pair in found))
    table.add_section()
    table.add_row("mean", *(_arrow([statistics.fmean(values) for values in pair]) for pair in found), style="bold")
    if len(trials.seeds) > 1:
        table.add_row("std", *(_arrow([statistics.stdev(values) for values in pair]) for pair in found))
    return table


def _arrow(values: Sequence[float]) -> str:
    return " -> ".join(f"{value:.3f}" for value in values)


def trials_in_words(trials: Trials) -> Iterator[str]:
    """What may be said about the adversarial run against the baseline."""
    first, last = trials.curves
    for measure in MEASURES:
        yield compare(TITLES[measure], trials.outcome(first, measure), trials.outcome(last, measure))
    accuracy, step = trials.best(first, "target_accuracy")
    yield f"The {first}'s best mean target accuracy at any time was {accuracy:.3f}, after {step} steps."
    yield "A domain probe of 0.5 is chance: a linear classifier could not tell the domain any more."


def speed_table(timings: Timings) -> Table:
    """The median step of every contender."""
    table = _table()
    table.add_column("how")
    table.add_column("ms", justify="right")
    table.add_column("against\nfuncfreeze", justify="right")
    routed = timings.milliseconds["routed"]
    for name, milliseconds in timings.milliseconds.items():
        table.add_row(
            CONTENDERS[name],
            f"{milliseconds:.1f}",
            f"{milliseconds / routed:.2f} x",
            style="bold" if name == "routed" else None,
        )
    return table


def speed_in_words(timings: Timings) -> Iterator[str]:
    """What the table comes to, and under which circumstances it was measured."""
    taken = timings.milliseconds
    if timings.rounds < FEWEST_ROUNDS:
        yield (
            f"Only {timings.rounds} of {FEWEST_ROUNDS} rounds were done in time, too few to go by: the machine is slow "
            "or busy. Try again with a larger --speed-seconds."
        )
    else:
        yield (
            f"A step takes {taken['routed'] / taken['recipe']:.2f} of the time of the recipe, and "
            f"{taken['routed'] / taken['reversal, fused Adam']:.2f} of that of a reversal layer under as fast an "
            "optimizer."
        )
    yield (
        f"Medians of {timings.rounds} steps each, taken in turns on fresh random batches; {timings.threads} threads, "
        f"torch {timings.torch}; the gradients of the three agree to {timings.disagreement:.0e}."
    )


def finetune_in_words(found: Mapping[str, Sequence[Outcome]]) -> str:
    """How much of the backward's work is left."""
    head, everything = (outcomes[0].backward for outcomes in found.values())
    return (
        f"With the body frozen a backward takes {head:,} floating-point operations, counted as they are dispatched; "
        f"training everything takes {everything:,}, {everything / head:.0f} times as many."
    )


def finetune_table(found: Mapping[str, Sequence[Outcome]]) -> Table:
    """Both ways of fine-tuning side by side, each over all seeds."""
    table = _table()
    table.add_column("")
    for way in found:
        table.add_column(way, justify="right")
    for title, cells in _finetune_rows(found):
        table.add_row(title, *cells)
    return table


def _finetune_rows(found: Mapping[str, Sequence[Outcome]]) -> Iterator[tuple[str, list[str]]]:
    ways = [*found.values()]
    for digits, pairs in (
        ("5 to 9", [[outcome.new_accuracy for outcome in outcomes] for outcomes in ways]),
        ("0 to 4", [[outcome.old_accuracy for outcome in outcomes] for outcomes in ways]),
    ):
        for index, when in enumerate(("before", "after")):
            yield f"accuracy on {digits} {when}", [mean_and_spread([pair[index] for pair in way]) for way in pairs]
    for module in ways[0][0].changes:
        yield f"largest change in {module}", [_change([way.changes[module] for way in outcomes]) for outcomes in ways]
    yield "forward, MFLOP a step", [f"{outcomes[0].forward / 1e6:.2f}" for outcomes in ways]
    yield "backward, MFLOP a step", [f"{outcomes[0].backward / 1e6:.2f}" for outcomes in ways]


def _change(changes: Sequence[float]) -> str:
    return f"{max(changes):.3f}" if any(changes) else "bit-identical"


def _table() -> Table:
    return Table(box=box.SIMPLE, pad_edge=False)
