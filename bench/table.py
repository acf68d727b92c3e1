"""Results as Markdown: one table a measure, and the section of the README."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers import OURS, PEERS, REFERENCES

Result = Mapping[str, Any]
SAME = 0.2
"""Relative difference of displacements that float32 explains: Adam makes full steps of gradients that are rounding."""

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def milliseconds(cell: Result) -> float:
    """The median step time."""
    return float(cell["ms"][1])


def three(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def millions(value: float) -> str:
    """The number in millions, as `three` shows it."""
    return f"{value / 1e6:,.0f}" if value >= 1e8 else f"{value / 1e6:.3g}"


COLUMNS: Mapping[str, tuple[str, Callable[[Any], float], Callable[[float], str]]] = {
    "time": ("Step time, ms", milliseconds, three),
    "first-step": ("Time to the first step, s, cold caches", lambda cell: cell["seconds"], three),
    "memory": ("Peak memory of a step, MB", lambda cell: cell["bytes"], millions),
    "multiply-adds": ("Multiply-adds of a step, millions", float, millions),
    "matmuls": ("Matrix products of a step", lambda cell: cell["matmuls"], lambda count: f"{count:.0f}"),
}
"""For each measure a title, the number in a cell, and how it is shown."""


def value(result: Result, measure: str) -> float | None:
    """The number, or None where there is none."""
    cell = result.get(measure)
    if cell is None or (isinstance(cell, Mapping) and ("absent" in cell or "failed" in cell)):
        return None
    return COLUMNS[measure][1](cell)


def why_not(result: Result, measure: str) -> str:
    """What stands in a cell without a number."""
    cell = result.get(measure)
    told = cell if isinstance(cell, Mapping) else result
    if "failed" in told:
        return "failed"
    return str(told.get("absent", "not measured"))


def table(data: Mapping[str, Any], measure: str) -> str:
    """Workloads by peers; the least of those that make the routed update is bold."""
    title, _, shown = COLUMNS[measure]
    peers = {peer: name for peer, name in data["peers"].items() if not _elsewhere(data, peer)}
    lines = [f"| {title} | {' | '.join(peers.values())} |", "|---" * (len(peers) + 1) + "|"]
    for workload in data["workloads"].values():
        numbers = {peer: value(workload["results"][peer], measure) for peer in peers}
        rivals = [number for peer, number in numbers.items() if number is not None and PEERS[peer].routed]
        cells = []
        for peer, number in numbers.items():
            if number is None:
                cells.append(why_not(workload["results"][peer], measure))
            else:
                best = PEERS[peer].routed and number == min(rivals)
                cells.append(f"**{shown(number)}**" if best else shown(number))
        lines.append(f"| {workload['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _elsewhere(data: Mapping[str, Any], peer: str) -> bool:
    """Whether a peer is for other devices: it has no column, and `reasons` says why."""
    return all(workload["results"][peer].get("absent") == "not here" for workload in data["workloads"].values())


def best_of(results: Mapping[str, Result], peers: list[str]) -> str | None:
    """The peer with the least median step time, if any has one."""
    timed = [peer for peer in peers if value(results[peer], "time") is not None]
    return min(timed, key=lambda peer: milliseconds(results[peer]["time"])) if timed else None


def reference(results: Mapping[str, Result]) -> str | None:
    """The peer that the others are measured by, if any was timed."""
    return next((peer for peer in REFERENCES if value(results.get(peer, {}), "time") is not None), None)


def standing(results: Mapping[str, Result], *, eager: bool) -> tuple[str, str, float] | None:
    """Our best contender, the best of the others, and the median of their ratios; or None where one side is absent."""
    rivals = [peer for peer in results if PEERS[peer].routed and not (eager and PEERS[peer].compiled)]
    own = best_of(results, [peer for peer in rivals if peer in OURS])
    other = best_of(results, [peer for peer in rivals if peer not in OURS])
    if own is None or other is None:
        return None
    return own, other, results[own]["time"]["over"][other]


def standings(data: Mapping[str, Any]) -> str:
    """Our step time over that of the fastest other, eager and whoever is fastest at all; below 1 is faster."""
    lines = ["| our step time / the best other's | eager | eager or compiled |", "|---|---|---|"]
    for workload in data["workloads"].values():
        cells = []
        for eager in (True, False):
            found = standing(workload["results"], eager=eager)
            if found is None:
                cells.append("not measured")
                continue
            own, other, ratio = found
            verdict = {-1: "ahead", 0: "even", 1: "**we lose**"}[_sign(round(ratio, 2) - 1.0)]
            who = f"{data['peers'][own]} / {data['peers'][other]}"
            cells.append(f"{ratio:.2f} {verdict} ({who})")
        lines.append(f"| {workload['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def reasons(data: Mapping[str, Any]) -> str:
    """Why cells have no numbers, and what failed, each reason once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for workload in data["workloads"].values():
        for peer, result in workload["results"].items():
            for about in (result, *(cell for cell in result.values() if isinstance(cell, Mapping))):
                kind = "failed" if "failed" in about else about.get("absent")
                if kind is not None:
                    key = data["peers"][peer], kind, about.get("reason", about.get("failed"))
                    names = found.setdefault(key, [])
                    names += [workload["name"]] if workload["name"] not in names else []
    everywhere = len(data["workloads"])
    return "\n".join(
        f"- {peer}, {kind}{'' if len(names) == everywhere else ' in ' + ', '.join(names)}: {reason}."
        for (peer, kind, reason), names in found.items()
    )


def differences(data: Mapping[str, Any]) -> str:
    """How far the peers' first two steps are from the recipe's, at most: they all do the same job."""
    found = [
        (result["difference"], data["peers"][peer], workload["name"])
        for workload in data["workloads"].values()
        for peer, result in workload["results"].items()
        if "difference" in result
    ]
    if not found:
        return "Updates were not compared: neither the recipe nor a loop by hand was among the contenders."
    worst, peer, name = max(found)
    names = bases(data)
    who = ", or else ".join(names) + ("," if len(names) > 1 else "")
    if worst > SAME:
        return f"**Not everybody makes the same update**: {peer} is {worst:.1g} away from {who} in {name}."
    return (
        f"After two steps every contender but the summed loss{_apart(data)} stands where {who} does; the largest "
        f"relative difference of displacements, in float32, is {worst:.1g} ({peer}, {name}). `python -m bench check` "
        "compares them in float64."
    )


def bases(data: Mapping[str, Any]) -> list[str]:
    """Whose updates the others were compared with, in one workload or another."""
    found = {_base(workload["results"]) for workload in data["workloads"].values()}
    return [named for peer, named in REFERENCES.items() if peer in found]


def _base(results: Mapping[str, Result]) -> str | None:
    """The first who was there and made an update that others make, too."""
    unlike = {"absent", "failed", "not compared"}
    return next((peer for peer in REFERENCES if peer in results and not unlike & set(results[peer])), None)


def _apart(data: Mapping[str, Any]) -> str:
    """Whom nobody is compared with, beside the summed loss."""
    draws = any("not compared" in result for w in data["workloads"].values() for result in w["results"].values())
    return ", and but those that draw random numbers," if draws else ""


def setting(data: Mapping[str, Any]) -> str:
    """Where, when and how it was measured."""
    machine, versions = data["machine"], data["versions"]
    place = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    named = [f"{name} {number}" for name, number in versions.items() if number is not None]
    return (
        f"{place}; {', '.join(named)}; {data['date']}. Medians of {data['rounds']} rounds in which every contender "
        "runs once, in one process; float32; Adam fused in every torch contender. Reproduce with"
        f" `{data['command']}`." + _taken_again(data.get("again", []))
    )


def _taken_again(commands: Sequence[str]) -> str:
    """Which runs gave times that stand in the place of the first ones."""
    listed = " and ".join(f"`{command}`" for command in commands)
    return f" Some times were taken again when the machine was quieter, by {listed}." if commands else ""


def document(data: Mapping[str, Any], picture: str | None = None) -> str:
    """All tables, and the picture if there is one."""
    measured = [
        measure
        for measure in COLUMNS
        if any(value(r, measure) is not None for w in data["workloads"].values() for r in w["results"].values())
    ]
    parts = ["# Measured", setting(data), differences(data)]
    parts += [f"![Step times]({picture})"] if picture is not None and "time" in measured else []
    parts += [table(data, measure) for measure in measured]
    parts += [standings(data)] if "time" in measured else []
    parts += ["Cells without a number:", reasons(data)] if reasons(data) else []
    return "\n\n".join(parts) + "\n"


def section(data: Mapping[str, Any], folder: str, stem: str) -> str:
    """The README's section: step times, where we lose, and where the rest is."""
    path = f"{folder}/{stem}"
    parts = [BEGIN, setting(data), table(data, "time"), standings(data), differences(data)]
    parts += [reasons(data)] if reasons(data) else []
    parts += [f"![Step times]({path}.png)"]
    parts += [
        f"Time to the first step, memory and counts: [{stem}.md]({path}.md). All of this is made from "
        f"[{stem}.json]({path}.json) by `python -m bench report {path}.json`.",
        END,
    ]
    return "\n\n".join(parts)


def put_into(readme: Path, text: str) -> None:
    """Replace the section between the markers."""
    before = readme.read_text()
    after, count = re.subn(f"{BEGIN}.*?{END}", lambda _: text, before, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{readme} has {count} sections between {BEGIN} and {END}, expected one")
    readme.write_text(after)
