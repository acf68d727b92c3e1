"""A folder of checkpoints: their names, how one comes into it whole or not at all, and which of them are good."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from funcfreeze.checkpoint.files import Damaged, synced
from funcfreeze.checkpoint.manifest import MANIFEST, Manifest

_NAME = re.compile(r"step-\d{10}(\.old)?")
_UNFINISHED = re.compile(r"\.step-\d{10}\.(?P<host>.+)\.(?P<process>\d+)\.[0-9a-f]{8}")

_OLD = ".old"
"""Ends the name of one that makes way for another of its step."""


def name_of(step: int) -> str:
    """What the checkpoint of a step is called."""
    return f"step-{step:010d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.stem.removeprefix("step-"))


def is_named_so(path: Path) -> bool:
    """Whether a path is named as checkpoints are."""
    return _NAME.fullmatch(path.name) is not None


def checkpoints_in(folder: Path) -> list[Path]:
    """All that were put into a folder, the newest first."""
    if not folder.is_dir():
        return []
    found = filter(is_named_so, folder.iterdir())
    return sorted(found, key=lambda path: (path.stem, path.suffix != _OLD), reverse=True)


def put(folder: Path, step: int, keep: int | None, write: Callable[[Path], None]) -> Path:
    """Put a checkpoint into a folder: written beside the others, on the disk, and only then under its name.

    Args:
        folder: made if it is not there.
        step: under which it goes; another of that step makes way.
        keep: so many of the newest stay; None keeps all.
        write: writes the files into the folder it is given.

    Raises:
        OSError: it cannot be written; all is as before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    final, unfinished = folder / name_of(step), folder / _unfinished_name(step)
    unfinished.mkdir()
    try:
        write(unfinished)
        synced(unfinished)
        _rename(unfinished, final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    synced(folder)
    _remove(_old(final))
    if keep is not None:
        for old in [path for path in checkpoints_in(folder) if path != final][keep - 1 :]:
            _remove(old)
    return final


def good(path: Path) -> Manifest:
    """The manifest of a checkpoint, all files of which are whole.

    Raises:
        Damaged: telling everything that is wrong.
    """
    if not (path / MANIFEST).is_file():
        what = f"is no checkpoint: no {MANIFEST} is in it" if path.is_dir() else "is not there"
        raise Damaged(f"{path} {what}")
    manifest = Manifest.read(path)
    problems = manifest.problems_in(path)
    if problems:
        raise Damaged("\n".join(problems))
    return manifest


def _rename(unfinished: Path, final: Path) -> None:
    """Another of this step makes way, under a name by which it is found as long as there is no new one."""
    for _ in range(100):
        try:
            os.rename(unfinished, final)
            return
        except OSError:
            if not final.exists():
                raise
            _remove(_old(final))
            with contextlib.suppress(OSError):  # another process, a moment ago
                os.rename(final, _old(final))
    os.rename(unfinished, final)


def _old(final: Path) -> Path:
    return final.with_name(final.name + _OLD)


def _remove(path: Path) -> None:
    """Under another name first, so that no half of it is taken for a checkpoint."""
    gone = path.with_name(_unfinished_name(step_of(path)))
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _unfinished_name(step: int) -> str:
    return f".{name_of(step)}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"


def _clear(folder: Path) -> None:
    """Remove what processes of this machine left unfinished that are no more."""
    for path in _unfinished(folder):
        shutil.rmtree(path, ignore_errors=True)


def _unfinished(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        found = _UNFINISHED.fullmatch(path.name)
        if found and found["host"] == socket.gethostname() and not _is_alive(int(found["process"])):
            yield path


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
