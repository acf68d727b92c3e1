"""WGAN-GP: a critic under a gradient penalty at every call, the generator at every fifth."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import funcfreeze as ff
from bench.workloads.program import Loop, Options, Program, compiled
from bench.workloads.workload import mlp
from funcfreeze.alternating.alternation import Alternation

EVERY, FIRST, PENALTY, RATE, BETAS = 5, 4, 10.0, 1e-4, (0.0, 0.9)
Nets = nn.ModuleDict


def _slope(critic: nn.Module, mixed: Tensor, compile: bool | Options | None) -> Tensor:
    """The critic's gradient at its input: as people write it, and as every Dynamo takes it."""
    if compile:
        return torch.func.grad(lambda mixed: critic(mixed).sum())(mixed)
    mixed.requires_grad_()
    return torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)[0]


def _critic_losses(nets: Nets, batch: Any, compile: bool | Options) -> dict[str, Tensor]:
    real, noise, part, _ = batch
    fake = nets["gen"](noise)
    slope = _slope(nets["critic"], part * real + (1 - part) * fake, compile)
    return {
        "score": nets["critic"](fake).mean() - nets["critic"](real).mean(),
        "penalty": PENALTY * (slope.norm(dim=1) - 1).square().mean(),
    }


def _gen_losses(nets: Nets, batch: Any) -> dict[str, Tensor]:
    *_, noise = batch
    return {"fool": -nets["critic"](nets["gen"](noise)).mean()}


def _ours(nets: Nets, compile: bool | Options) -> Alternation:
    adam = ff.optim.adam(RATE, betas=BETAS)
    losses = partial(_critic_losses, compile=compile)
    critic = ff.Step(nets, losses, {"score": "critic", "penalty": "critic"}, optimizer=adam)
    gen = ff.Step(nets, _gen_losses, {"fool": "gen"}, optimizer=adam)
    return ff.alternate({"critic": critic, "gen": gen}, every={"gen": EVERY}, start={"gen": FIRST}, compile=compile)


def _by_hand(nets: Nets, compile: Options | None) -> Loop:
    """Without the generator's graph in the critic's turn, and without gradients of the critic in the generator's."""
    gen, critic = nets["gen"], nets["critic"]
    gen_optimizer = torch.optim.Adam(gen.parameters(), RATE, betas=BETAS, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), RATE, betas=BETAS, fused=True)
    calls = itertools.count()

    def find_critic_loss(real: Tensor, noise: Tensor, part: Tensor) -> Tensor:
        with torch.no_grad():
            fake = gen(noise)
        steep = _slope(critic, part * real + (1 - part) * fake, compile is not None).norm(dim=1)
        return critic(fake).mean() - critic(real).mean() + PENALTY * (steep - 1).square().mean()

    def find_gen_loss(noise: Tensor) -> Tensor:
        return -critic(gen(noise)).mean()

    critic_loss, gen_loss = (compiled(find, compile) for find in (find_critic_loss, find_gen_loss))

    def body(batch: Any) -> None:
        real, noise, part, fresh = batch
        critic_optimizer.zero_grad()
        critic_loss(real, noise, part).backward()
        critic_optimizer.step()
        if next(calls) % EVERY == FIRST:
            critic.requires_grad_(False)
            gen_optimizer.zero_grad()
            gen_loss(fresh).backward()
            gen_optimizer.step()
            critic.requires_grad_(True)

    return Loop(body)


def wgan_gp(width: int = 512, noise: int = 64, pixels: int = 784, size: int = 64) -> Program:
    """The critic's every turn differentiates twice. A step is the turns from one of the generator's to the next."""
    model = {
        "gen": mlp(noise, width, width, pixels, between=nn.LeakyReLU),
        "critic": mlp(pixels, width, width, 1, between=nn.LeakyReLU),
    }

    def batch() -> tuple[Tensor, ...]:
        return torch.randn(size, pixels), torch.randn(size, noise), torch.rand(size, 1), torch.randn(size, noise)

    return Program("WGAN-GP", nn.ModuleDict(model), batch, _by_hand, _ours, calls=EVERY)
