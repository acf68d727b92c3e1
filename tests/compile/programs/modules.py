"""What modules do beside computing: modes, hooks, counters, caches, buffers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from lockstep import LINE, World, program
from torch import nn


def normed():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.25), nn.Linear(4, 2))


def square(model, x):
    return {"loss": model(x).square().mean()}


class Calling(nn.Module):
    """A linear layer that calls a function with itself and its output."""

    def __init__(self, f, **attributes):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.f = f
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.f(self, self.linear(x))


@program
def train_then_eval():
    model = normed()
    return World(model, square, change=model.eval)


@program
def eval_then_train():
    model = normed().eval()
    return World(model, square, change=model.train)


@program
def back_and_forth():
    model = normed()
    return World(model, square, change={1: model.eval, 2: model.train, 3: model.eval, 4: model.train}, steps=5)


@program
def part_in_eval():
    model = normed()
    return World(model, square, change=model[1].eval)


@program
def frozen_batch_norm():
    model = normed()

    def change():
        model[1].eval().requires_grad_(False)

    return World(model, square, routes={"loss": ["0", "3"]}, change=change)


@program
def dropout_p_changed():
    model = normed()
    return World(model, square, change=lambda: setattr(model[2], "p", 0.5))


@program
def dropout_p_changed_every_step():
    model = normed()

    def change():
        model[2].p += 0.05

    return World(model, square, change=dict.fromkeys(range(1, 6), change), steps=6)


@program
def momentum_of_batch_norm_changed():
    model = normed()
    return World(model, square, change=lambda: setattr(model[1], "momentum", 0.5))


@program
def momentum_of_batch_norm_every_step():
    model = normed()

    def change():
        model[1].momentum *= 0.5

    return World(model, square, change=dict.fromkeys(range(1, 5), change), steps=5)


@program(refused=LINE)
def cumulative_batch_norm():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
    return World(model, square)


@program
def eps_of_layer_norm_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    return World(model, square, change=lambda: setattr(model[1], "eps", 0.1))


@program
def eps_changed_every_step():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def change():
        model[1].eps += 0.1

    return World(model, square, change=dict.fromkeys(range(1, 5), change), steps=5)


@program
def leaky_slope_changed_every_step():
    model = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.1))

    def change():
        model[1].negative_slope += 0.1

    return World(model, square, change=dict.fromkeys(range(1, 5), change), steps=5)


@program
def a_layer_swapped():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return World(model, square, change=lambda: model.__setitem__(1, nn.Tanh()))


@program
def a_parameter_free_layer_appended():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return World(model, square, change=lambda: model.append(nn.Tanh()))


@program
def a_forward_hook_added():
    model = normed()
    return World(model, square, change=lambda: model[0].register_forward_hook(lambda m, a, out: out * 2))


@program
def a_forward_hook_removed():
    model = normed()
    handle = model[0].register_forward_hook(lambda m, a, out: out * 2)
    return World(model, square, change=handle.remove)


@program
def a_forward_hook_exchanged():
    model = normed()
    box = [model[0].register_forward_hook(lambda m, a, out: out * 2)]

    def change():
        box.pop().remove()
        box.append(model[0].register_forward_hook(lambda m, a, out: out * 3))

    return World(model, square, change=change)


@program
def a_hook_that_reads_a_closure():
    model, config = normed(), SimpleNamespace(scale=1.0)
    model[0].register_forward_hook(lambda m, a, out: out * config.scale)
    return World(model, square, change=lambda: setattr(config, "scale", 2.0))


@program
def a_pre_hook_with_kwargs():
    model = Calling(lambda self, h: torch.tanh(h))
    model.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    return World(model, square)


@program
def hooks_that_fill_a_dict_of_features():
    model, features = normed(), {}
    model[0].register_forward_hook(lambda m, a, out: features.update(first=out))

    def losses(model, x):
        out = model(x)
        return {"loss": out.square().mean() + 0.1 * features["first"].abs().mean()}

    return World(model, losses)


@program
def hooks_that_fill_a_dict_read_after_the_step():
    model, features = normed(), {}
    model[0].register_forward_hook(lambda m, a, out: features.__setitem__("first", out.detach()))
    return World(model, square, seen=lambda: features)


@program
def hooks_that_fill_a_dict_undetached_read_after_the_step():
    model, features = normed(), {}
    model[0].register_forward_hook(lambda m, a, out: features.__setitem__("first", out))
    return World(model, square, seen=lambda: features)


@program
def hooks_that_append_to_a_list():
    model, seen = normed(), []
    model[0].register_forward_hook(lambda m, a, out: seen.append(out.detach().mean()))
    return World(model, square, seen=lambda: seen)


@program(refused=LINE)
def a_full_backward_hook():
    model = normed()
    model[0].register_full_backward_hook(lambda m, given, out: tuple(g * 2 if g is not None else g for g in given))
    return World(model, square)


@program(refused=LINE)
def a_full_backward_hook_that_scales_what_goes_below():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].register_full_backward_hook(lambda m, given, out: (given[0] * 0.5,))
    return World(model, square)


@program(refused=LINE)
def a_backward_hook_that_records():
    model, norms = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), []
    model[2].register_full_backward_hook(lambda m, given, out: norms.append(out[0].norm()))
    return World(model, square, seen=lambda: norms)


@program
def a_hook_on_a_parameter():
    model = normed()
    model[0].weight.register_hook(lambda g: g * 0.5)
    return World(model, square)


@program
def a_hook_on_a_parameter_added():
    model = normed()
    return World(model, square, change=lambda: model[0].weight.register_hook(lambda g: g.clamp(-0.01, 0.01)))


@program
def a_hook_on_a_parameter_reads_a_closure():
    model, config = normed(), SimpleNamespace(scale=1.0)
    model[0].weight.register_hook(lambda g: g * config.scale)
    return World(model, square, change=lambda: setattr(config, "scale", 3.0))


@program
def a_mask_on_gradients():
    model, mask = normed(), torch.ones(4, 4)
    model[0].weight.register_hook(lambda g: g * mask)
    return World(model, square, change=lambda: mask[0].zero_())


@program
def register_hook_in_forward():
    def f(self, h):
        if h.requires_grad:
            h.register_hook(lambda g: g * 0.5)
        return h

    return World(Calling(f), square)


@program
def register_hook_in_forward_reads_a_closure():
    config = SimpleNamespace(scale=1.0)

    def f(self, h):
        h.register_hook(lambda g: g * config.scale)
        return h

    return World(Calling(f), square, change=lambda: setattr(config, "scale", 2.0))


@program
def register_hook_in_forward_reads_an_attribute():
    def f(self, h):
        h.register_hook(lambda g: g * self.scale)
        return h

    model = Calling(f, scale=1.0)
    return World(model, square, change=lambda: setattr(model, "scale", 2.0))


@program(refused=LINE)
def register_hook_in_losses_records():
    norms = []

    def losses(model, x):
        h = model(x)
        h.register_hook(lambda g: norms.append(g.norm()))
        return {"loss": h.square().mean()}

    return World(Calling(lambda self, h: h), losses, seen=lambda: norms)
