"""What is in checkpoints, and how two of them differ, for a reader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcfreeze.checkpoint.files import TENSORS, Damaged, read_tensors
from funcfreeze.checkpoint.folder import checkpoints_in, good, is_one, of_whole
from funcfreeze.checkpoint.manifest import Manifest
from funcfreeze.checkpoint.plans import plan_problems
from funcfreeze.computation.state import FIELDS


@dataclass(frozen=True)
class Look:
    """A checkpoint, seen from outside.

    Attributes:
        path: where it is.
        manifest: what it says of itself; None if it is damaged.
        problems: what is wrong with it.
    """

    path: Path
    manifest: Manifest | None
    problems: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """All files of it."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())


def look_into(path: Path) -> list[Look]:
    """A checkpoint, or all in a folder, the newest first.

    Raises:
        ValueError: there is none.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is {'a file' if path.exists() else 'not there'}, and a checkpoint is a folder")
    found = [path] if is_one(path) else checkpoints_in(path)
    if not found:
        raise ValueError(f"{path} holds no checkpoint")
    return [_looked(one) for one in found]


def _looked(path: Path) -> Look:
    try:
        return Look(path, good(path), ())
    except Damaged as error:
        return Look(path, None, tuple(str(error).splitlines()))
    except ValueError as error:
        return Look(path, None, (str(error),))


def differences(one: Path, other: Path) -> Iterator[str]:
    """Lines about how a checkpoint differs from another: by path, and in plan and values beside.

    Args:
        one: a checkpoint, or a folder, of which the newest is taken that is whole.
        other: the same.

    Raises:
        ValueError: one of them is damaged, or none.
    """
    (first, mine), (second, theirs) = of_whole(one, _read), of_whole(other, _read)
    for name in sorted(mine.keys() | theirs.keys(), key=_in_order):
        told = _difference(mine.get(name), theirs.get(name))
        if told:
            yield f"{name}: {told}"
    yield from plan_problems(first.plan, second.plan, ("the first", "the second"))
    for name in ("extra", "data", "versions", "options"):
        yield from _differing(name, getattr(first, name), getattr(second, name))


def _read(path: Path, manifest: Manifest) -> tuple[Manifest, dict[str, Tensor]]:
    return manifest, read_tensors(path / TENSORS, manifest.pieces)


def _in_order(name: str) -> tuple[int, str]:
    """The fields of a state as a state has them, and then what else there is."""
    field = name.split("/")[0]
    return (FIELDS.index(field) if field in FIELDS else len(FIELDS)), name


def _differing(name: str, was: Any, now: Any) -> Iterator[str]:
    """Values beside the tensors, by where they are."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _differing(f"{name}.{key}", was.get(key), now.get(key))
    elif was != now and not (was != was and now != now):  # NaN
        yield f"{name}: {shortened(was)} and {shortened(now)}"


def _difference(one: Tensor | None, other: Tensor | None) -> str:
    if one is None or other is None:
        return "only in the first" if other is None else "only in the second"
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return f"{tuple(one.shape)} {one.dtype} and {tuple(other.shape)} {other.dtype}"
    if torch.equal(one, other) or torch.equal(_bytes(one), _bytes(other)):  # NaN is not equal to itself
        return ""
    if one.numel() == 1:
        return f"{shortened(one.item())} and {shortened(other.item())}"
    if not one.dtype.is_floating_point:
        return f"{int((one != other).sum()):,} of {one.numel():,} elements differ"
    gap = (one.double() - other.double()).norm() / one.double().norm().clamp(min=1e-300)
    return f"differs by {float(gap):.1e} of its norm"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def shortened(value: Any) -> str:
    """A value in a line."""
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
