"""A state's tensors in the model for something else than a step: evaluation, acting, sampling, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcfreeze.computation.back_door import refuse_writes
from funcfreeze.computation.evaluation import Evaluation
from funcfreeze.computation.state import State
from funcfreeze.model.attributes import flags_kept
from funcfreeze.model.functional import marks_of

Names = str | Sequence[str] | None
"""The name of a target, or several."""


def shown(evaluation: Evaluation, state: State, targets: Names) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The state's parameters and buffers, with targets in the place of what they are of.

    Raises:
        ValueError: there is no such target, or two of them are of one part.
    """
    names = [targets] if isinstance(targets, str) else targets or ()
    averages = evaluation.targets.in_place_of(names, state.fields[1])
    if not averages:
        return state.params, state.buffers
    return (
        {path: averages.get(path, tensor) for path, tensor in state.params.items()},
        {path: averages.get(path, tensor) for path, tensor in state.buffers.items()},
    )


def call_with(evaluation: Evaluation, state: State, f: Callable[..., Any], args: Sequence[Any], targets: Names) -> Any:
    """`f(model, *args)` with the state's tensors in the model; see `Step.call`."""
    functional = evaluation.functional
    own_params, own_buffers = shown(evaluation, state, targets)
    twins = state.fields[1]
    constants = {path: twins[path] for path in functional.constants}
    buffers = {path: tensor.clone() for path, tensor in {**twins, **own_buffers}.items() if path not in constants}
    params = dict(zip(evaluation.plan.paths, map(Tensor.detach, evaluation.leaves(own_params)), strict=True))
    held = {**params, **constants}
    with torch.no_grad(), functional.holding(params, {**buffers, **constants}), flags_kept(functional.module):
        marks = marks_of(held)
        result = f(functional.module, *args)
        refuse_writes(held, marks, evaluation.seen.written)
        functional.left(held, marks, evaluation.seen.written)
    return result
