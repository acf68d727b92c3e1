"""What happens around a step: settings of torch, schedules, states, copies, several Steps, random numbers."""

from __future__ import annotations

import contextlib
import copy
import random
from types import SimpleNamespace

import numpy as np
import torch
from lockstep import LINE, World, program
from torch import nn

import funcfreeze as ff
from programs.modules import normed, square


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def every(change, steps=5):
    return dict.fromkeys(range(1, steps), change)


@program(traces=1)
def a_rate_from_a_closure():
    config = SimpleNamespace(rate=0.1)

    def change():
        config.rate *= 0.5

    return World(net(), square, optimizer=ff.optim.sgd(lambda step: config.rate), change=every(change))


@program(traces=1)
def a_rate_in_a_tensor_changed_in_place():
    rate = torch.tensor(0.1)
    return World(net(), square, optimizer=ff.optim.adam(rate), change=every(lambda: rate.mul_(0.5)))


@program(traces=1)
def a_rate_from_a_torch_scheduler():
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(dummy, 2, 0.1)

    def change():
        dummy.step()
        schedule.step()

    return World(net(), square, optimizer=ff.optim.sgd(lambda step: dummy.param_groups[0]["lr"]), change=every(change))


@program
def a_weight_read_from_a_torch_optimizer():
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)

    def losses(model, x):
        return {"loss": model(x).square().mean() * dummy.param_groups[0]["lr"]}

    return World(net(), losses, change=lambda: dummy.param_groups[0].update(lr=0.1))


@program(traces=1)
def a_route_weight_from_a_closure():
    config = SimpleNamespace(weight=1.0)

    def change():
        config.weight -= 0.3

    return World(net(), square, routes={"loss": {"0": lambda step: config.weight, "2": 1.0}}, change=every(change))


@program(traces=1)
def a_route_weight_in_a_tensor():
    weight = torch.ones(())
    return World(net(), square, routes={"loss": {"0": weight, "2": 1.0}}, change=every(lambda: weight.sub_(0.3)))


@program(traces=1)
def a_route_weight_by_the_step():
    return World(net(), square, routes={"loss": {"0": lambda step: 0.5**step, "2": ff.optim.dann_schedule(10)}})


@program(traces=1)
def a_route_weight_that_changes_sign():
    config = SimpleNamespace(weight=1.0)
    return World(
        net(),
        square,
        routes={"loss": {"0": lambda step: config.weight, "2": 1.0}},
        change=lambda: setattr(config, "weight", -1.0),
    )


@program(traces=1)
def momentum_and_clipping():
    return World(net(), square, optimizer=ff.optim.chain(ff.optim.clip_by_global_norm(0.1), ff.optim.adamw(0.1)))


@program
def a_curriculum_by_epoch():
    config = SimpleNamespace(epoch=0)

    def losses(model, x):
        easy = x if config.epoch > 1 else x.clamp(-1, 1)
        return {"loss": model(easy).square().mean()}

    def change():
        config.epoch += 1

    return World(net(), losses, change=every(change))


@program
def a_temperature_that_cools():
    config = {"temperature": 2.0}

    def losses(model, x):
        return {"loss": -(model(x) / config["temperature"]).log_softmax(-1)[:, 0].mean()}

    return World(net(), losses, change=every(lambda: config.update(temperature=config["temperature"] * 0.8)))


@program
def a_focal_gamma_that_grows():
    config = {"gamma": 1.0}

    def losses(model, x):
        p = model(x).softmax(-1)[:, 0]
        return {"loss": -((1 - p) ** config["gamma"] * p.log()).mean()}

    return World(net(), losses, change=every(lambda: config.update(gamma=config["gamma"] + 0.5)))


@program
def a_label_smoothing_that_shrinks():
    config = {"smooth": 0.4}

    def losses(model, x):
        target = torch.zeros(6, dtype=torch.long)
        return {"loss": nn.functional.cross_entropy(model(x), target, label_smoothing=config["smooth"])}

    return World(net(), losses, change=every(lambda: config.update(smooth=config["smooth"] / 2)))


@program
def a_margin_that_grows():
    config = {"margin": 0.1}

    def losses(model, x):
        h = model(x)
        return {"loss": nn.functional.triplet_margin_loss(h[:2], h[2:4], h[4:], margin=config["margin"])}

    return World(net(), losses, change=every(lambda: config.update(margin=config["margin"] + 0.1)))


@program
def a_beta_warmup_by_steps():
    config = SimpleNamespace(step=0)

    def losses(model, x):
        h = model(x)
        return {"loss": h.square().mean() + min(1.0, config.step / 3) * h.abs().mean()}

    def change():
        config.step += 1

    return World(net(), losses, change=every(change, 6), steps=6)


@program
def a_stage_by_name():
    config = SimpleNamespace(stage="warmup")
    scale = {"warmup": 0.1, "main": 1.0}
    return World(
        net(),
        lambda m, x: {"loss": m(x).square().mean() * scale[config.stage]},
        change=lambda: setattr(config, "stage", "main"),
    )


@program
def a_number_of_inner_steps():
    config = SimpleNamespace(depth=1)

    def losses(model, x):
        for _ in range(config.depth):
            x = model(x)
        return {"loss": x.square().mean()}

    return World(net(), losses, change=lambda: setattr(config, "depth", 3))


@program
def no_grad_around_the_step():
    return World(net(), square, around=lambda turn: torch.set_grad_enabled(turn % 2 == 0))


@program
def inference_mode_around_the_step():
    return World(net(), square, around=lambda turn: torch.inference_mode(turn > 1))


@program
def no_grad_inside():
    config = SimpleNamespace(frozen=False)

    def losses(model, x):
        with torch.set_grad_enabled(not config.frozen):
            h = model[0](x)
        return {"loss": model[2](h).square().mean()}

    return World(net(), losses, change=lambda: setattr(config, "frozen", True))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@program
def the_default_dtype_changed():
    return World(
        net(),
        lambda m, x: {"loss": (m(x) * torch.full((4,), 0.1)).square().mean()},
        around=lambda turn: default_dtype(torch.float32 if turn > 1 else torch.float64),
    )


@program
def deterministic_algorithms():
    def around(turn):
        torch.use_deterministic_algorithms(turn > 1)
        stack = contextlib.ExitStack()
        stack.callback(torch.use_deterministic_algorithms, False)
        return stack

    return World(net(), square, around=around)


@program
def asks_whether_grad_is_enabled():
    return World(
        net(),
        lambda m, x: {"loss": m(x).square().mean() * (2 if torch.is_grad_enabled() else 1)},
        around=lambda turn: torch.set_grad_enabled(turn < 2),
    )


@program
def dropout_draws():
    return World(normed(), square, steps=6)


@program
def torch_draws_inside():
    return World(net(), lambda m, x: {"loss": m(x + 0.1 * torch.randn_like(x)).square().mean()})


@program
def a_permutation_inside():
    def losses(model, x):
        other = x[torch.randperm(len(x))]
        return {"loss": model(0.5 * x + 0.5 * other).square().mean()}

    return World(net(), losses)


@program(refused=LINE)
def python_draws_inside():
    return World(net(), lambda m, x: {"loss": m(x).square().mean() * random.random()})


@program(refused=LINE)
def python_coin_inside():
    return World(net(), lambda m, x: {"loss": m(x).square().mean() * (2 if random.random() < 0.5 else 1)}, steps=6)


@program
def python_randint_inside():
    return World(net(), lambda m, x: {"loss": m(x).square().mean() * random.randint(1, 4)}, steps=6)


@program(known="the state of a random.Random is taken as it is when traced")
def a_random_of_ones_own():
    rng = random.Random(0)
    return World(net(), lambda m, x: {"loss": m(x).square().mean() * rng.random()}, steps=6)


@program(refused=LINE)
def numpy_draws_inside():
    return World(net(), lambda m, x: {"loss": m(x).square().mean() * np.random.rand()}, steps=6)


@program(refused=LINE)
def a_numpy_beta_for_mixup():
    def losses(model, x):
        lam = np.random.beta(0.5, 0.5)
        return {"loss": model(lam * x + (1 - lam) * x.flip(0)).square().mean()}

    return World(net(), losses)


@program(refused=LINE)
def a_numpy_generator_of_ones_own():
    rng = np.random.default_rng(0)
    return World(net(), lambda m, x: {"loss": m(x).square().mean() * rng.random()})


@program(refused=LINE)
def a_torch_generator_of_ones_own():
    g = torch.Generator().manual_seed(0)
    return World(net(), lambda m, x: {"loss": m(x + torch.randn(6, 4, generator=g)).square().mean()})


@program(refused=LINE)
def a_seed_set_inside():
    def losses(model, x):
        torch.manual_seed(3)
        return {"loss": model(x + torch.randn(6, 4)).square().mean()}

    return World(net(), losses)


@program
def a_gumbel_softmax():
    return World(net(), lambda m, x: {"loss": nn.functional.gumbel_softmax(m(x), hard=True)[:, 0].mean()})


@program
def a_distribution_sampled():
    def losses(model, x):
        policy = torch.distributions.Categorical(logits=model(x))
        action = policy.sample()
        return {"loss": -(policy.log_prob(action) * x[:, 0]).mean() - 0.1 * policy.entropy().mean()}

    return World(net(), losses)


@program
def a_variational_sample():
    def losses(model, x):
        mean, log = model(x).chunk(2, -1)
        q = torch.distributions.Normal(mean, log.exp())
        p = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
        return {"loss": q.rsample().square().mean() + torch.distributions.kl_divergence(q, p).mean()}

    return World(net(), losses)


@program
def not_donated():
    return World(net(), square, options={"donate": False})


@program
def an_earlier_state_again():
    kept = []

    def between(step, state, turn):
        kept.append(state)
        return step, kept[0] if turn == 3 else state

    return World(net(), square, options={"donate": False}, between=between, steps=6)


@program
def a_copy_of_the_step():
    return World(net(), square, between=lambda step, state, turn: (copy.deepcopy(step) if turn == 2 else step, state))


@program
def a_copy_of_the_state():
    return World(normed(), square, between=lambda step, state, turn: (step, copy.deepcopy(state)))


@program
def a_weight_replaced_in_the_state():
    def between(step, state, turn):
        if turn == 2:
            state = state.replace(params={**state.params, "0.weight": torch.eye(4)})
        return step, state

    return World(net(), square, between=between)


@program
def a_buffer_replaced_in_the_state():
    def between(step, state, turn):
        if turn == 2:
            state = state.replace(buffers={**state.buffers, "1.running_mean": torch.ones(4)})
        return step, state

    model = normed()
    model[1].eval()
    return World(model, square, between=between)


@program
def exported_and_begun_again():
    def between(step, state, turn):
        if turn == 2:
            step.export(state)
            state = step.init()
        return step, state

    return World(normed(), square, between=between)


@program
def an_adopted_state():
    return World(net(), square, between=lambda step, state, turn: (step, step.init(copy=False) if turn == 0 else state))


@program
def two_steps_over_one_module_by_turns():
    model = nn.ModuleDict({"g": net(), "d": net()})
    world = World(
        model, lambda m, x: {"g": m["d"](m["g"](x)).square().mean()}, routes={"g": "g"}, optimizer=ff.optim.adam(0.1)
    )
    others = []

    def drive(step, state, turn, batch):
        if not others:
            others.append(
                ff.Step(
                    model,
                    lambda m, x: {"d": (m["d"](m["g"](x).detach()) - 1).square().mean()},
                    {"d": "d"},
                    optimizer=ff.optim.adam(0.2),
                    compile=world.compile,
                )
            )
        return step(state, batch) if turn % 2 else others[0](state, batch)

    world.drive = drive
    return world


@program
def two_batches_in_one_turn():
    def drive(step, state, turn, batch):
        state, first = step(state, batch)
        state, second = step(state, batch[:3])
        return state, {"first": first["loss"], "second": second["loss"]}

    return World(normed(), square, drive=drive)


@program
def evaluated_between_steps():
    def drive(step, state, turn, batch):
        step.module.eval()
        seen = step.call(state, lambda m: m(batch).mean())
        step.module.train()
        state, metrics = step(state, batch)
        return state, {**metrics, "seen": seen}

    return World(normed(), square, drive=drive)


@program
def gradients_looked_at_between_steps():
    def drive(step, state, turn, batch):
        gradients = step.gradients(state, batch)
        state, metrics = step(state, batch)
        return state, {**metrics, **gradients}

    return World(net(), square, drive=drive)


@program
def a_batch_that_is_a_buffer_of_the_model():
    model = net()
    model.register_buffer("pool", torch.randn(6, 4))
    return World(model, square, batch=lambda turn: model.pool)


@program(wrong="by another way")
def a_batch_that_is_a_weight_of_the_model():
    model = net()
    return World(model, square, batch=lambda turn: model[0].weight.detach())


@program
def a_batch_that_is_part_of_the_state():
    def drive(step, state, turn, batch):
        return step(state, state.params["0.weight"])

    return World(net(), square, drive=drive)


@program
def a_batch_that_is_a_view_of_a_buffer_in_the_state():
    model = net()
    model.register_buffer("pool", torch.randn(6, 4))

    def losses(model, x):
        value = model(x).square().mean()
        model.pool.mul_(0.5)
        return {"loss": value}

    def drive(step, state, turn, batch):
        return step(state, state.buffers["pool"][:3])

    return World(model, losses, drive=drive)


@program
def the_same_batch_object_refilled():
    x = torch.zeros(6, 4)
    return World(net(), square, batch=lambda turn: x.copy_(torch.randn(6, 4)))


@program
def a_batch_that_requires_grad():
    return World(net(), square, batch=lambda turn: torch.randn(6, 4, requires_grad=True))


@program
def a_transposed_batch():
    return World(net(), square, batch=lambda turn: torch.randn(4, 6).T if turn > 1 else torch.randn(6, 4))


@program
def a_float32_batch_later():
    return World(
        net(),
        lambda m, x: {"loss": m(x.double()).square().mean()},
        batch=lambda turn: torch.randn(6, 4).to(torch.float32 if turn > 1 else torch.float64),
    )


@program
def an_expanded_batch():
    return World(net(), square, batch=lambda turn: torch.randn(1, 4).expand(6, 4))
