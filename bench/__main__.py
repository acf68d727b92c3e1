"""`python -m bench [--rounds N] [--out FILE]`."""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform

import torch

import funcfreeze as ff
from bench.bars import measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the timed bars side by side.")
    parser.add_argument("--rounds", type=int, default=40, help="rounds in which every contender runs once")
    parser.add_argument("--out", type=pathlib.Path, help="where to write the measures as JSON")
    options = parser.parse_args()
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "funcfreeze": ff.__version__,
        },
        "rounds": options.rounds,
        "measures": measure(options.rounds),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
