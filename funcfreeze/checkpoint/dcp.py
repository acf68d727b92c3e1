"""A state as the flat dict that `torch.distributed.checkpoint` saves well, for those whose runs live there."""

from __future__ import annotations

from collections.abc import Mapping

import optree
from torch import Tensor

from funcfreeze.checkpoint.states import AnyStep, fields_of, packed_state, refuse_others_state
from funcfreeze.computation.state import State


def to_dcp(step: AnyStep, state: State) -> dict[str, Tensor]:
    """All tensors of a state by name, `params/encoder.weight`: the state's own, which are not copied.

    `torch.distributed.checkpoint` keeps whatever is no tensor in a flat dict as a pickle; here is nothing such.

    Raises:
        TypeError: the state holds numbers that are no tensors (a count of an optimizer of your own): tells all.

    >>> import torch
    >>> import funcfreeze as ff
    >>> losses = lambda model, x: {"fit": model(x).square().mean()}
    >>> step = ff.Step(torch.nn.Linear(2, 1), losses, {"fit": "*"}, optimizer=ff.optim.sgd(0.1))
    >>> flat = to_dcp(step, step.init())
    >>> sorted(flat)
    ['params/bias', 'params/weight', 'step']
    >>> from_dcp(step, flat)
    State(step=0, 2 parameters, 0 buffers)
    """
    refuse_others_state(step, state)
    paths, leaves, _ = optree.tree_flatten_with_path(state.optimizer)
    others = [
        f"{'.'.join(map(str, ('optimizer', *path)))} ({leaf!r})"
        for path, leaf in zip(paths, leaves, strict=True)
        if not isinstance(leaf, Tensor)
    ]
    if others:
        raise TypeError(f"to_dcp gives tensors alone, not {', '.join(others)}; ff.checkpoint.save keeps all")
    tensors: dict[str, Tensor] = {}
    packed_state(state, tensors)
    return tensors


def from_dcp(step: AnyStep, flat: Mapping[str, Tensor]) -> State:
    """The state of these tensors: `flat = to_dcp(step, step.init())`, which `torch.distributed.checkpoint.load` fills.

    Raises:
        ValueError: names are missing or unknown, or shapes are others: tells all.
    """
    fresh = step.init()
    wanted: dict[str, Tensor] = {}
    made = packed_state(fresh, wanted)
    problems = [f"{name}: the Step has it, it is not given" for name in wanted if name not in flat]
    problems += [f"{name}: it is given, the Step does not have it" for name in flat if name not in wanted]
    problems += [
        f"{name}: the Step has shape {tuple(tensor.shape)} and {tensor.dtype}, given is {tuple(flat[name].shape)} and "
        f"{flat[name].dtype}"
        for name, tensor in wanted.items()
        if name in flat and (flat[name].shape, flat[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if problems:
        raise ValueError("\n".join(["these tensors are of another step:", *(f"  - {line}" for line in problems)]))
    return fresh.replace(**fields_of(made, flat, fresh))
