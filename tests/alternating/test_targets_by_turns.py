"""Averaged twins among members that take turns: actor-critics and GANs as people write them in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff
from twins import (
    GRAPH,
    Program,
    assert_is_the_loop,
    assert_moved_alike,
    averaged,
    descend,
    move_buffers,
    tensors,
    train,
    twin_of,
)

SLOW = pytest.mark.slow


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
RUNS = {
    "eager": {},
    "kept": {"donate": False},
    "reference": {"engine": "reference"},
    "toggle": {"engine": "toggle"},
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_the_loop(program, run):
    assert_is_the_loop(program, run)


@pytest.mark.parametrize("donate", [True, pytest.param(False, marks=SLOW)], ids=["donated", "kept"])
@pytest.mark.parametrize("name", ["SAC", *(pytest.param(name, marks=SLOW) for name in ("TD3", "DDPG", "GAN"))])
def test_the_loop_compiled(name, donate):
    assert_is_the_loop(PROGRAMS[name], {"compile": GRAPH, "donate": donate})


@pytest.mark.parametrize("name", PROGRAMS)
def test_verify(name):
    program = PROGRAMS[name]
    step = program.step(program.nets())
    state, given = step.init(), program.given(2)
    state, _ = step(state, given[0])
    report = ff.verify(step, state, given[1], steps=3)
    assert report.ok, report


def test_members_after_the_one_that_moves_a_twin_see_it_moved():
    nets, given = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}, [torch.randn(5, 4) for _ in range(4)]
    plain, start = copy.deepcopy(nets), tensors(nets)

    def first(nets, x, *, targets):
        return {"first": (nets["a"](x) - targets["slow"](x) + 1).square().mean()}

    def second(nets, x, *, targets):
        return {"second": (nets["b"](x) - targets["slow"](x)).square().mean()}

    sgd = ff.optim.sgd(0.1)
    mover = ff.Step(nets, first, {"first": "a"}, optimizer=sgd, targets={"slow": ff.ema("a", 0.5)})
    step = ff.alternate({"one": mover, "two": ff.Step(nets, second, {"second": "b"}, optimizer=sgd)})
    state = step.init()
    for x in given:
        state, _ = step(state, x)
    slow, one, two = twin_of(plain["a"]), *(torch.optim.SGD(plain[name].parameters(), 0.1) for name in "ab")
    for x in given:
        descend(one, (plain["a"](x) - slow(x) + 1).square().mean())
        averaged(slow, plain["a"], 0.5)
        descend(two, (plain["b"](x) - slow(x)).square().mean())
    assert_moved_alike(start, dict(state.params), tensors(plain))
    torch.testing.assert_close(dict(state.targets["slow"]), tensors(slow))


def test_the_plan_shows_targets_of_all_members():
    lines = str(sac_step(sac_nets()).plan).splitlines()
    assert "targets  q: ema 0.8, after critic, own buffers" in lines
    lines = str(td3_step(td3_nets()).plan).splitlines()
    shown = [line for line in lines if line.startswith("targets  ")]
    assert shown == [
        "targets  q: ema 0.8, after actor, own buffers",
        "targets  actor: ema 0.7, after actor, own buffers",
    ]


def test_evaluation_export_and_gradients():
    """A player acts with the average; a member's gradients see it and move nothing."""
    nets, given = sac_nets(), transitions(3)
    step = sac_step(nets)
    state, _ = train(PROGRAMS["SAC"], step, step.init(), given)
    kept = {path: tensor.clone() for path, tensor in state.targets["q"].items()}
    plain = copy.deepcopy(nets["q"])
    plain.load_state_dict(kept)
    x = torch.randn(5, 6)

    def value(nets, x):
        nets["q"].eval()
        return nets["q"][1](x)

    got = step.call(state, value, x, targets="q")
    torch.testing.assert_close(got, plain.eval()[1](x))
    assert not torch.equal(got, step.call(state, value, x))
    step.gradients(state, given[0], member="critic")
    step.per_loss_gradients(state, given[0], member="critic")
    assert all(torch.equal(tensor, state.targets["q"][path]) for path, tensor in kept.items())
    step.export(state, targets="q")
    assert all(torch.equal(tensor, nets["q"].state_dict()[path]) for path, tensor in kept.items())
    assert torch.equal(nets["log_alpha"], state.params["log_alpha"])


def test_halves_move_the_twins_of_their_member():
    nets, given = td3_nets(), transitions(4)
    plain, start = copy.deepcopy(nets), tensors(nets)
    step = td3_step(nets)
    state = step.init()
    torch.manual_seed(0)
    for number, batch in enumerate(given):
        for name in ("critic", "actor")[: 1 + number % 2]:
            half = step.compute(state, batch, member=name)
            state, _ = step.apply_gradients(state, half, member=name)
    torch.manual_seed(0)
    twins, _ = td3_by_hand(plain, given)
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))
    for name, twin in twins.items():
        torch.testing.assert_close(dict(state.targets[name]), tensors(twin), rtol=0, atol=1e-10)


def test_a_members_own_clock_times_its_twins():
    """`every` and the decay count the actor's steps, not the calls."""
    nets, given, seen = td3_nets(), transitions(9), []

    def decay(count):
        seen.append(int(count))
        return 0.5

    critic = ff.Step(nets, td3_critic_losses, {"q": "q"}, optimizer=ff.optim.sgd(0.1))
    averages = {"actor": ff.ema("actor", 0.0, every=2, start=1), "q": ff.ema("q", decay, stop=2)}
    actor = ff.Step(nets, td3_actor_losses, {"pi": "actor"}, optimizer=ff.optim.sgd(0.1), targets=averages)
    step = ff.alternate({"critic": critic, "actor": actor}, every={"actor": 3})
    state, copied_at, moved_at = step.init(), [], []
    for number, batch in enumerate(given):
        before = {name: {path: t.clone() for path, t in state.targets[name].items()} for name in averages}
        state, _ = step(state, batch)
        after = state.targets
        if any(not torch.equal(tensor, after["actor"][path]) for path, tensor in before["actor"].items()):
            copied_at.append(number)
            assert all(torch.equal(t, state.params[f"actor.{path}"]) for path, t in after["actor"].items())
        if any(not torch.equal(tensor, after["q"][path]) for path, tensor in before["q"].items()):
            moved_at.append(number)
    assert copied_at == [3]
    assert moved_at == [0, 3]
    assert sorted({*seen} & {0, 1}) == [0, 1]


def test_an_error_in_a_later_member_leaves_the_twins_that_moved():
    nets, (first, second) = td3_nets(), transitions(2)

    def fails(nets, batch, *, targets):
        raise KeyError("no such thing")

    sgd = ff.optim.sgd(0.1)
    critic = ff.Step(
        nets,
        td3_critic_losses,
        {"q": "q"},
        optimizer=sgd,
        targets={"q": ff.ema("q", 0.5), "actor": ff.ema("actor", 0.5)},
    )
    step = ff.alternate(
        {"critic": critic, "actor": ff.Step(nets, fails, {"pi": "actor"}, optimizer=sgd)}, start={"actor": 1}
    )
    state, _ = step(step.init(), first)
    torch.manual_seed(0)
    alone = ff.alternate({"critic": critic})
    wanted, _ = alone(alone.adopt(copy.deepcopy(state))[0], second)
    torch.manual_seed(0)
    with pytest.raises(KeyError, match="no such thing"):
        step(state, second)
    torch.testing.assert_close(dict(state.targets["q"]), dict(wanted.targets["q"]))
    torch.testing.assert_close(dict(state.params), dict(wanted.params))


def test_what_is_wrong_with_members_targets():
    nets = td3_nets()
    sgd = ff.optim.sgd(0.1)

    def members(critic, actor):
        return {
            "critic": ff.Step(nets, td3_critic_losses, {"q": "q"}, optimizer=sgd, targets=critic),
            "actor": ff.Step(nets, td3_actor_losses, {"pi": "actor"}, optimizer=sgd, targets=actor),
        }

    q = ff.ema("q", 0.5)
    with pytest.raises(ValueError, match=r"(?s)'q'.*critic.*actor"):
        ff.alternate(members({"q": q}, {"q": q}))
    with pytest.raises(
        ValueError, match=r"(?s)member 'critic': `losses` names 'targets': neither this Step nor.*declares any"
    ):
        ff.alternate(members(None, None))
    one = ff.alternate(members({"q": q, "actor": ff.ema("actor", 0.5)}, None))
    other = ff.alternate(members({"q": q}, {"actor": ff.ema("actor", 0.5)}))
    batch = transitions(1)[0]
    one(other.init(), batch)  # who moves them is not the state's affair
    with pytest.raises(ValueError, match=r"(?s)targets: the Step has q, actor, the State does not.*adopt\(state\)"):
        one(one.init().replace(targets={}), batch)
