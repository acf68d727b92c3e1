"""What a person sees of a run: one line that moves on a terminal, plain lines elsewhere.

A run goes on where nobody can be shown anything any more, such as behind a pipe that was closed.
"""

from __future__ import annotations

import shutil
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
        self._total = total
        self._out = sys.stdout if out is None else out
        self._is_terminal = _is_terminal(self._out)
        self._before = begun, time.monotonic()
        self._width = 0

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """The step, the losses, the rate and the time that is left."""
        now = time.monotonic()
        before, then = self._before
        rate, self._before = (step - before) / (now - then) if now > then else 0.0, (step, now)
        parts = [f"step {step:,}" + (f"/{self._total:,}" if self._total is not None else "")]
        parts += [f"{name} {value:.4g}" for name, value in numbers.items() if not name.startswith("ff/")]
        parts.append(f"{rate:,.1f} steps/s")
        if self._total is not None and rate > 0:
            parts.append(f"{_clock((self._total - step) / rate)} left")
        self._write("  ".join(parts))

    def tell(self, line: str) -> None:
        """A line that stays."""
        self._put(f"{self._cleared()}{line}\n")

    def end(self) -> None:
        """Leave what is shown last."""
        if self._width:
            self._put("\n")
        self._width = 0

    def _write(self, line: str) -> None:
        if not self._is_terminal:
            self._put(f"{line}\n")
            return
        line = line[: shutil.get_terminal_size().columns - 1]  # one that wraps could not be written over
        self._put(f"\r{line.ljust(self._width)}")
        self._width = len(line)

    def _cleared(self) -> str:
        width, self._width = self._width, 0
        return f"\r{' ' * width}\r" if width else ""

    def _put(self, text: str) -> None:
        if self._out is None:
            return
        try:
            self._out.write(text)
            self._out.flush()
        except UnicodeEncodeError as error:
            self._put(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError):  # closed, by whoever read it or by the program
            self._out = None


def _is_terminal(out: TextIO | None) -> bool:
    try:
        return out is not None and out.isatty()
    except (AttributeError, ValueError):  # something of the program's own that writes elsewhere, too; or closed
        return False


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
