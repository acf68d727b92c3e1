"""What a demo leaves behind, as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from funcfreeze.demos.adversarial import Settings
from funcfreeze.demos.speed import Timings
from funcfreeze.demos.trials import MEASURES, Trials
from funcfreeze.proof.report import Report

KEYS = {
    "recipe": "recipe_ms",
    "recipe, fused Adam": "recipe_fused_adam_ms",
    "reversal": "reversal_ms",
    "reversal, fused Adam": "reversal_fused_adam_ms",
    "routed": "routed_ms",
}


def results(trials: Trials, report: Report, timings: Timings, settings: Settings) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    verified = report.to_dict()
    return {
        "seeds": list(trials.seeds),
        **{run: {measure: trials.outcome(run, measure) for measure in MEASURES} for run in trials.curves},
        "verify": {"ok": verified["ok"], "worst": verified["worst"]},
        "speed": {
            **{KEYS[name]: milliseconds for name, milliseconds in timings.milliseconds.items()},
            "rounds": timings.rounds,
            "threads": timings.threads,
            "torch": timings.torch,
            "disagreement": timings.disagreement,
        },
        "settings": asdict(settings),
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Plain data as a file for people and programs."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
