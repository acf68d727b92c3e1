"""Soft actor-critic with a learned temperature: the critics, then the actor, then the temperature."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import funcfreeze as ff
from bench.workloads.program import Loop, Options, Program, compiled
from bench.workloads.workload import mlp
from funcfreeze.alternating.alternation import Alternation

GAMMA, KEPT, RATES = 0.99, 0.995, {"critic": 1e-3, "actor": 3e-4, "alpha": 1e-3}
LEAST, MOST = -5.0, 2.0  # of the logarithm of a deviation


class Critics(nn.Module):
    """Two values of an action."""

    def __init__(self, observations: int, actions: int, width: int) -> None:
        super().__init__()
        self.one, self.two = (mlp(observations + actions, width, width, 1) for _ in range(2))

    def forward(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([observation, action], -1)
        return self.one(x).squeeze(-1), self.two(x).squeeze(-1)


class Actor(nn.Module):
    """A squashed normal distribution."""

    def __init__(self, observations: int, actions: int, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(mlp(observations, width, width), nn.ReLU())
        self.mean, self.spread = nn.Linear(width, actions), nn.Linear(width, actions)

    def forward(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """An action, and the logarithm of its density."""
        h = self.trunk(observation)
        log_deviation = LEAST + 0.5 * (MOST - LEAST) * (self.spread(h).tanh() + 1)
        action = (self.mean(h) + log_deviation.exp() * noise).tanh()
        normal = -0.5 * noise.square() - log_deviation - 0.5 * math.log(2 * math.pi)
        return action, (normal - (1 - action.square() + 1e-6).log()).sum(-1)


class Agent(nn.Module):
    """Everything that is trained."""

    def __init__(self, observations: int, actions: int, width: int) -> None:
        super().__init__()
        self.q = Critics(observations, actions, width)
        self.actor = Actor(observations, actions, width)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.entropy = float(actions)


def _critic_losses(agent: Agent, batch: Any, *, targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    observation, action, reward, following, done, noise, *_ = batch
    then, log_density = agent.actor(following, noise)
    value = torch.min(*targets["q"](following, then)) - agent.log_alpha.exp() * log_density
    wanted = reward + GAMMA * (1 - done) * value
    one, two = agent.q(observation, action)
    return {"q1": F.mse_loss(one, wanted), "q2": F.mse_loss(two, wanted)}


def _actor_losses(agent: Agent, batch: Any) -> dict[str, Tensor]:
    observation, *_, noise, _ = batch
    action, log_density = agent.actor(observation, noise)
    return {"actor": (agent.log_alpha.exp() * log_density - torch.min(*agent.q(observation, action))).mean()}


def _alpha_losses(agent: Agent, batch: Any) -> dict[str, Tensor]:
    observation, *_, noise = batch
    _, log_density = agent.actor(observation, noise)
    return {"alpha": (agent.log_alpha.exp() * (agent.entropy - log_density)).mean()}


def _ours(agent: Agent, compile: bool | Options) -> Alternation:
    routes = {"critic": {"q1": "q", "q2": "q"}, "actor": {"actor": "actor"}, "alpha": {"alpha": "log_alpha"}}
    adam = {name: ff.optim.adam(rate) for name, rate in RATES.items()}
    q = ff.ema("q", KEPT)
    return ff.alternate(
        {
            "critic": ff.Step(agent, _critic_losses, routes["critic"], optimizer=adam["critic"], targets={"q": q}),
            "actor": ff.Step(agent, _actor_losses, routes["actor"], optimizer=adam["actor"]),
            "alpha": ff.Step(agent, _alpha_losses, routes["alpha"], optimizer=adam["alpha"]),
        },
        compile=compile,
    )


def _by_hand(agent: Agent, compile: Options | None) -> Loop:
    """The critics are frozen in the actor's turn; what is a constant is under `no_grad`."""
    q, actor, log_alpha = agent.q, agent.actor, agent.log_alpha
    target = copy.deepcopy(q).requires_grad_(False)
    averages, averaged = [*target.parameters()], [*q.parameters()]
    average = get_ema_multi_avg_fn(KEPT)
    q_optimizer = torch.optim.Adam(q.parameters(), RATES["critic"], fused=True)
    actor_optimizer = torch.optim.Adam(actor.parameters(), RATES["actor"], fused=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], RATES["alpha"], fused=True)

    def find_q_loss(observation, action, reward, following, done, noise):
        with torch.no_grad():
            then, log_density = actor(following, noise)
            value = torch.min(*target(following, then)) - log_alpha.exp() * log_density
            wanted = reward + GAMMA * (1 - done) * value
        one, two = q(observation, action)
        return F.mse_loss(one, wanted) + F.mse_loss(two, wanted)

    def find_actor_loss(observation, noise):
        action, log_density = actor(observation, noise)
        return (log_alpha.detach().exp() * log_density - torch.min(*q(observation, action))).mean()

    def find_alpha_loss(observation, noise):
        with torch.no_grad():
            _, log_density = actor(observation, noise)
        return (log_alpha.exp() * (agent.entropy - log_density)).mean()

    q_loss, actor_loss, alpha_loss = (
        compiled(find, compile) for find in (find_q_loss, find_actor_loss, find_alpha_loss)
    )

    def body(batch: Any) -> None:
        observation, action, reward, following, done, *noises = batch
        q_optimizer.zero_grad()
        q_loss(observation, action, reward, following, done, noises[0]).backward()
        q_optimizer.step()

        q.requires_grad_(False)
        actor_optimizer.zero_grad()
        actor_loss(observation, noises[1]).backward()
        actor_optimizer.step()
        q.requires_grad_(True)

        alpha_optimizer.zero_grad()
        alpha_loss(observation, noises[2]).backward()
        alpha_optimizer.step()
        average(averages, averaged, 0)

    return Loop(body, {"q": target})


def sac(observations: int = 17, actions: int = 6, width: int = 256, size: int = 256) -> Program:
    """Small networks, and four forwards of the actor's or the critics' beside those that are differentiated."""

    def batch() -> tuple[Tensor, ...]:
        seen, then = torch.randn(2, size, observations)
        action, *noises = torch.randn(4, size, actions)
        return seen, action.tanh(), torch.randn(size), then, (torch.rand(size) < 0.1).to(seen), *noises

    return Program("SAC", Agent(observations, actions, width), batch, _by_hand, _ours)
