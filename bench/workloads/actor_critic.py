"""A tiny actor-critic on a shared trunk, where a step is all overhead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads.workload import MultiTask, Workload, mlp

ENTROPY, TRUNK = 0.01, 0.5


def _losses(model: nn.Module, h: Tensor, batch: Any) -> dict[str, Tensor]:
    _, action, returns = batch
    log_policy = model["actor"](h).log_softmax(-1)
    value = model["critic"](h).squeeze(-1)
    advantage = returns - value.detach()
    return {
        "policy": -(advantage * log_policy.gather(-1, action[:, None]).squeeze(-1)).mean(),
        "entropy": ENTROPY * (log_policy.exp() * log_policy).sum(-1).mean(),
        "value": F.mse_loss(value, returns),
    }


def _by_hand(model: nn.Module, batch: Any) -> Tensor:
    """The critic reads features whose gradient is scaled by what is detached from them."""
    observation, action, returns = batch
    h = model["trunk"](observation)
    log_policy = model["actor"](h).log_softmax(-1)
    value = model["critic"](TRUNK * h + (1 - TRUNK) * h.detach()).squeeze(-1)
    advantage = returns - value.detach()
    policy = -(advantage * log_policy.gather(-1, action[:, None]).squeeze(-1)).mean()
    entropy = ENTROPY * (log_policy.exp() * log_policy).sum(-1).mean()
    return policy + entropy + F.mse_loss(value, returns)


def actor_critic(width: int = 64, observations: int = 8, actions: int = 4, size: int = 32) -> Workload:
    """Policy gradient, an entropy bonus, and a value loss that moves the shared trunk half as much as its head."""

    def in_jax() -> Callable[..., Any]:
        from bench.in_jax import actor_critic as written

        return partial(written.losses, entropy=ENTROPY)

    split = MultiTask(lambda model, batch: model["trunk"](batch[0]), _losses, shared="trunk")
    model = {
        "trunk": nn.Sequential(mlp(observations, width, width, between=nn.Tanh), nn.Tanh()),
        "actor": nn.Linear(width, actions),
        "critic": nn.Linear(width, 1),
    }
    return Workload(
        "actor-critic",
        nn.ModuleDict(model),
        split.together,
        {"policy": ["trunk", "actor"], "entropy": ["trunk", "actor"], "value": {"critic": 1.0, "trunk": TRUNK}},
        lambda: (torch.randn(size, observations), torch.randint(actions, (size,)), torch.randn(size)),
        by_hand=_by_hand,
        multitask=split,
        in_jax=in_jax,
    )
