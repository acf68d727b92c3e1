"""Sharp corners: objects that change places, errors of the user's own, aliases and views."""

from __future__ import annotations

import logging
import time
import warnings
from types import SimpleNamespace

import numpy as np
import torch
from lockstep import LINE, World, program
from torch import nn
from torch.nn.utils import parametrizations

from programs.modules import Calling, square


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


@program(eager="by another way")
def an_anchor_that_becomes_the_models_own_weight():
    model, box = net(), SimpleNamespace(w=nn.Parameter(torch.ones(4, 4), requires_grad=False))
    return World(
        model,
        lambda m, x: {"loss": m(x).square().mean() + (box.w * m[0].weight).sum()},
        change=lambda: setattr(box, "w", model[0].weight),
    )


@program(eager="by another way")
def a_weight_that_stops_being_the_models_own():
    model, box = net(), SimpleNamespace()
    box.w = model[0].weight
    return World(
        model,
        lambda m, x: {"loss": m(x).square().mean() + (box.w * m[0].weight).sum()},
        change=lambda: setattr(box, "w", torch.ones(4, 4)),
    )


@program
def a_teacher_that_becomes_the_model():
    model, box = net(), SimpleNamespace(teacher=net())

    def losses(m, x):
        with torch.no_grad():
            wanted = box.teacher(x + 1)
        return {"loss": (m(x) - wanted).square().mean()}

    return World(model, losses, change=lambda: setattr(box, "teacher", model))


@program(wrong="was not there")
def a_layer_exchanged_for_a_new_one():
    model = net()
    return World(model, square, change=lambda: model.__setitem__(0, nn.Linear(4, 4)))


@program
def a_weight_exchanged_for_a_new_one():
    model = net()
    return World(model, square, change=lambda: setattr(model[0], "weight", nn.Parameter(torch.eye(4))))


@program
def weights_tied_between_steps():
    model = net()
    return World(model, square, change=lambda: setattr(model[2], "weight", model[0].weight))


@program(wrong="has changed since the Step was built")
def spectral_norm_put_on_between_steps():
    model = net()
    return World(model, square, change=lambda: parametrizations.spectral_norm(model[0]))


@program
def weights_loaded_into_the_module_between_steps():
    model, other = net(), net()
    return World(model, square, change=lambda: model.load_state_dict(other.state_dict()))


@program
def weights_moved_by_data_between_steps():
    model = net()

    def change():
        model[0].weight.data = torch.eye(4)

    return World(model, square, change=change)


@program
def the_old_weight_norm():
    with warnings.catch_warnings(action="ignore"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Tanh())
    return World(model, square)


@program(eager="by another way")
def a_list_of_weights_inside_the_model():
    model = Calling(lambda self, h: h @ self.weights[0])
    model.weights = [model.linear.weight]
    return World(model, square)


@program(wrong="by another way")
def a_view_of_a_weight_made_in_init():
    model = Calling(lambda self, h: h * self.first)
    model.first = model.linear.weight.data[0]
    return World(model, square)


@program(eager="by another way")
def a_buffer_in_a_closure():
    model = Calling(lambda self, h: h - self.mean)
    model.register_buffer("mean", torch.zeros(4))
    mean = model.mean

    def losses(m, x):
        h = m(x)
        m.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return {"loss": h.square().mean() + (h * mean).mean()}

    return World(model, losses)


@program(wrong="by another way")
def a_view_of_a_buffer_in_a_closure():
    model = Calling(lambda self, h: h - self.mean)
    model.register_buffer("mean", torch.zeros(4))
    view = model.mean[:2]

    def losses(m, x):
        h = m(x)
        m.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return {"loss": h.square().mean() + h.mean() * view.sum()}

    return World(model, losses)


@program
def two_buffers_that_are_views_of_one():
    model = Calling(lambda self, h: h - self.a + self.b)
    both = torch.zeros(8)
    model.register_buffer("a", both[:4])
    model.register_buffer("b", both[2:6])

    def losses(m, x):
        h = m(x)
        m.a.add_(h.detach().mean(0))
        return {"loss": h.square().mean() + m.b.sum() * h.mean()}

    return World(model, losses)


@program
def a_batch_of_views_written_in_place():
    def losses(m, batch):
        x, part = batch
        part.mul_(2)
        return {"loss": m(x).square().mean()}

    def batch(turn):
        x = torch.randn(6, 4)
        return x, x[:3]

    return World(net(), losses, batch=batch)


@program
def the_same_tensor_twice_in_a_batch():
    def batch(turn):
        x = torch.randn(6, 4)
        return (x, x) if turn < 2 else (x, torch.randn(6, 4))

    return World(net(), lambda m, b: {"loss": (m(b[0]) * b[1]).mean()}, batch=batch)


@program(wrong="seventeen")
def an_error_of_the_users_own_later():
    config = SimpleNamespace(fail=False)

    def losses(m, x):
        if config.fail:
            raise ValueError("seventeen")
        return {"loss": m(x).square().mean()}

    return World(net(), losses, change=lambda: setattr(config, "fail", True))


@program(wrong="cannot be multiplied|size mismatch")
def a_batch_of_the_wrong_width_later():
    return World(net(), square, batch=lambda turn: torch.randn(6, 4 if turn < 2 else 5))


@program(wrong="has no route")
def a_loss_renamed_later():
    config = SimpleNamespace(name="loss")
    return World(
        net(), lambda m, x: {config.name: m(x).square().mean()}, change=lambda: setattr(config, "name", "other")
    )


@program(wrong="is not a tensor but float")
def a_loss_that_becomes_a_number():
    config = SimpleNamespace(zero=False)
    return World(
        net(),
        lambda m, x: {"loss": 0.0 if config.zero else m(x).square().mean()},
        change=lambda: setattr(config, "zero", True),
    )


@program(wrong="does not require grad")
def a_loss_detached_later():
    config = SimpleNamespace(cut=False)
    return World(
        net(),
        lambda m, x: {"loss": m(x.detach()).square().mean().detach() if config.cut else m(x).square().mean()},
        change=lambda: setattr(config, "cut", True),
    )


@program(wrong="is not a scalar")
def a_loss_that_is_no_scalar_later():
    config = SimpleNamespace(rows=False)
    return World(
        net(),
        lambda m, x: {"loss": m(x).square().mean(0) if config.rows else m(x).square().mean()},
        change=lambda: setattr(config, "rows", True),
    )


@program(refused=LINE)
def a_try_around_the_forward():
    def losses(m, x):
        try:
            h = m(x, x)
        except TypeError:
            h = m(x)
        return {"loss": h.square().mean()}

    return World(net(), losses)


@program
def prints():
    def losses(m, x):
        print("step")  # noqa: T201  # the point
        return {"loss": m(x).square().mean()}

    return World(net(), losses)


@program
def warns():
    def losses(m, x):
        warnings.warn("old", stacklevel=1)
        return {"loss": m(x).square().mean()}

    return World(net(), losses, around=lambda turn: warnings.catch_warnings(action="ignore"))


@program
def logs():
    log = logging.getLogger("lockstep")

    def losses(m, x):
        log.debug("rows %d", len(x))
        return {"loss": m(x).square().mean()}

    return World(net(), losses)


@program(refused=LINE)
def takes_the_time():
    def losses(m, x):
        start = time.perf_counter()
        return {"loss": m(x).square().mean()}, {"took": time.perf_counter() - start > -1}

    return World(net(), losses)


@program
def a_global_counter_in_a_module_class():
    class Model(nn.Linear):
        calls = 0

        def forward(self, x):
            Model.calls += 1
            return super().forward(x) * Model.calls

    return World(Model(4, 4), square, seen=lambda: Model.calls)


@program
def zeroes_a_list_of_losses():
    totals = {"loss": 0.0}

    def losses(m, x):
        value = m(x).square().mean()
        totals["loss"] += value.detach()
        return {"loss": value}

    return World(net(), losses, seen=lambda: totals)


@program(refused=LINE)
def reassigns_an_attribute_object():
    def f(self, h):
        self.last = SimpleNamespace(h=h)
        return h

    return World(Calling(f, last=None), square)


@program
def returns_what_a_dataclass_method_makes():
    class Out(dict):
        def total(self):
            return sum(self.values())

    def losses(m, x):
        out = Out(a=m(x).square().mean(), b=m(x).abs().mean())
        return {"loss": out.total()}, {**out}

    return World(net(), losses)


@program
def a_moco_encoder_that_begins_later():
    config = SimpleNamespace(on=False)
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4).requires_grad_(False)})

    def losses(m, x):
        if config.on:
            with torch.no_grad():
                m["k"].weight.lerp_(m["q"].weight, 0.5)
        return {"loss": (m["q"](x) - m["k"](x)).square().mean()}

    return World(model, losses, routes={"loss": "q"}, change=lambda: setattr(config, "on", True))


@program(wrong="writes to parameter")
def writes_to_a_routed_weight():
    def losses(m, x):
        with torch.no_grad():
            m[0].weight.clamp_(-0.1, 0.1)
        return {"loss": m(x).square().mean()}

    return World(net(), losses)


@program(wrong="writes to parameter")
def writes_to_a_routed_weight_by_data():
    def losses(m, x):
        m[0].weight.data.clamp_(-0.1, 0.1)
        return {"loss": m(x).square().mean()}

    return World(net(), losses)


@program
def writes_to_a_teacher():
    teacher = net().requires_grad_(False)

    def losses(m, x):
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), m.parameters(), strict=True):
                p.lerp_(q, 0.1)
        return {"loss": (m(x) - teacher(x)).square().mean()}

    return World(net(), losses, seen=lambda: dict(teacher.named_parameters()))


@program
def writes_to_a_teacher_by_data():
    teacher = net()

    def losses(m, x):
        for p, q in zip(teacher.parameters(), m.parameters(), strict=True):
            p.data = 0.9 * p.data + 0.1 * q.data
        return {"loss": (m(x) - teacher(x).detach()).square().mean()}

    return World(net(), losses, seen=lambda: dict(teacher.named_parameters()))


@program
def a_numpy_view_of_a_buffer():
    model = Calling(lambda self, h: h * self.scale)
    model.register_buffer("scale", torch.ones(4))
    view = model.scale.numpy()
    return World(model, lambda m, x: {"loss": m(x).square().mean() * float(np.sum(view))})
