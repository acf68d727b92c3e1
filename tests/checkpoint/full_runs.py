"""A run with everything in it that has to be saved, for tests of checkpoints."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

import funcfreeze as ff

ROUTES = {"a": ["trunk", "a"], "b": {"trunk": 0.5, "b": 1.0}}


def network():
    trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh())
    return nn.ModuleDict({"trunk": trunk, "a": nn.Linear(8, 2), "b": nn.Linear(8, 1)})


def losses(model, x):
    h = model["trunk"](x)
    return {"a": model["a"](h).square().mean(), "b": model["b"](h).sin().mean()}


def critic(model, x):
    return {"q": model["b"](model["trunk"](x)).square().mean()}


def lone(model, **options):
    """Clipping, a schedule, a loss scale, a random rule, one with a state, an averaged twin."""
    optimizer = ff.optim.chain(ff.optim.clip_by_global_norm(1.0), ff.optim.adamw(ff.schedules.cosine(0.1, 0.0, 50)))
    return ff.Step(
        model,
        losses,
        ROUTES,
        optimizer=optimizer,
        merge={"trunk.0": ff.merge.pcgrad(seed=3), "trunk.1": ff.merge.gradnorm()},
        targets={"teacher": ff.ema("trunk", 0.9, buffers="averaged")},
        loss_scale=ff.LossScale(8.0, growth_interval=3),
        on_nonfinite="skip",
        **options,
    )


def by_turns(model, **options):
    routes = [({"q": ["trunk", "b"]}, critic), (ROUTES, losses)]
    members = {
        name: ff.Step(model, f, by_loss, optimizer=ff.optim.adam(0.05))
        for name, (by_loss, f) in zip(("critic", "actor"), routes, strict=True)
    }
    return ff.alternate(members, every={"actor": 2}, **options)


def batch():
    """Drawn from every generator there is."""
    x = torch.randn(6, 4) + random.random()
    return x + torch.from_numpy(np.random.rand(6, 4)).to(x.dtype)


def train(step, state, steps, log=None):
    for _ in range(steps):
        state, metrics = step(state, batch())
        if log is not None:
            log.append({name: value.clone() for name, value in flat(metrics).items()})
    return state


def flat(metrics, before=""):
    found = {}
    for name, value in metrics.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found
