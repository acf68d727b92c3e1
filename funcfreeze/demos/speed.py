"""How long one training step takes: the recipe, a hand-written gradient-reversal layer, and the declaration.

Eight heads on one encoder, at a realistic width. The class losses train the encoder and the class heads; the domain
losses train the domain heads, and the encoder against them. The three compute the same gradients, which is checked.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import funcfreeze as ff

Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs, labels, domains."""

CLASSES, DOMAINS = 10, 2

ROUTES = {
    "class": ["encoder", "classifiers"],
    "domain": {"domains": 1.0, "encoder": -0.1},
}


@dataclass(frozen=True)
class Size:
    """How large the network is: `layers` of `width` in the encoder, `heads` of either kind, `batch` inputs."""

    layers: int = 6
    width: int = 512
    heads: int = 4
    batch: int = 256


@dataclass(frozen=True)
class Timings:
    """What was measured.

    Attributes:
        milliseconds: contender -> the median of its steps.
        disagreement: the largest difference between the gradients of two contenders, relative to the largest gradient.
        rounds: how many steps each took.
        threads: how many threads torch used.
        torch: torch's version.
    """

    milliseconds: dict[str, float]
    disagreement: float
    rounds: int
    threads: int
    torch: str


def make_model(size: Size) -> nn.ModuleDict:
    """The network, with initial values that are always the same."""

    def head(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(size.width, size.width), nn.ReLU(), nn.Linear(size.width, outputs))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [layer for _ in range(size.layers) for layer in (nn.Linear(size.width, size.width), nn.ReLU())]
        return nn.ModuleDict(
            {
                "encoder": nn.Sequential(*layers),
                "classifiers": nn.ModuleList(head(CLASSES) for _ in range(size.heads)),
                "domains": nn.ModuleList(head(DOMAINS) for _ in range(size.heads)),
            }
        )


def make_batch(size: Size, draw: torch.Generator) -> Batch:
    """Random numbers. Every step gets others: a network that fits one batch too well slows down on denormal numbers."""
    return (
        torch.randn(size.batch, size.width, generator=draw),
        torch.randint(CLASSES, (size.batch,), generator=draw),
        torch.randint(DOMAINS, (size.batch,), generator=draw),
    )


def losses(model: Any, batch: Batch) -> dict[str, Tensor]:
    """The loss of the class heads and that of the domain heads."""
    inputs, label, domain = batch
    features = model["encoder"](inputs)
    return {
        "class": _total(model["classifiers"], features, label),
        "domain": _total(model["domains"], features, domain),
    }


def _total(heads: Any, features: Tensor, wanted: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(head(features), wanted) for head in heads]).sum()


def _backward(loss: Tensor, *, retain_graph: bool = False) -> None:
    loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch does not annotate it


def recipe_backward(model: nn.ModuleDict, batch: Batch) -> None:
    """The recipe: one backward for every group of parameters, with `requires_grad` toggled between them."""
    found = losses(model, batch)
    model.requires_grad_(False)
    model["domains"].requires_grad_(True)
    _backward(found["domain"], retain_graph=True)  # may update only the domain heads
    model["domains"].requires_grad_(False)
    model["encoder"].requires_grad_(True)
    _backward(-0.1 * found["domain"], retain_graph=True)  # may update only the encoder
    model["classifiers"].requires_grad_(True)
    _backward(found["class"])  # may update the encoder and the class heads
    model.requires_grad_(True)


class _Reversal(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -0.1 on the way back."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return -0.1 * cotangent


def reversal_backward(model: nn.ModuleDict, batch: Batch) -> None:
    """A gradient-reversal layer, written by hand: one backward of one sum."""
    inputs, label, domain = batch
    features = model["encoder"](inputs)
    reversed_features: Tensor = _Reversal.apply(features)  # type: ignore[no-untyped-call]
    total = _total(model["classifiers"], features, label) + _total(model["domains"], reversed_features, domain)
    _backward(total)


def measure(seconds: float, size: Size, watch: Callable[[float], None]) -> Timings:
    """Let the contenders take turns, and give the median time of each one's steps.

    Args:
        seconds: how long to go on, at least for one round. Before it, each takes two steps that do not count.
        size: of the network.
        watch: called after every round with the share of the time that is gone.
    """
    contenders = {
        "recipe": _eager(recipe_backward, size, fused=False),
        "recipe, fused Adam": _eager(recipe_backward, size, fused=True),
        "reversal": _eager(reversal_backward, size, fused=False),
        "reversal, fused Adam": _eager(reversal_backward, size, fused=True),
        "routed": _routed(size),
    }
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):
        _round(contenders, make_batch(size, draw))
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    order = [*contenders]
    while not rounds or time.perf_counter() - start < seconds:
        rounds.append(_round({name: contenders[name] for name in order}, make_batch(size, draw)))
        order = order[1:] + order[:1]  # nobody is always first; the caches hold what ran just before
        watch(min(1.0, (time.perf_counter() - start) / seconds) if seconds else 1.0)
    return Timings(
        {name: 1000 * statistics.median(taken[name] for taken in rounds) for name in contenders},
        disagreement=disagreement(size),
        rounds=len(rounds),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def _round(contenders: Mapping[str, Callable[[Batch], None]], batch: Batch) -> dict[str, float]:
    """One step of each, in seconds."""
    taken = {}
    for name, advance in contenders.items():
        start = time.perf_counter()
        advance(batch)
        taken[name] = time.perf_counter() - start
    return taken


def _eager(backward: Callable[[nn.ModuleDict, Batch], None], size: Size, *, fused: bool) -> Callable[[Batch], None]:
    model = make_model(size)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)

    def advance(batch: Batch) -> None:
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()

    return advance


def _routed(size: Size) -> Callable[[Batch], None]:
    step = ff.Step(make_model(size), losses, ROUTES, optimizer=ff.optim.adam(1e-3))
    state = step.init()

    def advance(batch: Batch) -> None:
        nonlocal state
        state, _ = step(state, batch)

    return advance


def disagreement(size: Size) -> float:
    """The largest difference between two contenders' gradients on one batch, relative to the largest gradient."""
    batch = make_batch(size, torch.Generator().manual_seed(1))
    model = make_model(size)
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adam(1e-3))
    found = [step.gradients(step.init(), batch)]
    for backward in (recipe_backward, reversal_backward):
        other = copy.deepcopy(model)
        backward(other, batch)
        found.append({path: _gradient(path, param) for path, param in other.named_parameters()})
    ours, *theirs = found
    scale = max(gradient.abs().max().item() for gradient in ours.values())
    return max((one[path] - gradient).abs().max().item() for one in theirs for path, gradient in ours.items()) / scale


def _gradient(path: str, param: Tensor) -> Tensor:
    if param.grad is None:
        raise RuntimeError(f"{path} got no gradient, and every parameter should")
    return param.grad
