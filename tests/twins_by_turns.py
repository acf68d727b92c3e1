"""Actor-critics and a GAN with averaged twins as people write them in plain torch, and the alternation for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff
from twins import Program, averaged, descend, move_buffers, twin_of


def q_net():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def both(seen, action):
    return torch.cat([seen, action], -1)


def transitions(number, actions=2):
    return [
        (
            torch.randn(6, 4),
            torch.randn(6, actions).tanh(),
            torch.randn(6, 1),
            torch.randn(6, 4),
            (torch.rand(6, 1) < 0.2).double(),
        )
        for _ in range(number)
    ]


# SAC: two critics, a policy that is sampled from, a temperature


def sac_nets():
    return {
        "q": nn.ModuleList([q_net(), q_net()]),
        "actor": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)),
        "log_alpha": nn.Parameter(torch.zeros(())),
    }


def sampled(actor, seen):
    mean, log_std = actor(seen).chunk(2, -1)
    policy = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
    before = policy.rsample()
    log_p = policy.log_prob(before) - torch.log(1 - before.tanh().square() + 1e-6)
    return before.tanh(), log_p.sum(-1, keepdim=True)


def sac_critic_losses(nets, batch, *, targets):
    seen, action, reward, then, done = batch
    next_action, log_p = sampled(nets["actor"], then)
    values = [q(both(then, next_action)) for q in targets["q"]]
    soft = torch.minimum(*values) - nets["log_alpha"].exp() * log_p
    aim = reward + 0.9 * (1 - done) * soft
    return {f"q{i}": (q(both(seen, action)) - aim.detach()).square().mean() for i, q in enumerate(nets["q"])}


def sac_actor_losses(nets, batch):
    action, log_p = sampled(nets["actor"], batch[0])
    value = torch.minimum(*(q(both(batch[0], action)) for q in nets["q"]))
    alpha = nets["log_alpha"].exp()
    return {"pi": (alpha * log_p - value).mean(), "alpha": -(alpha * (log_p - 2)).mean()}


def sac_step(nets, **run):
    critic = ff.Step(
        nets,
        sac_critic_losses,
        {"q0": "q", "q1": "q"},
        optimizer=ff.optim.adam(1e-2),
        targets={"q": ff.ema("q", 0.8)},
    )
    routes = {"pi": "actor", "alpha": "log_alpha"}
    actor = ff.Step(nets, sac_actor_losses, routes, optimizer=ff.optim.adam(1e-2))
    return ff.alternate({"critic": critic, "actor": actor}, every={"actor": 2}, **run)


def sac_by_hand(nets, given):
    q, actor, log_alpha = nets["q"], nets["actor"], nets["log_alpha"]
    target, seen = twin_of(q), []
    q_optimizer = torch.optim.Adam(q.parameters(), 1e-2)
    optimizer, alpha_optimizer = torch.optim.Adam(actor.parameters(), 1e-2), torch.optim.Adam([log_alpha], 1e-2)
    for number, (now, action, reward, then, done) in enumerate(given):
        with torch.no_grad():
            next_action, log_p = sampled(actor, then)
            values = [critic(both(then, next_action)) for critic in target]
            aim = reward + 0.9 * (1 - done) * (torch.minimum(*values) - log_alpha.exp() * log_p)
        errors = [F.mse_loss(critic(both(now, action)), aim) for critic in q]
        descend(q_optimizer, sum(errors))
        seen += [float(error.detach()) for error in errors]
        if number % 2 == 0:
            q.requires_grad_(False)
            new, log_p = sampled(actor, now)
            value = torch.minimum(*(critic(both(now, new)) for critic in q))
            seen.append(descend(optimizer, (log_alpha.exp().detach() * log_p - value).mean()))
            seen.append(descend(alpha_optimizer, -(log_alpha.exp() * (log_p.detach() - 2)).mean()))
            q.requires_grad_(True)
        averaged(target, q, 0.8)
    return {"q": target}, seen


# TD3: the actor and all targets move at every second call


def td3_nets():
    return {
        "q": nn.ModuleList([q_net(), q_net()]),
        "actor": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh()),
    }


def td3_critic_losses(nets, batch, *, targets):
    seen, action, reward, then, done = batch
    noise = (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)
    next_action = (targets["actor"](then) + noise).clamp(-1, 1)
    aim = reward + 0.9 * (1 - done) * torch.minimum(*(q(both(then, next_action)) for q in targets["q"]))
    return {"q": sum((q(both(seen, action)) - aim).square().mean() for q in nets["q"])}


def td3_actor_losses(nets, batch):
    return {"pi": -nets["q"][0](both(batch[0], nets["actor"](batch[0]))).mean()}


def td3_step(nets, **run):
    averages = {"q": ff.ema("q", 0.8), "actor": ff.ema("actor", 0.7)}
    critic = ff.Step(nets, td3_critic_losses, {"q": "q"}, optimizer=ff.optim.adam(1e-2))
    actor = ff.Step(nets, td3_actor_losses, {"pi": "actor"}, optimizer=ff.optim.adam(1e-2), targets=averages)
    return ff.alternate({"critic": critic, "actor": actor}, every={"actor": 2}, start={"actor": 1}, **run)


def td3_by_hand(nets, given):
    q, actor = nets["q"], nets["actor"]
    q_target, actor_target, seen = twin_of(q), twin_of(actor), []
    q_optimizer, optimizer = torch.optim.Adam(q.parameters(), 1e-2), torch.optim.Adam(actor.parameters(), 1e-2)
    for number, (now, action, reward, then, done) in enumerate(given, start=1):
        with torch.no_grad():
            noise = (torch.randn_like(action) * 0.2).clamp(-0.5, 0.5)
            next_action = (actor_target(then) + noise).clamp(-1, 1)
            aim = reward + 0.9 * (1 - done) * torch.min(*[critic(both(then, next_action)) for critic in q_target])
        seen.append(descend(q_optimizer, sum(F.mse_loss(critic(both(now, action)), aim) for critic in q)))
        if number % 2 == 0:
            seen.append(descend(optimizer, -q[0](both(now, actor(now))).mean()))
            averaged(q_target, q, 0.8)
            averaged(actor_target, actor, 0.7)
    return {"q": q_target, "actor": actor_target}, seen


# DDPG, with statistics in both nets, each with the twin of its own


def ddpg_nets():
    return {
        "q": nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)),
        "actor": nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh()),
    }


def ddpg_critic_losses(nets, batch, *, targets):
    seen, action, reward, then, done = batch
    aim = reward + 0.9 * (1 - done) * targets["q"](both(then, targets["actor"](then)))
    return {"q": (nets["q"](both(seen, action)) - aim).square().mean()}


def ddpg_actor_losses(nets, batch):
    return {"pi": -nets["q"](both(batch[0], nets["actor"](batch[0]))).mean()}


def ddpg_step(nets, **run):
    def average(name):
        return {name: ff.ema(name, 0.8, buffers="averaged", mode="eval")}

    sgd = ff.optim.sgd(0.05)
    critic = ff.Step(nets, ddpg_critic_losses, {"q": "q"}, optimizer=sgd, targets=average("q"))
    actor = ff.Step(nets, ddpg_actor_losses, {"pi": "actor"}, optimizer=sgd, targets=average("actor"))
    return ff.alternate({"critic": critic, "actor": actor}, **run)


def ddpg_by_hand(nets, given):
    q, actor = nets["q"], nets["actor"]
    q_target, actor_target, seen = twin_of(q).eval(), twin_of(actor).eval(), []
    q_optimizer, optimizer = torch.optim.SGD(q.parameters(), 0.05), torch.optim.SGD(actor.parameters(), 0.05)
    for now, action, reward, then, done in given:
        with torch.no_grad():
            aim = reward + 0.9 * (1 - done) * q_target(both(then, actor_target(then)))
        seen.append(descend(q_optimizer, F.mse_loss(q(both(now, action)), aim)))
        averaged(q_target, q, 0.8)
        move_buffers(q_target, q, 0.8, "averaged")
        seen.append(descend(optimizer, -q(both(now, actor(now))).mean()))
        averaged(actor_target, actor, 0.8)
        move_buffers(actor_target, actor, 0.8, "averaged")
    return {"q": q_target, "actor": actor_target}, seen


# A GAN that is sampled from an average of its generator, which nothing trains against


def gan_nets():
    gen = nn.Sequential(nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    return {"gen": gen, "disc": nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(6, 1))}


def disc_losses(nets, real):
    fake = nets["gen"](torch.randn(len(real), 3))
    return {"real": F.softplus(-nets["disc"](real)).mean(), "fake": F.softplus(nets["disc"](fake)).mean()}


def gen_losses(nets, real):
    return {"fool": F.softplus(-nets["disc"](nets["gen"](torch.randn(len(real), 3)))).mean()}


def gan_step(nets, **run):
    adam = ff.optim.adam(1e-2, betas=(0.0, 0.99))
    half_life = ff.ema("gen", lambda count: 0.5 ** (1 / (1 + count)), buffers="copied")
    disc = ff.Step(nets, disc_losses, {"real": "disc", "fake": "disc"}, optimizer=adam)
    gen = ff.Step(nets, gen_losses, {"fool": "gen"}, optimizer=adam, targets={"sampler": half_life})
    return ff.alternate({"disc": disc, "gen": gen}, every={"gen": 2}, **run)


def gan_by_hand(nets, given):
    gen, disc = nets["gen"], nets["disc"]
    sampler, seen, updates = twin_of(gen), [], 0
    gen_optimizer = torch.optim.Adam(gen.parameters(), 1e-2, betas=(0.0, 0.99))
    optimizer = torch.optim.Adam(disc.parameters(), 1e-2, betas=(0.0, 0.99))
    for number, real in enumerate(given):
        fake = gen(torch.randn(len(real), 3)).detach()
        terms = F.softplus(-disc(real)).mean(), F.softplus(disc(fake)).mean()
        descend(optimizer, sum(terms))
        seen += [float(term.detach()) for term in terms]
        if number % 2 == 0:
            seen.append(descend(gen_optimizer, F.softplus(-disc(gen(torch.randn(len(real), 3)))).mean()))
            averaged(sampler, gen, 0.5 ** (1 / (1 + updates)))
            move_buffers(sampler, gen, 0.0, "copied")
            updates += 1
    return {"sampler": sampler}, seen


PROGRAMS = {
    "SAC": Program(sac_nets, sac_step, sac_by_hand, transitions),
    "TD3": Program(td3_nets, td3_step, td3_by_hand, transitions),
    "DDPG": Program(ddpg_nets, ddpg_step, ddpg_by_hand, transitions),
    "GAN": Program(gan_nets, gan_step, gan_by_hand, lambda number: [torch.randn(6, 4) for _ in range(number)]),
}
