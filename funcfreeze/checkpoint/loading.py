"""Going on with a saved run, or taking from one what fits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funcfreeze.checkpoint.files import TENSORS, Damaged, read_tensors
from funcfreeze.checkpoint.folder import checkpoints_in, good
from funcfreeze.checkpoint.looking import look_into
from funcfreeze.checkpoint.manifest import MANIFEST, Manifest
from funcfreeze.checkpoint.plain import unpacked
from funcfreeze.checkpoint.plans import algorithm_problems, algorithms_of, plan_data, plan_problems
from funcfreeze.checkpoint.randomness import restoring_generators
from funcfreeze.checkpoint.resumable import checked_data
from funcfreeze.checkpoint.saving import wait_for
from funcfreeze.checkpoint.states import AnyStep, fields_of, packed_state, refuse_others_state
from funcfreeze.computation.state import FIELDS, State

Extra = dict[str, Any]


def load(path: str | Path, step: AnyStep, *, strict: bool = True) -> tuple[State, Extra]:
    """The state in one checkpoint, and the user's own values. Random number generators are left as they are.

    Args:
        path: of the checkpoint, `folder/step-0000000100`.
        step: the `Step` or alternation that is to go on with it.
        strict: False takes what fits, and warns of what starts afresh and what is left out.

    Raises:
        ValueError: it is damaged, of a newer format, or of another model, plan or optimizer: tells everything at once.
    """
    path = Path(path)
    wait_for(path.parent)
    state, extra, _ = _read(path, _whole(path), step, strict)
    return state, extra


def resume(
    folder: str | Path, step: AnyStep, *, data: Any = None, generators: Mapping[str, Any] | None = None
) -> tuple[State, Extra]:
    """Go on with the newest checkpoint in a folder that is whole; start where there is none.

    Everything is put where it was: the state, the data, the random numbers of Python, NumPy and torch. On one machine,
    and with the same versions, the run goes on bit for bit as it would have.

    Args:
        folder: what `save` was given.
        step: the `Step` or alternation.
        data: what `save` was given, or its like.
        generators: what `save` was given, or their like.

    Returns:
        The state and the user's own values: `step.init()` and an empty dict where the folder holds no checkpoint.

    Raises:
        ValueError: the newest good one is of another model, plan or optimizer; or all there are are damaged.
    """
    position = checked_data(data)
    folder = Path(folder)
    wait_for(folder)
    if folder.is_file() or (folder / MANIFEST).is_file():
        what = "a file" if folder.is_file() else "a checkpoint; `load` takes one"
        raise ValueError(f"resume takes the folder that save was given, and {folder} is {what}")
    problems: list[str] = []
    for path in checkpoints_in(folder):
        try:
            manifest = good(path)
        except Damaged as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"resuming at {path.name}; newer ones are damaged:\n" + "\n".join(problems), stacklevel=2)
        state, extra, tensors = _read(path, manifest, step, strict=True)
        if (position is None) != (manifest.data is None):
            missing = "it was not saved" if manifest.data is None else "data= was not given"
            raise ValueError(f"{path}: where the data was cannot be restored, since {missing}")
        restore = restoring_generators(unpacked(manifest.random, tensors), generators or {})
        if position is not None:
            position.load_state_dict(unpacked(manifest.data, tensors))
        restore()
        return state, extra
    if problems:
        raise ValueError(f"all checkpoints in {folder} are damaged:\n" + "\n".join(problems))
    return step.init(), {}


def check(path: str | Path) -> list[str]:
    """What is wrong with a checkpoint, or with all in a folder; nothing if they are whole.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    wait_for(path)
    wait_for(path.parent)
    return [problem for look in look_into(path) for problem in look.problems]


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Write the parameters and buffers of a checkpoint, or of any safetensors file, into a plain module.

    Args:
        model: what is written to; as it was if anything does not fit.
        path: a checkpoint, or a file of tensors by the module's own names.

    Raises:
        ValueError: it is damaged, or not of this model: tells everything at once.
    """
    path = Path(path)
    wait_for(path.parent)
    if path.is_dir():
        tensors = read_tensors(path / TENSORS, _whole(path).pieces)
        own = {
            name.removeprefix(kind): t for name, t in tensors.items() for kind in _OF_MODULE if name.startswith(kind)
        }
    else:
        own = read_tensors(path, {})
    wanted = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    persistent = model.state_dict().keys()
    given = {id(wanted[name]) for name in own if name in wanted}  # a tied one by any of its names
    problems = [
        f"{name}: the model has it, the file does not"
        for name, tensor in wanted.items()
        if name in persistent and id(tensor) not in given
    ]
    problems += [f"{name}: the file has it, the model does not" for name in own if name not in wanted]
    problems += [
        f"{name}: the file has shape {tuple(own[name].shape)}, the model {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError("\n".join([f"{path} is of another model:", *(f"  - {problem}" for problem in problems)]))
    with torch.no_grad():
        for name, tensor in own.items():
            wanted[name].copy_(tensor)
    return model


_OF_MODULE = ("params/", "buffers/")


def _read(path: Path, manifest: Manifest, step: AnyStep, strict: bool) -> tuple[State, Extra, Mapping[str, Tensor]]:
    """The state, the user's own values, and all tensors by name."""
    tensors = read_tensors(path / TENSORS, manifest.pieces)
    fresh = step.init()
    places: dict[str, Tensor] = {}
    packed_state(fresh, places)
    device = next(iter(fresh.params.values())).device
    here = {
        name: tensor.to(places[name].device if name in places else device) if name.split("/")[0] in FIELDS else tensor
        for name, tensor in tensors.items()
    }
    fields = fields_of(manifest.state, here, fresh)
    extra: Extra = unpacked(manifest.extra, tensors)
    if not strict:
        state, adoption = step.adopt(State(**fields))
        if adoption.afresh or adoption.left:
            warnings.warn(f"{path}: {adoption}", stacklevel=3)
        return state, extra, tensors
    problems = [
        *_step_problems(step, State(**fields)),
        *plan_problems(manifest.plan, plan_data(step.plan)),
        *algorithm_problems(manifest.options["algorithms"], algorithms_of(step)),
    ]
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{path} was saved by another step; strict=False of `load` takes what fits:\n{shown}")
    return fresh.replace(**fields), extra, tensors


def _step_problems(step: AnyStep, state: State) -> Iterator[str]:
    try:
        refuse_others_state(step, state)
    except ValueError as error:
        yield from (line.strip().removeprefix("- ") for line in str(error).splitlines()[1:])


def _whole(path: Path) -> Manifest:
    try:
        return good(path)
    except Damaged as error:
        raise ValueError(f"this checkpoint cannot be loaded:\n{error}") from None
