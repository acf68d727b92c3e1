"""What a compiled step costs beside its graph: the compiled code does nothing here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.optim.opaque import KERNELS


def _idle(graph: Any, inputs: list[Any]) -> Callable[..., list[torch.Tensor]]:
    """A backend whose compiled code returns at once."""
    (returned,) = graph.graph.output_node().args
    values = [node.meta.get("val", node.meta.get("example_value")) for node in returned]
    outputs = [torch.zeros(value.shape, dtype=value.dtype) for value in values]
    return lambda *given: outputs


def _nothing(*given: Any, **options: Any) -> None:
    """In the place of the optimizer's kernels, which are called after the graph."""


def overhead(parameters: int, optimizer: ff.optim.Transform, rounds: int = 1000) -> dict[str, float]:
    """Microseconds of a step over so many parameters, in linear layers, without its graph, medians.

    Beside it those of `torch.compile` on the losses alone: Dynamo's guards. In turn, since both move with the machine.
    """
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(parameters // 2)])

    def losses(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"all": model(x).square().mean(), "first": model[0](x).mean()}

    routes = {"all": "*", "first": {"0": -0.1}}
    step = ff.Step(model, losses, routes, optimizer=optimizer, compile={"backend": _idle})
    by_hand = torch.compile(losses, fullgraph=True, backend=_idle)
    state, x = step.init(), torch.randn(8, 4)
    times: dict[str, list[float]] = {"step": [], "guards alone": []}
    with patch.dict(KERNELS, dict.fromkeys(KERNELS, _nothing)):
        for turn in range(-10, rounds):
            start = time.perf_counter()
            state, _ = step(state, x)
            between = time.perf_counter()
            with torch.no_grad():
                by_hand(model, x)
            if turn >= 0:
                times["step"].append(between - start)
                times["guards alone"].append(time.perf_counter() - between)
    return {name: statistics.median(taken) * 1e6 for name, taken in times.items()}
