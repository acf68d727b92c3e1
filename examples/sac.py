# pip install -c constraints.txt . && python examples/sac.py
"""Soft actor-critic with a learned temperature: carts learn to stop at the origin of a plane.

Three optimizers by turns, critics first, then the actor, then the temperature; and a target that averages the critics.
No `detach()` and no `no_grad()` in the losses: routes say who is updated.
"""

from __future__ import annotations

try:
    import torch
    import torch.nn.functional as F
    from torch import nn

    import funcfreeze as ff
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is missing: pip install -c constraints.txt .") from None

CARTS, MOVES, STEPS, GAMMA = 32, 25, 1500, 0.95


def net(inside, outside):
    return nn.Sequential(nn.Linear(inside, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outside))


def networks():
    critics = nn.ModuleList([net(6, 1), net(6, 1)])
    return {"q": critics, "actor": net(4, 4), "log_alpha": nn.Parameter(torch.tensor(-2.0))}


def values(critics, cart, push):
    return [critic(torch.cat([cart, push], -1)) for critic in critics]


def act(model, cart):
    """A push, and the logarithm of its density: a normal distribution under tanh."""
    mean, spread = model["actor"](cart).chunk(2, -1)
    normal = torch.distributions.Normal(mean, F.softplus(spread) + 1e-3, validate_args=False)
    raw = normal.rsample()
    push = raw.tanh()
    return push, (normal.log_prob(raw) - torch.log(1 - push.square() + 1e-6)).sum(-1, keepdim=True)


def critic_losses(model, batch, *, targets):
    cart, push, reward, then = batch
    following, log_density = act(model, then)
    value = torch.min(*values(targets["q"], then, following)) - model["log_alpha"].exp() * log_density
    one, two = (F.mse_loss(guess, reward + GAMMA * value) for guess in values(model["q"], cart, push))
    return {"one": one, "two": two}


def actor_losses(model, batch):
    push, log_density = act(model, batch[0])
    value = torch.min(*values(model["q"], batch[0], push))
    return {"actor": (model["log_alpha"].exp() * log_density - value).mean()}


def alpha_losses(model, batch):
    _, log_density = act(model, batch[0])
    return {"alpha": (model["log_alpha"].exp() * (2 - log_density)).mean()}  # an entropy of -2, for two directions


def step_of(model):
    adam, targets = ff.optim.adam(1e-3), {"q": ff.ema("q", 0.99)}
    critic = ff.Step(model, critic_losses, {"one": "q.0", "two": "q.1"}, optimizer=adam, targets=targets)
    actor = ff.Step(model, actor_losses, {"actor": "actor"}, optimizer=adam)
    alpha = ff.Step(model, alpha_losses, {"alpha": "log_alpha"}, optimizer=adam)
    return ff.alternate({"critic": critic, "actor": actor, "alpha": alpha})


def begun(count):
    """Carts at rest, somewhere: two places, two speeds."""
    return torch.cat([2 * torch.rand(count, 2) - 1, torch.zeros(count, 2)], -1)


def moved(cart, push):
    """Carts after a push, and their rewards."""
    place, speed = cart.chunk(2, -1)
    speed = 0.8 * speed + 0.1 * push
    place = place + speed
    return torch.cat([place, speed], -1), -place.norm(dim=-1, keepdim=True)


def train(model, steps=STEPS, size=128):
    step = step_of(model)
    print(step.plan)
    state, cart, seen = step.init(), begun(CARTS), torch.empty(steps * CARTS, 11)
    for number in range(1, steps + 1):
        push, _ = step.call(state, act, cart)
        then, reward = moved(cart, push)
        seen[(number - 1) * CARTS : number * CARTS] = torch.cat([cart, push, reward, then], -1)
        cart = begun(CARTS) if number % MOVES == 0 else then
        batch = seen[torch.randint(number * CARTS, (size,))].split([4, 2, 1, 4], -1)
        state, metrics = step(state, batch)
        if number % 300 == 0:
            print(f"step {number}: critic {metrics['critic']['one']:.4f}, reward {reward.mean():.2f}")
    return step.export(state)


@torch.no_grad()
def arrived(model, count=500):
    """The part of carts that rest at the origin in the end."""
    cart = begun(count)
    for _ in range(MOVES):
        cart, _ = moved(cart, act(model, cart)[0])
    return float((cart.norm(dim=-1) < 0.2).float().mean())


def main():
    torch.set_num_threads(1)  # small networks are quicker on one
    torch.manual_seed(0)
    model = networks()
    before = arrived(model)
    print(f"carts that rest at the origin in the end: {before:.0%} before, {arrived(train(model)):.0%} after")


if __name__ == "__main__":
    main()
