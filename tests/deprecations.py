"""Whose use of something deprecated a warning is about: ours is an error, a third party's is nothing to us.

Where a warning points to (its `stacklevel`) does not decide that: `torch.jit.script` points to itself, whoever called
it. So the stack is asked too: what counts is who called the file that warns.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
import typing
import warnings
from collections.abc import Iterator
from types import FrameType

import _pytest.recwarn
import torch
import typing_extensions

DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

ROOT = pathlib.Path(__file__).parent.parent
OURS = ("funcfreeze", "tests", "bench", "examples", "conftest.py", "README.md")
BETWEEN = {
    module.__file__
    for module in (contextlib, functools, typing, typing_extensions, warnings, torch.utils._contextlib, _pytest.recwarn)
}
"""Whose wrappers stand between a function and its caller; the last warns once more of what a test did not expect."""


def is_ours(filename: str) -> bool:
    """Whether a file is this project's, its doctests and the README's blocks among them.

    >>> is_ours(__file__), is_ours("<doctest funcfreeze.step.Step[0]>"), is_ours(torch.__file__), is_ours("<string>")
    (True, True, False, False)
    """
    if filename.startswith("<doctest "):
        filename = filename.removeprefix("<doctest ").split(".")[0]
    path = ROOT / filename
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[:1] in {(part,) for part in OURS}


@contextlib.contextmanager
def ours_only() -> Iterator[None]:
    """Warnings that something is deprecated are errors where our code uses it, and not shown where others do."""
    show = warnings.showwarning

    def decide(message: Warning | str, category: type[Warning], filename: str, *rest: typing.Any) -> None:
        if not issubclass(category, DEPRECATIONS):
            show(message, category, filename, *rest)
        elif is_ours(filename) or is_ours(_caller_of_the_file_that_warns(sys._getframe(1))):
            raise message if isinstance(message, Warning) else category(message)

    warnings.showwarning = decide
    try:
        yield
    finally:
        warnings.showwarning = show


def _caller_of_the_file_that_warns(frame: FrameType | None) -> str:
    warns = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in BETWEEN:
            warns = warns or file
            if file != warns:
                return file
        frame = frame.f_back
    return ""
