"""What `ff.fit` and `ff.checkpoint` add to a loop."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import funcfreeze as ff
from funcfreeze.checkpoint.saving import wait_for

MILLION = 1_000_000


def _step(model: nn.Module) -> ff.Step:
    def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {"fit": model(x).square().mean()}

    return ff.Step(model, losses, {"fit": "*"}, optimizer=ff.optim.sgd(1e-3))


def fit_beside_the_bare_loop(rounds: int, steps: int = 400) -> dict[str, Any]:
    """CPU time a step of a loop of two lines, and of `ff.fit`: silent, with a logger, and showing its line, in turn.

    The bar: at most 100 microseconds more.
    """
    data = [torch.randn(4, 8) for _ in range(steps)]
    runs = {
        "bare loop": _bare(data),
        "fit": _fitted(data),
        "fit with a logger": _fitted(data, log=_Nowhere()),
        "fit that shows": _fitted(data, show=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn >= 0:
                taken[name].append((time.process_time() - start) / steps * MILLION)
    added = {
        f"microseconds added by {name}": statistics.median(
            there - here for there, here in zip(taken[name], taken["bare loop"], strict=True)
        )
        for name in list(runs)[1:]
    }
    return {"microseconds a step": {name: statistics.median(times) for name, times in taken.items()}, **added}


def _bare(data: list[Tensor]) -> Callable[[], None]:
    step = _step(nn.Linear(8, 1))
    kept = [step.init()]

    def run() -> None:
        state = kept.pop()
        for batch in data:
            state, _ = step(state, batch)
        kept.append(state)

    return run


def _fitted(data: list[Tensor], **options: Any) -> Callable[[], None]:
    step = _step(nn.Linear(8, 1))
    kept, ends = [step.init()], count(len(data), len(data))

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            state, _ = ff.fit(step, kept.pop(), data, **{"steps": next(ends), "show": False, **options})
        kept.append(state)

    return run


class _Nowhere:
    def log(self, step: int, metrics: Any) -> None:
        pass


def background_save(rounds: int, layers: int = 30, width: int = 2048) -> dict[str, Any]:
    """How long a loop waits for a save in the background, beside one that waits to the end, and copying the memory.

    The bar: no longer than the copy and 5 % of what a blocking save takes.
    """
    step = _step(nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)]))
    state = step.init()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save = partial(ff.checkpoint.save, folder, step, state, keep=1)
        ways: dict[str, Callable[[], Any]] = {
            "copy": lambda: [tensor.to("cpu", copy=True) for tensor in state.params.values()],
            "blocking save": save,
            "background save": partial(save, background=True),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(-1, rounds):
            for way in [*ways][turn % 3 :] + [*ways][: turn % 3]:  # which of them comes after which matters
                start = time.perf_counter()
                made = ways[way]()
                if turn >= 0:
                    seconds[way].append(time.perf_counter() - start)
                wait_for(folder)
                del made
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    allowed = medians["copy"] + 0.05 * medians["blocking save"]
    return {
        "megabytes": sum(tensor.nbytes for tensor in state.params.values()) / MILLION,
        "seconds": medians,
        "background save / what it may take": medians["background save"] / allowed,
    }


def long_runs(rounds: int) -> dict[str, dict[str, Any]]:
    """Both."""
    return {
        "fit, a step of one small layer": fit_beside_the_bare_loop(rounds),
        "saving in the background": background_save(max(3, rounds // 6)),
    }
