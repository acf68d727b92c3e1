"""A folder of checkpoints: their names, how one comes into it whole or not at all, and which of them are good."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from funcfreeze.checkpoint.files import Damaged, synced
from funcfreeze.checkpoint.manifest import MANIFEST, Manifest

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

_NAME = re.compile(r"step-\d{10}(\.old)?")
_UNFINISHED = re.compile(r"\.step-\d{10}\.[0-9a-f]{16}")

_DAY = 24 * 60 * 60.0
"""In seconds."""

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""Why a folder cannot be renamed where there is something of that name."""

Read = TypeVar("Read")

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
    found = [path for path in folder.iterdir() if is_named_so(path) and path.is_dir()]
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
    make(folder)
    _clear(folder)
    final = folder / name_of(step)
    with _unfinished(folder, step) as unfinished:
        write(unfinished)
        synced(unfinished)
        _rename(unfinished, final)
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
    if is_named_so(path) and manifest.step != step_of(path):
        problems.append(f"{path}: it is of step {manifest.step:,}, and its name says {step_of(path):,}")
    if problems:
        raise Damaged("\n".join(problems))
    return manifest


def whole_ones(folder: Path, stacklevel: int = 3) -> Iterator[tuple[Path, Manifest]]:
    """All in a folder that are whole, the newest first; of damaged ones that are newer it warns.

    Args:
        folder: of checkpoints.
        stacklevel: of the warning, seen from who iterates.

    Raises:
        ValueError: all that are left are damaged.
    """
    problems: list[str] = []
    for path in checkpoints_in(folder):
        try:
            manifest = good(path)
        except Damaged as error:
            problems += [str(error)] if path.exists() else []  # or else another process has removed it just now
            continue
        if problems:
            newer = "\n".join(problems)
            warnings.warn(
                f"{path} is the newest that is whole; newer ones are damaged:\n{newer}", stacklevel=stacklevel
            )
        yield path, manifest
    if problems:
        raise ValueError(f"all checkpoints in {folder} are damaged:\n" + "\n".join(problems))


def of_whole(path: Path, read: Callable[[Path, Manifest], Read]) -> Read:
    """What is read of the checkpoint at a path, or of the newest that is whole in a folder of them.

    Args:
        path: of the checkpoint or the folder.
        read: `read(path, manifest)`; called again where another process puts a newer one in its place meanwhile.

    Raises:
        ValueError: telling everything that is wrong.
    """
    if is_one(path) or not checkpoints_in(path):
        try:
            return read(path, good(path))
        except Damaged as error:
            raise ValueError(f"this checkpoint cannot be loaded:\n{error}") from None
    for _ in range(9):
        with contextlib.suppress(FileNotFoundError):
            for found in whole_ones(path, stacklevel=5):
                return read(*found)
    return read(*next(whole_ones(path)))


def is_one(path: Path) -> bool:
    """Whether this is a checkpoint, whole or not, and no folder of them."""
    return (path / MANIFEST).is_file() or is_named_so(path)


def make(folder: Path) -> None:
    """Make a folder and those above it that are not there, each known to the one above.

    Raises:
        FileExistsError: it is a file.
    """
    if folder.is_dir():
        return
    if folder.exists():
        raise FileExistsError(f"checkpoints go into a folder, and {folder} is a file")
    make(folder.parent)
    folder.mkdir(exist_ok=True)
    synced(folder.parent)


@contextlib.contextmanager
def _unfinished(folder: Path, step: int) -> Iterator[Path]:
    """A folder to write a checkpoint into, which goes where that fails."""
    made = folder / f".{secrets.token_hex(8)}.new"
    made.mkdir()
    with held(made):
        unfinished = folder / _unfinished_name(step)  # only now, so that nobody takes it for one that nobody holds
        os.rename(made, unfinished)
        try:
            yield unfinished
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _rename(unfinished: Path, final: Path) -> None:
    """Another of this step makes way, under a name by which it is found as long as there is no new one."""
    for _ in range(100):
        try:
            os.rename(unfinished, final)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
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
    return f".{name_of(step)}.{secrets.token_hex(8)}"


def _clear(folder: Path) -> None:
    """Remove what was left unfinished by processes that are no more."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            with held(path) as is_ours:
                if is_ours or (is_ours is None and _is_of_another_day(path)):
                    shutil.rmtree(path, ignore_errors=True)


def _is_of_another_day(path: Path) -> bool:
    """Where nobody can hold a folder, by its age."""
    try:
        return time.time() - path.stat().st_mtime > _DAY
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def held(path: Path, patience: float = 0.0) -> Iterator[bool | None]:
    """Hold a folder for as long as this lasts, at most until the process ends, however that ends.

    Yields whether it is held now, or by somebody else: False. None where that cannot be known: the folder is gone, or
    the system or the file system has no locks on folders.

    Args:
        path: of the folder.
        patience: seconds for which somebody else is waited for.
    """
    if fcntl is None:
        yield None
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    try:
        is_ours, end = _is_locked(handle), time.monotonic() + patience
        while is_ours is False and time.monotonic() < end:
            time.sleep(0.1)  # whoever holds it tells nobody when that ends
            is_ours = _is_locked(handle)
        yield is_ours
    finally:
        with contextlib.suppress(OSError):  # closing is not enough: a child may have a copy of the handle
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _is_locked(handle: int) -> bool | None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
