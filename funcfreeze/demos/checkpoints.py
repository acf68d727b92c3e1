"""`funcfreeze checkpoint`: tables of what `funcfreeze.checkpoint.looking` sees."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from funcfreeze.checkpoint.folder import is_named_so, step_of
from funcfreeze.checkpoint.looking import Look, differences, look_into, shortened
from funcfreeze.checkpoint.plans import shown_plan
from funcfreeze.fitting.options import EVALUATIONS, FIT, METRICS, of_fit


def show_checkpoints(console: Console, path: Path) -> bool:
    """What is in a checkpoint or in a folder of them; returns whether all are whole.

    Raises:
        ValueError: there is none.
    """
    looks = look_into(path)
    console.print(_table(looks))
    for look in looks:
        for problem in look.problems:
            console.print(f"{look.path.name}: {problem}", markup=False, highlight=False, soft_wrap=True)
    whole = next((look for look in looks if look.manifest is not None), None)
    if whole is not None:
        _show(console, whole)
    return all(not look.problems for look in looks)


def show_differences(console: Console, one: Path, other: Path) -> None:
    """How a checkpoint differs from another.

    Raises:
        ValueError: one of them is damaged, or none.
    """
    lines = list(differences(one, other))
    for line in lines or ["the two are the same"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(looks: Sequence[Look]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("step", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("saved", "torch", ""):
        table.add_column(name, no_wrap=True)
    table.add_column("metrics")
    for look in looks:
        manifest = look.manifest
        size = f"{look.bytes / 1e6:,.2f}"
        if manifest is None:
            table.add_row(
                f"{step_of(look.path):,}" if is_named_so(look.path) else look.path.name, size, "", "", "damaged", ""
            )
        else:
            metrics = of_fit(manifest.extra).get(METRICS, {})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not name.startswith("ff/"))
            saved = manifest.saved[: len("2026-11-26T12:00")].replace("T", " ")
            table.add_row(f"{manifest.step:,}", size, saved, manifest.versions["torch"], "whole", shown)
    return table


def _show(console: Console, look: Look) -> None:
    manifest = look.manifest
    assert manifest is not None
    lines = [f"{look.path.name} of {manifest.options['step']}", *shown_plan(manifest.plan).splitlines()]
    numbers = Counter[str]()
    for name, piece in manifest.pieces.items():
        numbers[name.split("/")[0]] += math.prod(piece["shape"])
    lines.append("numbers: " + ", ".join(f"{count:,} of {name}" for name, count in numbers.items()))
    best = of_fit(manifest.extra).get(EVALUATIONS, {})
    if best.get("step") is not None:
        lines.append(f"best: {best['name']} {best['best']:.6g} at step {best['step']:,} ({best['aim']}), in best/")
    others = {name: value for name, value in manifest.extra.items() if name != FIT or not of_fit(manifest.extra)}
    lines += [f"extra.{name}: {shortened(value)}" for name, value in others.items()]
    if manifest.data is not None:
        lines.append(f"data: {manifest.data}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
