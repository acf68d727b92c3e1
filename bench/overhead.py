"""What a compiled step costs beside its graph: the compiled code does nothing here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import funcfreeze as ff


def _idle(graph: Any, inputs: list[Any]) -> Callable[..., list[torch.Tensor]]:
    """A backend whose compiled code returns at once."""
    (returned,) = graph.graph.output_node().args
    outputs = [torch.zeros(()) for _ in returned]
    return lambda *given: outputs


def overhead(parameters: int, optimizer: ff.optim.Transform, rounds: int = 1000) -> float:
    """Microseconds of a step over so many parameters, in linear layers, without its graph; the median."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(parameters // 2)])
    step = ff.Step(
        model,
        lambda model, x: {"all": model(x).square().mean(), "first": model[0](x).mean()},
        {"all": "*", "first": {"0": -0.1}},
        optimizer=optimizer,
        compile={"backend": _idle},
    )
    state, x = step.init(), torch.randn(8, 4)
    times = []
    for turn in range(-10, rounds):
        start = time.perf_counter()
        state, _ = step(state, x)
        if turn >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6
