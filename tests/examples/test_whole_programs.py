"""Programs with averaged targets, BYOL and SAC, against the loops that people write for them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from plain_ways import example, framework
from torch import nn


def averaged(target: nn.Module, online: nn.Module, kept: float) -> None:
    with torch.no_grad():
        for average, parameter in zip(target.parameters(), online.parameters(), strict=True):
            average.copy_(kept * average + (1 - kept) * parameter)


def byol_by_hand(program, model, batches, moves=True):
    """What trains, and the teacher."""
    online, predictor = model["online"], model["predictor"]
    teacher = copy.deepcopy(online).requires_grad_(False)
    groups = [
        {"params": [p for p in part.parameters() if (p.ndim > 1) == decays], "lr": rate, "weight_decay": decay}
        for part, rate in ((online, 2e-3), (predictor, 4e-3))
        for decays, decay in ((True, 1e-2), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups)
    for number, (one, two) in enumerate(batches):
        with torch.no_grad():
            first, second = teacher(two), teacher(one)
        loss = 1 - F.cosine_similarity(predictor(online(one)), first).mean()
        loss = loss + 1 - F.cosine_similarity(predictor(online(two)), second).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if moves:
            averaged(teacher, online, 1 - 0.02 * (1 + math.cos(math.pi * number / program.STEPS)) / 2)
    return {**model.state_dict(), **teacher.state_dict(prefix="teacher: ")}


def sac_by_hand(program, model, batches, moves=True):
    """What trains, and the critics' target."""
    q, actor, log_alpha = model["q"], model["actor"], model["log_alpha"]
    target = copy.deepcopy(q).requires_grad_(False)
    q_optimizer, actor_optimizer, alpha_optimizer = (
        torch.optim.Adam(trained, 1e-3) for trained in (q.parameters(), actor.parameters(), [log_alpha])
    )
    for cart, push, reward, then in batches:
        with torch.no_grad():
            following, log_density = program.act(model, then)
            least = torch.min(*(net(torch.cat([then, following], 1)) for net in target))
            wanted = reward + program.GAMMA * (least - log_alpha.exp() * log_density)
        q_optimizer.zero_grad()
        sum(F.mse_loss(net(torch.cat([cart, push], 1)), wanted) for net in q).backward()
        q_optimizer.step()

        drawn, log_density = program.act(model, cart)
        least = torch.min(*(net(torch.cat([cart, drawn], 1)) for net in q))
        actor_optimizer.zero_grad()
        (log_alpha.detach().exp() * log_density - least).mean().backward()
        actor_optimizer.step()

        with torch.no_grad():
            _, log_density = program.act(model, cart)
        alpha_optimizer.zero_grad()
        (-log_alpha.exp() * (log_density - 2)).mean().backward()
        alpha_optimizer.step()
        if moves:
            averaged(target, q, 0.99)
    parts = q.state_dict(prefix="q."), actor.state_dict(prefix="actor."), target.state_dict(prefix="q: ")
    return {"log_alpha": log_alpha, **{path: tensor for part in parts for path, tensor in part.items()}}


def views(program):
    return [(torch.rand(16, 64), torch.rand(16, 64)) for _ in range(10)]


def carts(program):
    return [(torch.randn(16, 4), torch.rand(16, 2), torch.randn(16, 1), torch.randn(16, 4)) for _ in range(10)]


def detached(tensors):
    return {path: tensor.detach() for path, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "by_hand", "batches"), [("byol", byol_by_hand, views), ("sac", sac_by_hand, carts)], ids=["byol", "sac"]
)
def test_as_the_plain_loop(name, by_hand, batches, seed):
    framework("sklearn")
    program = example(name)
    model, seen = program.networks(), batches(program)
    plain, stale = copy.deepcopy(model), copy.deepcopy(model)
    step = program.step_of(model)
    state = step.init()
    torch.manual_seed(seed)
    for batch in seen:
        state, _ = step(state, batch)
    torch.manual_seed(seed)
    wanted = detached(by_hand(program, plain, seen))
    torch.manual_seed(seed)
    other = detached(by_hand(program, stale, seen, moves=False))

    targets = {f"{name}: {path}": t for name, part in state.targets.items() for path, t in part.items()}
    found = {**state.params, **state.buffers, **targets}
    assert set(found) == set(wanted)
    for (
        path,
        tensor,
    ) in wanted.items():  # a bias before a norm has a gradient of rounding, and steps that are 1e-8 of 1e-3
        torch.testing.assert_close(found[path], tensor, rtol=1e-9, atol=1e-9, msg=path)
    assert max(float((found[path] - other[path]).abs().max()) for path in state.params) > 1e-6, "targets matter"
