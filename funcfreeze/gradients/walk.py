"""One call of the autograd engine.

`torch.autograd.grad` looks at every argument before it calls the engine: shapes, overrides, other spellings. What the
planner has put together needs none of that, and on a small network it is a twentieth of the step. The function below it
is private to torch, and has had these arguments from 2.11 to 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


def walk(
    outputs: Sequence[GradientEdge],
    inputs: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor],
    *,
    retain_graph: bool,
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    """What arrives at the inputs when the cotangents start at the outputs; None where nothing does."""
    found: tuple[Tensor | None, ...] = torch.autograd.graph._engine_run_backward(
        tuple(outputs), tuple(cotangents), retain_graph, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return found


def is_kept() -> bool:
    """Inside a node's backward: whether the engine's call that runs it retains the graph."""
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


def at_end_of_backward(f: Callable[[], None]) -> None:
    """Inside a node's backward: call a function when the engine's call that runs it has ended, if it does not fail."""
    torch.autograd.Variable._execution_engine.queue_callback(f)
