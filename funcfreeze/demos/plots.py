"""The curves of the trials as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from funcfreeze.demos.trials import MEASURES, Trials, spread

COLORS = {"baseline": "#0072b2", "adversarial": "#d55e00"}  # told apart by colour-blind readers too

PANELS = {
    "target_accuracy": "Target accuracy (noisy images)",
    "source_accuracy": "Source accuracy (clean images)",
    "domain_probe": "Domain probe (lower hides more)",
}


def draw_curves(trials: Trials, path: Path) -> None:
    """One panel a measure: every seed as a thin line, the mean as a thick one, its spread shaded."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # the file is drawn without a display
    axes = figure.subplots(1, len(PANELS))
    for panel, (measure, title) in zip(axes, PANELS.items(), strict=True):
        for run in trials.curves:
            _draw(panel, trials, run, measure)
        panel.set(title=title, xlabel="training step", ylim=(_lowest(trials) - 0.05, 1.02))
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("share of held-out images told right")
    axes[-1].axhline(0.5, color="black", linestyle=":", linewidth=1)
    axes[-1].annotate("chance", (1, 0.5), (-4, 4), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right")  # fmt: skip
    axes[1].legend(loc="lower right")  # the panel with the most room
    count = len(trials.seeds)
    shading = f"thick: mean of {count} seeds; shaded: ± one standard deviation; thin: each seed"
    figure.suptitle(f"Digits, an encoder against a domain head ({shading if count > 1 else 'one seed'})", fontsize=11)
    figure.savefig(path, dpi=150)


def _lowest(trials: Trials) -> float:
    """The lower end of all panels: the smallest value, or chance where all is above it."""
    values = [
        read(point)
        for read in MEASURES.values()
        for curves in trials.curves.values()
        for curve in curves
        for point in curve
    ]
    return min(0.5, *values)


def _draw(panel: Axes, trials: Trials, run: str, measure: str) -> None:
    curves = [[MEASURES[measure](point) for point in curve] for curve in trials.curves[run]]
    steps = [point.step for point in trials.curves[run][0]]
    for curve in curves:
        panel.plot(steps, curve, color=COLORS[run], linewidth=0.7, alpha=0.45)
    mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    deviation = [spread(values) or 0.0 for values in zip(*curves, strict=True)]
    panel.plot(steps, mean, color=COLORS[run], linewidth=2.2, label=run, marker="o", markersize=3.5)
    low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
    panel.fill_between(steps, low, high, color=COLORS[run], alpha=0.18, linewidth=0)
