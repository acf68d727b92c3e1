"""What a person sees of a run: one line that moves on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO


class Progress:
    """Shows where a run is.

    Args:
        total: the step at which it ends; None if nobody knows.
        begun: the step at which it begins.
        out: where to.
    """

    def __init__(self, total: int | None, begun: int, out: TextIO | None = None) -> None:
        self._total, self._begun = total, begun
        self._out = sys.stdout if out is None else out
        self._since = time.monotonic()
        self._width = 0

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """The step, the losses, the rate and the time that is left."""
        seconds = time.monotonic() - self._since
        rate = (step - self._begun) / seconds if seconds > 0 else 0.0
        parts = [f"step {step:,}" + (f"/{self._total:,}" if self._total is not None else "")]
        parts += [f"{name} {value:.4g}" for name, value in numbers.items() if not name.startswith("ff/")]
        parts.append(f"{rate:,.1f} steps/s")
        if self._total is not None and rate > 0:
            parts.append(f"{_clock((self._total - step) / rate)} left")
        self._write("  ".join(parts))

    def tell(self, line: str) -> None:
        """A line that stays."""
        self._clear()
        print(line, file=self._out, flush=True)

    def end(self) -> None:
        """Leave what is shown last."""
        if self._width:
            print(file=self._out, flush=True)
        self._width = 0

    def _write(self, line: str) -> None:
        if not self._out.isatty():
            print(line, file=self._out, flush=True)
            return
        self._out.write(f"\r{line.ljust(self._width)}")
        self._out.flush()
        self._width = len(line)

    def _clear(self) -> None:
        if self._width:
            self._out.write(f"\r{' ' * self._width}\r")
            self._width = 0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
