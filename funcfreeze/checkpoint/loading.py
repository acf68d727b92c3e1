"""Going on with a saved run, or taking from one what fits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.checkpoint.files import TENSORS, read_tensors
from funcfreeze.checkpoint.folder import checkpoints_in, of_whole, whole_ones
from funcfreeze.checkpoint.looking import look_into
from funcfreeze.checkpoint.manifest import MANIFEST, Manifest
from funcfreeze.checkpoint.plain import unpacked
from funcfreeze.checkpoint.plans import (
    algorithm_problems,
    algorithms_of,
    buffer_problems,
    buffers_of,
    plan_data,
    plan_problems,
)
from funcfreeze.checkpoint.randomness import restoring_generators
from funcfreeze.checkpoint.resumable import checked_data, moved_to
from funcfreeze.checkpoint.saving import refuse_what_cannot_be_saved, wait_for
from funcfreeze.checkpoint.states import AnyStep, fields_of, packed_state, refuse_others_state
from funcfreeze.checkpoint.versions import other_versions
from funcfreeze.computation.state import FIELDS, Lease, State, make_state

Extra = dict[str, Any]


def load(path: str | Path, step: AnyStep, *, strict: bool = True) -> tuple[State, Extra]:
    """The state in one checkpoint, and the user's own values. Random number generators are left as they are.

    Args:
        path: of the checkpoint, `folder/step-0000000100`, or of the folder, of which the newest is taken that is whole.
        step: the `Step` or alternation that is to go on with it.
        strict: False takes what fits, and warns of what starts afresh and what is left out.

    Raises:
        ValueError: it is damaged, of a newer format, or of another model, plan or optimizer: tells everything at once.
    """
    path = Path(path)
    wait_for(path)
    wait_for(path.parent)

    def read(path: Path, manifest: Manifest) -> tuple[State, Extra]:
        state, tensors = _read(path, manifest, step, strict)
        return state, unpacked(manifest.extra, tensors)

    return of_whole(path, read)


def resume(
    folder: str | Path,
    step: AnyStep,
    *,
    data: Any = None,
    generators: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> tuple[State, Extra]:
    """Go on with the newest checkpoint in a folder that is whole; start where there is none.

    Everything is put where it was: the state, the data, the random numbers of Python, NumPy and torch. On one machine,
    and with the same versions, the run goes on bit for bit as it would have.

    Args:
        folder: what `save` was given.
        step: the `Step` or alternation.
        data: what `save` was given, or its like.
        generators: what `save` was given, or their like.
        strict: False takes what fits of the state, and warns of what starts afresh and what is left out: after a change
            of routes, optimizer or model.

    Returns:
        The state and the user's own values: `step.init()` and an empty dict where the folder holds no checkpoint.

    Raises:
        ValueError: the newest good one is of another model, plan or optimizer, of other data or generators; or all
            there are are damaged. Data and generators are as they were then.
        TypeError: data cannot say where it is, or generators are none.
    """
    position = checked_data(data)
    refuse_what_cannot_be_saved(None, generators, None)
    folder = Path(folder)
    wait_for(folder)
    if folder.is_file() or (folder / MANIFEST).is_file():
        what = "a file" if folder.is_file() else "a checkpoint; `load` takes one"
        raise ValueError(f"resume takes the folder that save was given, and {folder} is {what}")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to {folder.readlink()}, which is not there")
    for path, manifest in whole_ones(folder):
        try:
            state, tensors = _read(path, manifest, step, strict)
        except FileNotFoundError:  # another process has removed it just now
            continue
        if (position is None) != (manifest.data is None):
            missing = "it was not saved" if manifest.data is None else "data= was not given"
            raise ValueError(
                f"{path}: where the data was cannot be restored, since {missing}; ff.checkpoint.load(folder, step) "
                "gives the state without data"
            )
        restore = restoring_generators(unpacked(manifest.random, tensors), generators or {})
        if position is not None:
            try:
                moved_to(position, unpacked(manifest.data, tensors))
            except ValueError as error:
                raise ValueError(
                    f"{path}: {error}. Make it so again; ff.checkpoint.load(folder, step) gives the state without data"
                ) from error
        restore()
        return state, unpacked(manifest.extra, tensors)
    inside = [path for path in (folder.iterdir() if folder.is_dir() else ()) if _holds_some(path)]
    if inside:
        warnings.warn(
            f"{folder} holds no checkpoint, so that the run begins; there are some in "
            f"{', '.join(sorted(map(str, inside)))}",
            stacklevel=2,
        )
    return step.init(), {}


def _holds_some(path: Path) -> bool:
    try:
        return bool(checkpoints_in(path))
    except PermissionError:  # `lost+found` of a volume
        return False


def check(path: str | Path) -> list[str]:
    """What is wrong with a checkpoint, or with all in a folder; nothing if they are whole.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    wait_for(path)
    wait_for(path.parent)
    return [problem for look in look_into(path) for problem in look.problems]


def _read(path: Path, manifest: Manifest, step: AnyStep, strict: bool) -> tuple[State, Mapping[str, Tensor]]:
    """The state, which nobody else holds, and all tensors by name."""
    form, devices = _form(step)
    device = next(iter(devices.values()))

    def place(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(devices.get(name, device)) if name.split("/")[0] in FIELDS else tensor

    tensors = read_tensors(path / TENSORS, manifest.pieces, place=place)
    fields = fields_of(manifest.state, tensors, form)
    others = other_versions(manifest.versions)
    if others:
        warnings.warn(f"{path} was saved with {others}: the run may not go on bit for bit", stacklevel=3)
    if not strict:
        state, adoption = step.adopt(State(**fields))
        if adoption.afresh or adoption.left:
            warnings.warn(f"{path}: {adoption}", stacklevel=3)
        return state, tensors
    problems = [
        *_step_problems(step, State(**fields)),
        *buffer_problems(manifest.options["buffers"], buffers_of(step)),
        *plan_problems(manifest.plan, plan_data(step.plan)),
        *algorithm_problems(manifest.options["algorithms"], algorithms_of(step)),
    ]
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{path} was saved by another step; strict=False takes what fits:\n{shown}")
    named = form.replace(**fields)  # what is tied goes by all its names
    return make_state(tuple(getattr(named, field) for field in FIELDS), Lease()), tensors


def _form(step: AnyStep) -> tuple[State, Mapping[str, torch.device]]:
    """A state such as the step begins with, of tensors without memory, and the device of each by its name."""
    fresh = step.init()
    tensors: dict[str, Tensor] = {}
    packed_state(fresh, tensors)
    tree: Any = fresh
    form: Any = optree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, tree)
    return form, {name: tensor.device for name, tensor in tensors.items()}


def _step_problems(step: AnyStep, state: State) -> Iterator[str]:
    try:
        refuse_others_state(step, state)
    except ValueError as error:
        told = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
        yield from told[1:] or told  # after the headline, if it has one
