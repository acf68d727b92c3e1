"""BYOL: two views, a predictor that looks from one into the other, and a teacher that averages the online network."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import funcfreeze as ff
from bench.workloads.program import Loop, Options, Program, compiled

RATES, DECAY, KEPT, STEPS = {"online": 1e-3, "predictor": 1e-2}, 1e-2, 0.99, 10_000
Model = nn.ModuleDict


def _losses(model: Model, batch: Any, *, targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    def apart(seen: Tensor, other: Tensor) -> Tensor:
        guess = model["predictor"](model["online"](seen))
        return 2 - 2 * F.cosine_similarity(guess, targets["teacher"](other)).mean()

    one, two = batch
    return {"byol": apart(one, two) + apart(two, one)}


def _ours(model: Model, compile: bool | Options) -> ff.Step:
    adamw = ff.optim.adamw(RATES, weight_decay={ff.where(lambda path, p: p.ndim > 1): DECAY})
    teacher = ff.ema("online", ff.schedules.cosine(KEPT, 1.0, STEPS))
    return ff.Step(model, _losses, {"byol": "*"}, optimizer=adamw, targets={"teacher": teacher}, compile=compile)


def _by_hand(model: Model, compile: Options | None) -> Loop:
    """No decay of norms and biases, no graph of the teacher, which is averaged by torch's own function for it."""
    online, predictor = model["online"], model["predictor"]
    teacher = copy.deepcopy(online).requires_grad_(False)
    groups = [
        {"params": [p for p in model[name].parameters() if (p.ndim > 1) == decays], "lr": rate, "weight_decay": decay}
        for name, rate in RATES.items()
        for decays, decay in ((True, DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    averages, averaged = [*teacher.parameters()], [*online.parameters()]
    calls = itertools.count()

    def apart(seen: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(other)
        return 2 - 2 * F.cosine_similarity(predictor(online(seen)), wanted).mean()

    def find(one: Tensor, two: Tensor) -> Tensor:
        return apart(one, two) + apart(two, one)

    loss = compiled(find, compile)

    def body(batch: Any) -> None:
        optimizer.zero_grad()
        loss(*batch).backward()
        optimizer.step()
        kept = 1.0 - (1.0 - KEPT) * (math.cos(math.pi * next(calls) / STEPS) + 1.0) / 2.0
        get_ema_multi_avg_fn(kept)(averages, averaged, 0)

    return Loop(body, {"teacher": teacher})


def head(features: int, hidden: int, outputs: int) -> nn.Sequential:
    """A projector or a predictor."""
    # No bias: before a norm its gradient is rounding, which Adam would turn into steps of full size.
    wide, narrow = nn.Linear(features, hidden, bias=False), nn.Linear(hidden, outputs, bias=False)
    return nn.Sequential(wide, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), narrow)


def small_encoder(width: int = 16) -> nn.Sequential:
    """Three convolutions, for small images, up to `4 * width` pooled features."""
    layers: list[nn.Module] = []
    for inside, outside in pairwise((3, width, 2 * width, 4 * width)):
        layers += [nn.Conv2d(inside, outside, 3, 2, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def byol(
    encoder: Callable[[], nn.Module] = small_encoder,
    features: int = 64,
    hidden: int = 256,
    outputs: int = 64,
    image: int = 32,
    size: int = 32,
) -> Program:
    """One loss and one optimizer, with rates and decays by part, and the teacher's average on its way to 1."""
    model = {
        "online": nn.Sequential(encoder(), head(features, hidden, outputs)),
        "predictor": head(outputs, hidden, outputs),
    }
    views = (size, 3, image, image)
    return Program("BYOL", nn.ModuleDict(model), lambda: (torch.randn(views), torch.randn(views)), _by_hand, _ours)
