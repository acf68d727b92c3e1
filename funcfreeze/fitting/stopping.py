"""Signals as wishes and news that are looked at between steps: Ctrl-C, SIGTERM, and the deaths of workers."""

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
                signal.signal(number, before[signal.SIGTERM])
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
    # not what the program ignores (`nohup`, a job in the background), nor a handler that is not one of Python's
    ours = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        for number in ours:
            signal.signal(number, before[number])
        for number in ours:
            handler = before[number]
            if wish.signal == number.name and callable(handler) and handler is not signal.default_int_handler:
                handler(number, None)


class Deaths:
    """Holds back what is raised for a loader's worker that died, so that it is raised between steps.

    A signal to all processes of a run ends the workers, and torch raises wherever the program is when it hears of it:
    in the middle of a step or of a save. It hears by a handler that it installs when it first starts workers.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._heard: list[tuple[int, FrameType | None]] = []

    def hold(self) -> None:
        """From here on, also by a handler that was installed since."""
        if _CHILD is None or threading.current_thread() is not threading.main_thread():
            return
        present = signal.getsignal(_CHILD)
        if callable(present) and present != self._note:
            self._handler = present
            signal.signal(_CHILD, self._note)

    def tell(self, *, is_stopping: bool) -> None:
        """Let the handler that is held hear what there was; what it raises is of no matter to a run that stops."""
        if not self._heard:
            return
        heard, self._heard = self._heard, []
        try:
            self._handler(*heard[0])
        except Exception:
            if not is_stopping:
                raise

    def release(self) -> None:
        """Put the handler back, unless another one is there by now."""
        if _CHILD is not None and self._handler is not None and signal.getsignal(_CHILD) == self._note:
            signal.signal(_CHILD, self._handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._heard.append((number, frame))
