"""`python -m bench`: workloads x peers x measures; `report FILE.json`: tables and a picture of that.

`check`: whether all peers make the same update, in float64, without measuring; `bars`: the timed bars; `startup`: CPU
seconds to a first step; `runs`: what `ff.fit` and checkpoints add to a loop.
What is measured is printed as tables; `--out FILE.json` keeps it as JSON besides.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import workloads
from bench.bars import listing, measure
from bench.long_runs import long_runs
from bench.machine import describe, settle, versions
from bench.peers import DEFAULTS, PEERS
from bench.plot import draw
from bench.run import MEASURES, Options, run
from bench.startup import startup, summary
from bench.table import document, put_into, section

ROOT = Path(__file__).parent.parent


def parser() -> argparse.ArgumentParser:
    """Options before the command's name are the matrix's own."""
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    made.add_argument("command", nargs="?", choices=[*COMMANDS, "report", "check"], default="matrix")
    made.add_argument("file", nargs="?", type=Path, help="with `report`: the JSON to report on")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--scale", choices=workloads.SCALES, help="small on the CPU, large on CUDA unless told otherwise")
    made.add_argument("--rounds", type=int, help="rounds in which every contender runs once; 30, or 3 processes")
    made.add_argument("--out", type=Path, help="keep the measures as JSON there, too; tables are printed either way")
    made.add_argument("--readme", type=Path, help="with `report`: a README whose section is replaced")
    every = {**workloads.WORKLOADS, **workloads.MEETINGS}
    for name, choices, chosen in (
        ("workloads", every, workloads.WORKLOADS),
        ("peers", PEERS, DEFAULTS),
        ("measures", MEASURES, MEASURES),
    ):
        made.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(chosen), metavar="NAME")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    options = parser().parse_args(arguments)
    settle(double=options.command == "check")
    if options.command == "report":
        if options.file is None:
            sys.exit("python -m bench report FILE.json: which file?")
        report(options.file, options.readme)
        return
    if options.command == "check":
        check(options)
        return
    data: dict[str, Any] = {}
    for data in COMMANDS[options.command](options):
        if options.out is not None:  # after every workload: a long run that is stopped leaves what it measured
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(data, indent=1) + "\n")
    print(document(data) if options.command == "matrix" else listing(data), end="")


def check(options: argparse.Namespace) -> None:
    """Print how far every contender is from the reference after two steps; exit with 1 if one is, or if one fails."""
    options.measures, wrong = [], False
    for data in matrix(options):
        name, workload = list(data["workloads"].items())[-1]
        for peer, result in workload["results"].items():
            told = (result[key] for key in ("difference", "reason", "failed", "not compared") if key in result)
            shown = next(told, "not compared")
            wrong |= "failed" in result or result.get("difference", 0.0) > workload["tolerance"]
            print(f"{name:14} {peer:20} {shown if isinstance(shown, str) else format(shown, '.1e')}", flush=True)
    sys.exit(int(wrong))


def matrix(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Workloads x peers x measures."""
    chosen = {name: tuple(getattr(options, name)) for name in ("workloads", "peers", "measures")}
    return run(Options(device=options.device, scale=_scale(options), rounds=options.rounds or 30, **chosen))


def _scale(options: argparse.Namespace) -> str:
    return options.scale or ("large" if options.device.startswith("cuda") else "small")


def bars(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The timed bars of the first releases, on the CPU."""
    rounds = options.rounds or 30
    yield {**_head("cpu", rounds), "measures": measure(rounds)}


def startups(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """CPU seconds to a first step of every workload: the results so far."""
    rounds = options.rounds or 3
    head, measures, runs = _head(options.device, rounds), {}, {}
    for name, taken in startup(options.workloads, options.device, _scale(options), rounds):
        measures[name], runs[name] = summary(taken), taken
        yield {**head, "measures": measures, "runs": runs}


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What long runs cost beside their steps, on the CPU."""
    rounds = options.rounds or 30
    yield {**_head("cpu", rounds), "measures": long_runs(rounds)}


COMMANDS = {"matrix": matrix, "bars": bars, "startup": startups, "runs": runs}
"""What measures, by name: each yields its results so far."""


def _head(device: str, rounds: int) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": describe(torch.device(device)),
        "versions": versions(),
        "rounds": rounds,
    }


def report(file: Path, readme: Path | None) -> None:
    """Tables and a picture beside the JSON; and the README's section, if a README is named."""
    data = json.loads(file.read_text())
    draw(data, file.with_suffix(".png"))
    file.with_suffix(".md").write_text(document(data, f"{file.stem}.png"))
    if readme is not None:
        put_into(readme, readme_section(data, file))


def readme_section(data: dict[str, Any], file: Path) -> str:
    """The section with paths as the repository's README needs them."""
    folder = file.resolve().parent
    return section(data, str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder), file.stem)


if __name__ == "__main__":
    main()
