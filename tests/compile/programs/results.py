"""What `losses` returns: absent and odd losses, metrics in all containers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from lockstep import LINE, World, program
from torch import nn


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def with_metrics(read, model=None, **options):
    def losses(model, x):
        h = model(x)
        return {"loss": h.square().mean()}, read(model, x, h)

    return World(model or net(), losses, **options)


TWO = {"one": "*", "two": {"2": 0.5}}


def two(model, x, one, other):
    h = model(x)
    return {"one": h.square().mean() if one else None, "two": h.mean() if other else None}


@program
def absent_by_turns():
    turn = {"now": 0}
    return World(
        net(),
        lambda model, b: two(model, b[1], b[0] % 2 == 0, b[0] % 3 > 0),
        routes=TWO,
        batch=lambda turn: (turn, torch.randn(6, 4)),
        steps=6,
        seen=lambda: turn,
    )


@program
def absent_after_a_switch():
    config = SimpleNamespace(both=True)
    return World(
        net(),
        lambda model, x: two(model, x, True, config.both),
        routes=TWO,
        change=lambda: setattr(config, "both", False),
    )


@program
def absent_before_a_switch():
    config = SimpleNamespace(both=False)
    return World(
        net(),
        lambda model, x: two(model, x, True, config.both),
        routes=TWO,
        change=lambda: setattr(config, "both", True),
    )


@program
def a_weight_of_zero_by_python():
    config = SimpleNamespace(weight=0.0)

    def losses(model, x):
        h = model(x)
        return {"one": h.square().mean(), "two": h.mean() * config.weight if config.weight else None}

    return World(net(), losses, routes=TWO, change=lambda: setattr(config, "weight", 0.5))


@program
def losses_are_views():
    def losses(model, x):
        both = model(x).square().mean(0)
        return {"one": both[0], "two": both[1]}

    return World(net(), losses, routes=TWO)


@program
def losses_unbound():
    def losses(model, x):
        one, two, *_ = model(x).square().mean(0).unbind()
        return {"one": one, "two": two}

    return World(net(), losses, routes=TWO)


@program
def losses_share_a_tensor():
    def losses(model, x):
        value = model(x).square().mean()
        return {"one": value, "two": value}

    return World(net(), losses, routes=TWO)


@program
def a_loss_that_is_a_parameter():
    model = nn.ParameterDict({"w": torch.ones(4), "sigma": torch.tensor(0.5)})
    return World(
        model,
        lambda m, x: {"one": (x @ m["w"]).square().mean(), "two": m["sigma"]},
        routes={"one": "w", "two": "sigma"},
    )


@program
def a_loss_summed_from_the_other():
    def losses(model, x):
        one = model(x).square().mean()
        return {"one": one, "two": one + model[2].weight.square().sum()}

    return World(net(), losses, routes=TWO)


@program
def learned_uncertainty_weights():
    model = nn.ModuleDict({"net": net(), "log": nn.ParameterDict({"a": torch.zeros(()), "b": torch.zeros(())})})

    def losses(m, x):
        h = m["net"](x)
        a, b = m["log"]["a"], m["log"]["b"]
        return {"loss": (-a).exp() * h.square().mean() + a + (-b).exp() * h.abs().mean() + b}

    return World(model, losses)


@program
def losses_in_an_ordered_subclass():
    class Losses(dict):
        pass

    return World(net(), lambda model, x: Losses(loss=model(x).square().mean()))


@program
def a_metric_that_is_a_weight():
    return with_metrics(lambda m, x, h: {"weight": m[0].weight})


@program
def a_metric_that_is_a_view_of_a_weight():
    return with_metrics(lambda m, x, h: {"row": m[0].weight[0], "flat": m[2].weight.view(-1)})


@program
def a_metric_that_is_a_weights_norm():
    return with_metrics(lambda m, x, h: {"norm": m[0].weight.norm(), "name": "first"})


@program
def a_metric_that_is_a_buffer():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return with_metrics(lambda m, x, h: {"mean": m[1].running_mean, "count": m[1].num_batches_tracked}, model)


@program
def all_parameters_as_a_metric():
    return with_metrics(lambda m, x, h: {"params": dict(m.named_parameters()), "list": list(m.parameters())})


@program
def a_metric_that_is_the_batch():
    return with_metrics(lambda m, x, h: {"x": x, "view": x[0], "loss_too": h.square().mean()})


@program
def a_metric_that_is_a_teachers_weight():
    teacher = nn.Linear(4, 4)
    return with_metrics(lambda m, x, h: {"weight": teacher.weight, "distance": (teacher(x) - h).square().mean()})


@program
def a_dataclass_as_a_metric():
    @dataclasses.dataclass
    class Output:
        logits: Any
        hidden: Any = None
        name: str = "out"

    return with_metrics(lambda m, x, h: {"out": Output(h, (h, x))})


@program
def a_dataclass_that_holds_a_weight():
    @dataclasses.dataclass
    class Output:
        weight: Any

    return with_metrics(lambda m, x, h: {"out": Output(m[0].weight)})


@program
def a_model_output():
    from transformers.utils import ModelOutput

    @dataclasses.dataclass
    class Output(ModelOutput):
        logits: torch.Tensor | None = None
        hidden: tuple[torch.Tensor, ...] | None = None

    def losses(model, x):
        out = Output(logits=model(x))
        return {"loss": out.logits.square().mean()}, {"out": out}

    return World(net(), losses)


@program
def sizes_and_strings():
    return with_metrics(lambda m, x, h: {"n": len(x), "shape": h.shape, "dtype": h.dtype, "text": f"{len(x)} rows"})


@program
def nested_dicts():
    return with_metrics(lambda m, x, h: {"a": {"b": [h.mean(), {"c": (h.std(), 1.5, None)}]}})


@program
def a_float_from_a_config_as_a_metric():
    config = SimpleNamespace(alpha=1.0)
    return with_metrics(
        lambda m, x, h: {"alpha": config.alpha, "twice": 2 * config.alpha},
        change={turn: lambda: setattr(config, "alpha", config.alpha / 2) for turn in range(1, 4)},
    )


@program(refused=LINE)
def an_epoch_as_a_metric():
    config = SimpleNamespace(epoch=0)
    return with_metrics(
        lambda m, x, h: {"epoch": config.epoch, "text": f"epoch {config.epoch}"},
        change={turn: lambda: setattr(config, "epoch", config.epoch + 1) for turn in range(1, 5)},
        steps=5,
    )


@program
def an_integer_tensor_as_a_metric():
    return with_metrics(lambda m, x, h: {"predicted": h.argmax(-1), "right": (h.argmax(-1) == 0).sum()})


@program
def the_same_tensor_twice_in_metrics():
    def read(m, x, h):
        mean = h.mean()
        return {"a": mean, "b": mean, "c": [mean, h, h[0]]}

    return with_metrics(read)


@program(refused=LINE)
def a_namespace_as_a_metric():
    return with_metrics(lambda m, x, h: {"out": SimpleNamespace(n=3)})


@program
def a_user_list_filled_in_losses():
    log = []

    def losses(model, x):
        value = model(x).square().mean()
        log.append(value.detach())
        return {"loss": value}

    return World(net(), losses, seen=lambda: log)


@program
def a_user_dict_of_logs_rewritten():
    log = {"steps": 0}

    def losses(model, x):
        value = model(x).square().mean()
        log["last"] = value.detach()
        log["steps"] += 1
        return {"loss": value}

    return World(net(), losses, seen=lambda: log, steps=6)


@program
def a_running_sum_in_place_on_a_user_tensor():
    total = torch.zeros(4)

    def losses(model, x):
        h = model(x)
        total.add_(h.detach().mean(0))
        return {"loss": (h - total).square().mean()}

    return World(net(), losses, seen=lambda: total)


@program
def a_user_tensor_written_by_data():
    total = torch.zeros(4)

    def losses(model, x):
        h = model(x)
        total.data = total.data + h.detach().mean(0)
        return {"loss": (h - total).square().mean()}

    return World(net(), losses, seen=lambda: total)


@program
def a_batch_written_in_place():
    kept = []

    def batch(turn):
        kept.append(torch.randn(6, 4))
        return kept[-1]

    def losses(model, x):
        x.mul_(0.5)
        return {"loss": model(x).square().mean()}

    return World(net(), losses, batch=batch, seen=lambda: kept)


@program
def a_tensor_of_the_user_written_at_an_index():
    seen = torch.zeros(8)

    def losses(model, b):
        rows, x = b
        value = model(x).square().mean(-1)
        seen[rows] = value.detach()
        return {"loss": (value * (1 + seen[rows])).mean()}

    return World(net(), losses, batch=lambda turn: (torch.randperm(8)[:4], torch.randn(4, 4)), seen=lambda: seen)


@program
def a_metrics_object_that_averages():
    class Mean:
        def __init__(self):
            self.total, self.count = torch.zeros(()), 0

        def update(self, value):
            self.total = self.total + value
            self.count += 1

    mean = Mean()

    def losses(model, x):
        value = model(x).square().mean()
        mean.update(value.detach())
        return {"loss": value}

    return World(net(), losses, seen=lambda: vars(mean))


@program
def a_metrics_object_that_keeps_floats():
    values = []

    def losses(model, x):
        value = model(x).square().mean()
        values.append(value.item())
        return {"loss": value}

    return World(net(), losses, seen=lambda: values)
