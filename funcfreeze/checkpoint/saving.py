"""Saving a run: everything that it is, of one step, copied first and then written."""

from __future__ import annotations

import datetime
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcfreeze.checkpoint.files import TENSORS, File, required, write_tensors
from funcfreeze.checkpoint.folder import name_of, put
from funcfreeze.checkpoint.manifest import Manifest
from funcfreeze.checkpoint.plain import packed
from funcfreeze.checkpoint.plans import algorithms_of, buffers_of, plan_data
from funcfreeze.checkpoint.randomness import generator_states
from funcfreeze.checkpoint.resumable import checked_data, position_of
from funcfreeze.checkpoint.states import AnyStep, packed_state, refuse_no_step, refuse_others_state
from funcfreeze.checkpoint.versions import versions
from funcfreeze.computation.state import State


def save(
    folder: str | Path,
    step: AnyStep,
    state: State,
    *,
    data: Any = None,
    extra: Mapping[str, Any] | None = None,
    generators: Mapping[str, Any] | None = None,
    keep: int | None = 3,
    background: bool = False,
) -> Path:
    """Save a run: `folder/step-0000000100`, which is there whole or not at all.

    In it are `tensors.safetensors`, which `safetensors.safe_open` reads without this library (`params/encoder.weight`,
    `buffers/...`, `optimizer/...`), and `manifest.json`, with a checksum of each file and all that is no tensor.
    Nothing is pickled. The state of the generators of Python, NumPy and torch, on the CPU and CUDA, is saved with it.
    Code is not: losses and model are what the program says that resumes.

    Args:
        folder: of this run's checkpoints; made if it is not there.
        step: the `Step` or alternation whose state it is.
        state: what is saved; it stays usable.
        data: something with `state_dict` and `load_state_dict` that says where the data is.
        extra: plain data of the user's own (dicts, lists, tuples, strings, bytes, numbers, None, tensors), by name.
        generators: generators of the user's own, by name.
        keep: so many of the newest checkpoints stay in the folder; None keeps all.
        background: write in a thread, from a copy that is made before this returns. What goes wrong then is a warning,
            and the earlier checkpoints stay. The next `save`, `resume` or `load` there, and the end of the program,
            wait for it.

    Returns:
        The folder of the checkpoint; in the background it is not there yet.

    Raises:
        TypeError: `extra` holds what is no plain data, `data` cannot say where it is; nothing is written.
        RuntimeError: the state is spent.
        OSError: it cannot be written; earlier checkpoints are as before.
        ImportError: safetensors is not installed.

    >>> import tempfile
    >>> import funcfreeze as ff
    >>> from torch import nn
    >>> losses = lambda model, x: {"fit": model(x).square().mean()}
    >>> step = ff.Step(nn.Linear(2, 1), losses, {"fit": "*"}, optimizer=ff.optim.adam(0.1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     state, extra = ff.checkpoint.resume(folder, step)
    ...     state, _ = step(state, torch.ones(3, 2))
    ...     at = ff.checkpoint.save(folder, step, state, extra={"best": 0.5})
    ...     state, extra = ff.checkpoint.resume(folder, step)
    >>> at.name, int(state.step), extra
    ('step-0000000001', 1, {'best': 0.5})
    """
    begun = saving(folder, step, state, data=data, extra=extra, generators=generators, keep=keep, background=background)
    return begun.path if background else begun.outcome.result()


@dataclass(frozen=True)
class Saving:
    """A checkpoint that is written, or is being written.

    Attributes:
        path: where it will be.
        outcome: that path once it is there, or what went wrong.
    """

    path: Path
    outcome: Future[Path]

    def is_there(self) -> bool:
        """Whether it was written; waits for it."""
        return self.outcome.exception() is None


def saving(
    folder: str | Path,
    step: AnyStep,
    state: State,
    *,
    data: Any,
    extra: Mapping[str, Any] | None,
    generators: Mapping[str, Any] | None,
    keep: int | None,
    background: bool,
) -> Saving:
    """What `save` does, and how it went."""
    folder = Path(folder).absolute()  # a thread writes there, wherever the program goes
    refuse_no_step(step, state)
    refuse_what_cannot_be_saved(extra, generators, keep)
    position = checked_data(data)
    refuse_others_state(step, state)
    wait_for(folder)
    tensors: dict[str, Tensor] = {}
    count = int(state.step)
    manifest = partial(
        Manifest,
        step=count,
        state=packed_state(state, tensors),
        plan=plan_data(step.plan),
        extra=packed({} if extra is None else extra, "extra", tensors),
        data=None if position is None else packed(position_of(position), "data", tensors),
        random=packed(generator_states(generators or {}), "random", tensors),
        options={"step": repr(step), "algorithms": algorithms_of(step), "buffers": buffers_of(step)},
        versions=versions(),
        saved=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    _refuse_others(tensors)
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def write(unfinished: Path) -> None:
        pieces = write_tensors(unfinished / TENSORS, copies)
        manifest(files=(File.of(unfinished / TENSORS),), pieces=pieces).write(unfinished)

    begun = Saving(folder / name_of(count), Future())
    if background:
        job = partial(_written_in_the_background, begun, partial(put, folder, count, keep, write))
        threading.Thread(target=job, name=_thread_name(folder)).start()
    else:
        begun.outcome.set_result(put(folder, count, keep, write))
    return begun


def refuse_what_cannot_be_saved(extra: object, generators: object, keep: object) -> None:
    """Tell all that is wrong with what goes into a checkpoint beside the state, before anything is written.

    Raises:
        TypeError, ValueError: some of these cannot be saved.
        ImportError: safetensors is not installed.
    """
    required()
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep is the number of checkpoints that stay, at least 1, or None for all; got {keep!r}")
    for name, given in (("extra", extra), ("generators", generators)):
        if given is not None and not (isinstance(given, Mapping) and all(isinstance(key, str) for key in given)):
            raise TypeError(f"{name}= is a dict by names, got {given!r}")
    if isinstance(generators, Mapping):
        generator_states(generators)
    packed(extra, "extra", {})


def wait_for(folder: Path) -> None:
    """Wait for what is being written into a folder in the background."""
    for thread in threading.enumerate():
        if thread.name == _thread_name(folder):
            while thread.ident is None:  # another thread is about to start it
                time.sleep(0.001)
            thread.join()


def _written_in_the_background(begun: Saving, write: Callable[[], Path]) -> None:
    try:
        begun.outcome.set_result(write())
    except BaseException as error:  # whoever waits for the outcome must not wait for ever
        begun.outcome.set_exception(error)
        warnings.warn(
            f"no checkpoint was saved: {type(error).__name__}: {error}; earlier ones in {begun.path.parent} are as "
            "before",
            stacklevel=1,
        )


def _thread_name(folder: Path) -> str:
    return f"funcfreeze saves into {folder.resolve()}"


def _refuse_others(tensors: Mapping[str, Tensor]) -> None:
    others = [name for name, tensor in tensors.items() if tensor.layout is not torch.strided or tensor.is_quantized]
    if others:
        raise TypeError(f"a checkpoint holds dense tensors; sparse or quantised are {', '.join(others)}")
