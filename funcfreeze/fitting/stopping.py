"""Ctrl-C and SIGTERM as a wish that is looked at between steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_CHILD = getattr(signal, "SIGCHLD", None)
"""Where the system has it."""


class Wish:
    """Whether somebody wants the run to stop, and by which signal.

    Attributes:
        signal: the name of the signal, once there was one.
        is_granted: whether the run is about to end: Ctrl-C does not interrupt what it saves.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.is_granted = False


@contextmanager
def stopping_between_steps() -> Iterator[Wish]:
    """Inside, the first Ctrl-C or SIGTERM is noted; a second Ctrl-C interrupts at once. In the main thread alone."""
    wish, process = Wish(), os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a child has this handler from its parent: Ctrl-C is the parent's affair
            if number == signal.SIGTERM:
                _put(number, before[signal.SIGTERM])
                os.kill(os.getpid(), number)
            return
        if wish.signal is not None:
            if number == signal.SIGINT and not wish.is_granted:
                raise KeyboardInterrupt
            return
        wish.signal = signal.Signals(number).name
        if not wish.is_granted:
            with suppress(OSError):  # nobody may be there any more who reads
                os.write(2, b"\nstopping after this step; Ctrl-C once more interrupts at once\n")

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]  # `nohup`, a job in the background
    for number in ours:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        for number in ours:
            _put(number, before[number])
    for number in ours:
        handler = before[number]
        if wish.signal == number.name and callable(handler) and handler is not signal.default_int_handler:
            handler(number, None)


def _put(number: int, handler: Any) -> None:
    signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not one of Python's


@contextmanager
def deaths_of_workers_after(wish: Wish) -> Iterator[None]:
    """Inside, nothing is raised for a loader's worker that died; afterwards only where nobody wants the run to stop.

    A signal to all processes of a run ends the workers, and torch raises wherever the program is when it hears of it:
    in the middle of a step.
    """
    if threading.current_thread() is not threading.main_thread() or _CHILD is None:
        yield
        return
    handler = signal.getsignal(_CHILD)
    if not callable(handler):
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    signal.signal(_CHILD, lambda number, frame: heard.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(_CHILD, handler)
    if heard and wish.signal is None:
        handler(*heard[0])
