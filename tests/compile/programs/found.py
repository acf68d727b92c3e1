"""What reviewers found: programs in which a compiled step was wrong once."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import torch
from lockstep import World, program
from torch import nn
from torch.utils.checkpoint import checkpoint

import funcfreeze as ff
from programs.modules import Calling, square


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def with_buffers(f, **buffers):
    model = Calling(f)
    for name, value in buffers.items():
        model.register_buffer(name, value)
    return model


@program
def a_slice_of_the_state_in_the_batch():
    def drive(step, state, turn, batch):
        return step(state, (batch, state.params["0.weight"][:, ::2]))

    def losses(m, batch):
        return {"loss": (m(batch[0])[:, :2] * batch[1].sum(0)).square().mean()}

    return World(net(), losses, drive=drive)


@program
def a_rate_that_changes_its_dtype():
    def rate(step):
        return 0.1 if int(step) < 2 else (0.1 * torch.exp(-step / 10)).float()

    return World(net(), square, optimizer=ff.optim.sgd(rate), rtol=1e-6)


@program
def a_hook_that_returns_other_strides():
    model = net()
    model[0].weight.register_hook(lambda gradient: torch.linalg.qr(gradient)[0])
    return World(model, square)


@program
def buffers_that_change_places():
    def f(self, h):
        self.cur, self.prev = self.prev, self.cur
        return h * self.cur + self.prev

    return World(with_buffers(f, cur=torch.rand(4), prev=torch.rand(4)), square)


@program
def a_buffer_moved_on_to_the_next():
    def f(self, h):
        self.prev = self.cur
        self.cur = h.detach().mean(0)
        return h * self.prev

    return World(with_buffers(f, cur=torch.rand(4), prev=torch.rand(4)), square)


@program
def an_attribute_that_keeps_the_buffer_before():
    def f(self, h):
        moved = self.cur - self.old
        self.old = self.cur
        self.cur = h.detach().mean(0)
        return h * moved

    model = with_buffers(f, cur=torch.rand(4))
    model.old = torch.zeros(4)
    return World(model, square, steps=5)


@program(wrong="is gone")
def a_bias_taken_away():
    model = net()
    return World(model, square, change=lambda: setattr(model[0], "bias", None))


@program
def dropout_in_a_checkpoint_that_runs_more_than_twice():
    model = nn.ModuleDict(
        {
            "c": nn.Linear(4, 4),
            "t": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)),
            "a": nn.Linear(4, 1),
            "b": nn.Linear(4, 1),
        }
    )

    def losses(m, x):
        h = checkpoint(m["t"], m["c"](x), use_reentrant=False)
        return {"a": m["a"](h).square().mean(), "b": m["b"](h).mean()}

    return World(model, losses, routes={"a": ["a", "t"], "b": ["b", "c"]})


@program
def a_batch_that_requires_grad():
    def losses(m, x):
        y = m(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return {"loss": y.square().mean() + gradient.square().mean()}

    return World(net(), losses, batch=lambda turn: torch.randn(6, 4).requires_grad_())


@program
def a_hook_that_counts():
    model, seen = net(), SimpleNamespace(calls=0)

    def hook(gradient):
        seen.calls += 1
        return gradient * seen.calls

    model[2].weight.register_hook(hook)
    return World(model, square, seen=lambda: seen.calls)


@program
def a_list_that_keeps_the_buffers_before():
    seen: list[torch.Tensor] = []

    def f(self, h):
        moved = sum(seen[-2:], torch.zeros(4))
        seen.append(self.cur)
        self.cur = h.detach().mean(0)
        return h * moved + self.cur

    return World(with_buffers(f, cur=torch.rand(4)), square, seen=lambda: seen, steps=5)


@program
def a_detached_value_of_before_in_a_momentum_teacher():
    model = nn.ModuleDict({"s": nn.Linear(4, 3), "t": nn.Linear(4, 3).requires_grad_(False)})

    def losses(m, x):
        before = m["t"].weight.detach()
        m["t"].weight.data = 0.9 * m["t"].weight.data + 0.1 * m["s"].weight.data
        return {"loss": (m["s"](x) - nn.functional.linear(x, before)).square().mean()}

    return World(model, losses, routes={"loss": "s"})


@program
def random_numbers_in_a_checkpoint_that_two_losses_visit():
    model = nn.ModuleDict({"i": nn.Linear(4, 8), "t": nn.Linear(8, 8), "o": nn.Linear(8, 3)}).eval()

    def block(h, t):
        h = t(h * (1 + torch.zeros_like(h).bernoulli_(1.0)))
        return h + torch.zeros_like(h).bernoulli_(1.0)

    def losses(m, x):
        h = checkpoint(block, m["i"](x), m["t"], use_reentrant=False)
        return {"a": m["o"](h).square().mean(), "b": h.mean()}

    return World(model, losses, routes={"a": "*", "b": {"i": -0.1}})


@program(wrong="must return a finite number or a 0-d tensor, it returned nan")
def a_weight_that_becomes_nan():
    def weight(step):
        return float("nan") if int(step) > 1 else 1.0

    return World(net(), square, routes={"loss": ff.Route("*", weight=weight)})


@program(wrong="sgd: the lr schedule must give a number or a 0-d tensor, got NoneType")
def a_rate_that_becomes_none():
    return World(net(), square, optimizer=ff.optim.sgd(lambda step: None if int(step) > 1 else 0.1))


@program
def a_part_that_takes_the_dict_of_another():
    model = net()
    return World(model, square, change=lambda: vars(model[2]).update(vars(copy.deepcopy(model[2]))))


@program
def a_norm_that_is_set_to_the_state_of_another():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    other = copy.deepcopy(model[1])
    other.running_mean += 1.0
    return World(model, square, change=lambda: model[1].__setstate__(vars(other)))


@program(traces=1)
def dicts_that_are_others_with_the_same_in_them():
    model = net()

    def change():
        for part in model:
            vars(part)["_parameters"] = dict(part._parameters)

    return World(model, square, change=dict.fromkeys(range(1, 4), change))


@program
def a_buffer_that_is_written_to_and_then_changes_its_name():
    def f(self, h):
        y = h + self.last
        self.last.copy_(y.detach().mean(0))
        self.now, self.last = self.last, self.now
        return y

    return World(with_buffers(f, now=torch.zeros(4), last=torch.rand(4)), square)


@program
def a_buffer_that_changes_its_name_and_is_then_written_to():
    def f(self, h):
        self.now, self.last = self.last, self.now
        self.last.mul_(0.5)
        return h + self.last - self.now

    return World(with_buffers(f, now=torch.rand(4), last=torch.rand(4)), square)


@program(traces=3)
def a_cached_buffer_by_turns_with_another_tensor():
    def f(self, h):
        if self.keeps:
            self.cache = self.a
        return h + self.cache.sum()

    model = with_buffers(f, a=torch.rand(4))
    model.keeps, model.cache = True, None
    kept: list[torch.Tensor] = []

    def change(turn):
        model.keeps = False
        kept.append(model.cache)
        model.cache = kept[0] if turn % 2 else torch.ones(3, 5)

    changes = {turn: functools.partial(change, turn) for turn in range(1, 12)}
    return World(model, square, change=changes, steps=12)


@program(eager="by another way than the model", traces=3)
def parameters_in_the_batch_by_turns():
    model = net()
    given = [lambda: model[0].weight, lambda: torch.ones(4, 4), lambda: model[2].weight]

    def losses(m, batch):
        return {"loss": (m(batch[0]) * batch[1].sum()).square().mean()}

    return World(model, losses, batch=lambda turn: (torch.randn(6, 4), given[turn % 3]()), steps=9)


@program
def a_buffer_that_is_made_anew_in_its_place():
    def f(self, h):
        if self.turn == 0:
            del self.a
            self.register_buffer("a", torch.ones(4))
        self.turn += 1
        return h + self.a

    model = with_buffers(f, a=torch.rand(4), b=torch.rand(4))
    model.turn = 0
    return World(model, square, seen=lambda: [*model._buffers])


@program
def a_number_kept_on_a_parameter():
    model = net()
    model[0].weight.scale = 2.0

    def losses(m, x):
        return {
            "loss": (m(x) * getattr(m[0].weight, "scale", 1.0) * getattr(m[2].weight, "scale", 1.0)).square().mean()
        }

    return World(model, losses, change=lambda: setattr(model[2].weight, "scale", 3.0))


@program
def optimizer_state_that_a_second_step_begins():
    model = nn.ModuleDict({"g": net(), "d": net()})
    world = World(
        model, lambda m, x: {"g": m["d"](m["g"](x)).square().mean()}, routes={"g": "g"}, optimizer=ff.optim.adam(0.1)
    )

    def between(step, state, turn):
        if turn != 1:
            return step, state

        def losses(m, x):
            return {"d": (m["d"](m["g"](x)) - 1).square().mean()}

        return ff.Step(model, losses, {"d": "d"}, optimizer=ff.optim.adam(0.2), compile=world.compile), state

    world.between = between
    return world
