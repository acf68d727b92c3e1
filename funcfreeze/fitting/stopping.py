"""Ctrl-C and SIGTERM as a wish that is looked at between steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """Whether somebody wants the run to stop, and by which signal.

    Attributes:
        signal: the name of the signal, once there was one.
        is_granted: whether the run is about to end; more signals change nothing then.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.is_granted = False


@contextmanager
def stopping_between_steps() -> Iterator[Wish]:
    """Inside, the first Ctrl-C or SIGTERM is noted; a second Ctrl-C interrupts at once. In the main thread alone."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def note(number: int, frame: FrameType | None) -> None:
        if wish.is_granted:
            return
        if wish.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        wish.signal = signal.Signals(number).name
        os.write(2, b"\nstopping after this step; Ctrl-C once more interrupts at once\n")

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
