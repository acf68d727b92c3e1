"""Step times as a picture: each workload against what it was compared with; time against the number of losses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.peers import OURS
from bench.table import bases, reference, value

MARKS: Mapping[str, tuple[str, str]] = {
    "summed": ("|", "#555555"),
    "recipe": ("o", "#b0b0b0"),
    "inputs": ("s", "#a0845c"),
    "torchjd": ("^", "#8c6bb1"),
    "torchjd-in-turn": ("<", "#bfa3d6"),
    "torchjd-gramian": (">", "#54278f"),
    "by-hand": ("D", "#5fa55a"),
    "by-hand-compiled": ("P", "#2c7a3f"),
    "by-hand-graphs": ("X", "#12492a"),
    "jax": ("v", "#4292c6"),
    "funcfreeze": ("o", "#f28e2b"),
    "funcfreeze-compiled": ("s", "#d62728"),
    "funcfreeze-graphs": ("h", "#7f0000"),
}
"""A shape and a colour for each peer; ours are rings, which hide nobody."""


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    growing = _growing(data)
    rows = len(data["workloads"])
    figure = Figure(figsize=(13 if len(growing) > 1 else 8, 1.9 + 0.42 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        1, 2 if len(growing) > 1 else 1, squeeze=False, width_ratios=[3, 2][: 1 + (len(growing) > 1)]
    )
    _against_the_recipe(axes[0, 0], data)
    if len(growing) > 1:
        _against_the_number(axes[0, 1], data, growing)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    machine = data["machine"]
    figure.suptitle(f"Whole training step with Adam, {machine.get('gpu') or machine['processor']}, {data['date']}")
    figure.savefig(path, dpi=130)


def _against_the_recipe(axes: Any, data: Mapping[str, Any]) -> None:
    names = list(data["workloads"])
    for peer, label in data["peers"].items():
        points = []
        for row, name in enumerate(names):
            results = data["workloads"][name]["results"]
            mine, by = value(results[peer], "time"), reference(results)
            base = None if by is None else value(results[by], "time")
            if mine is not None and base is not None:
                points.append((mine / base, row))
        shape, colour = MARKS[peer]
        ring = {"s": 150, "facecolors": "none", "edgecolors": colour, "linewidths": 2.2, "zorder": 3}
        axes.scatter(
            *(zip(*points, strict=True) if points else ([], [])),
            marker=shape,
            label=label if points else f"{label} (absent)",
            **(ring if peer in OURS else {"s": 40, "color": colour, "zorder": 2}),
        )
    axes.axvline(1.0, color="#cccccc", linewidth=1, zorder=1)
    axes.set_xscale("log")
    coarse, fine = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20), (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4)
    shown, finer = ([tick for tick in ticks if _inside(axes.get_xlim(), tick)] for ticks in (coarse, fine))
    ticks = shown if len(shown) > 1 else finer
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), [data["workloads"][name]["name"] for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    owners = ", or else ".join(f"{base}'s" for base in bases(data))
    axes.set_xlabel(f"step time / {owners} (left is faster)")


def _inside(limits: tuple[float, float], tick: float) -> bool:
    return limits[0] <= tick <= limits[1]


def _growing(data: Mapping[str, Any]) -> dict[int, str]:
    """The workloads that differ in the number of losses alone, by that number."""
    found = {name: re.fullmatch(r"vit-(\d+)", name) for name in data["workloads"]}
    return {int(match[1]): name for name, match in found.items() if match}


def _against_the_number(axes: Any, data: Mapping[str, Any], growing: Mapping[int, str]) -> None:
    for peer in data["peers"]:
        points = [
            (count, time)
            for count, name in sorted(growing.items())
            if (time := value(data["workloads"][name]["results"][peer], "time")) is not None
        ]
        if points:
            shape, colour = MARKS[peer]
            ring = {"markersize": 12, "markerfacecolor": "none", "markeredgewidth": 2.2}
            style = ring if peer in OURS else {"markersize": 6}
            axes.plot(*zip(*points, strict=True), marker=shape, color=colour, linewidth=1.2, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(growing), [str(count) for count in growing])
    axes.set_xlabel("losses on one ViT trunk")
    axes.set_ylabel("ms a step")
    axes.yaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axes.yaxis.set_minor_formatter(lambda tick, _: f"{tick:g}" if f"{tick:e}"[0] in "25" else "")
    axes.grid(color="#eeeeee")
