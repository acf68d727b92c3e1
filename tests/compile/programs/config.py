"""Where people keep the numbers that they turn: configuration objects of all kinds, changed between steps."""

from __future__ import annotations

import dataclasses
import enum
import functools
from types import SimpleNamespace
from typing import ClassVar

import torch
import torch.nn.functional as F
from lockstep import World, program
from torch import nn

TEMPERATURE = 1.0
SETTINGS = {"loss": {"smooth": 0.1}}
DISTANCE = F.mse_loss


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def world(factor, change, **options):
    """A model whose loss is multiplied by what `factor()` reads."""
    return World(net(), lambda model, x: {"loss": model(x).square().mean() * factor()}, change=change, **options)


@program
def simple_namespace():
    config = SimpleNamespace(alpha=1.0)
    return world(lambda: config.alpha, lambda: setattr(config, "alpha", 2.0))


@program
def nested_namespace_replaced():
    config = SimpleNamespace(optim=SimpleNamespace(alpha=1.0))
    return world(lambda: config.optim.alpha, lambda: setattr(config, "optim", SimpleNamespace(alpha=3.0)))


@program
def dataclass_with_class_default():
    @dataclasses.dataclass
    class Config:
        alpha: float = 1.0
        flag: bool = False

    config = Config()
    return world(lambda: config.alpha * (2.0 if config.flag else 1.0), lambda: setattr(config, "flag", True))


@program
def frozen_dataclass_replaced():
    @dataclasses.dataclass(frozen=True)
    class Config:
        alpha: float = 1.0

    box = SimpleNamespace(config=Config())
    return world(lambda: box.config.alpha, lambda: setattr(box, "config", dataclasses.replace(box.config, alpha=0.3)))


@program
def class_default_shadowed_on_the_instance():
    class Config:
        alpha = 1.0

    config = Config()
    return world(lambda: config.alpha, lambda: setattr(config, "alpha", 2.0))


@program
def class_default_changed_on_the_class():
    class Config:
        alpha = 1.0

    config = Config()
    return world(lambda: config.alpha, lambda: setattr(Config, "alpha", 2.0))


@program
def class_used_as_a_namespace():
    class Config:
        alpha = 1.0

    return world(lambda: Config.alpha, lambda: setattr(Config, "alpha", 2.0))


@program
def class_inherits_from_a_base_config():
    class Base:
        alpha = 1.0

    class Config(Base):
        pass

    return world(lambda: Config.alpha, lambda: setattr(Config, "alpha", 2.0))


@program
def base_config_changed_under_a_subclass():
    class Base:
        alpha = 1.0

    class Config(Base):
        pass

    return world(lambda: Config.alpha, lambda: setattr(Base, "alpha", 2.0))


@program
def instance_of_subclass_base_changed():
    class Base:
        alpha = 1.0

    class Config(Base):
        pass

    config = Config()
    return world(lambda: config.alpha, lambda: setattr(Base, "alpha", 2.0))


@program
def attribute_deleted_falls_back_to_class():
    class Config:
        alpha = 1.0

    config = Config()
    config.alpha = 2.0
    return world(lambda: config.alpha, lambda: delattr(config, "alpha"))


@program
def class_flag():
    class Model(nn.Sequential):
        doubled: ClassVar[bool] = False

        def forward(self, x):
            out = super().forward(x)
            return out * 2 if self.doubled else out

    model = Model(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    return World(
        model, lambda model, x: {"loss": model(x).square().mean()}, change=lambda: setattr(Model, "doubled", True)
    )


@program
def slots():
    class Config:
        __slots__ = ("alpha",)

    config = Config()
    config.alpha = 1.0
    return world(lambda: config.alpha, lambda: setattr(config, "alpha", 2.0))


@program
def dict_in_dict():
    config = {"loss": {"alpha": 1.0}}
    return world(lambda: config["loss"]["alpha"], lambda: config["loss"].update(alpha=2.0))


@program
def global_dict_in_dict():
    return world(
        lambda: SETTINGS["loss"]["smooth"],
        lambda: SETTINGS["loss"].update(smooth=0.5),
        restore=lambda: SETTINGS["loss"].update(smooth=0.1),
    )


@program
def dict_key_added_later():
    config = {}
    return world(lambda: config.get("alpha", 1.0), lambda: config.update(alpha=2.0))


@program
def key_in_dict():
    config = {"use_scale": 1}
    return world(lambda: 2.0 if "use_scale" in config else 1.0, lambda: config.pop("use_scale"))


@program
def list_of_weights():
    weights = [1.0, 2.0]
    return world(lambda: sum(weights), lambda: weights.append(3.0))


@program
def dict_of_weights_summed():
    weights = {"a": 1.0, "b": 2.0}
    return world(lambda: sum(weights.values()), lambda: weights.update(b=4.0))


@program
def set_of_flags():
    flags = {"mixup"}
    return world(lambda: 2.0 if "mixup" in flags else 1.0, lambda: flags.discard("mixup"))


@program
def getattr_with_default():
    config = SimpleNamespace()
    return world(lambda: getattr(config, "alpha", 1.0), lambda: setattr(config, "alpha", 2.0))


@program
def getattr_with_a_made_name():
    config = SimpleNamespace(alpha_task=1.0, alpha_domain=3.0, kind="task")
    return world(lambda: getattr(config, f"alpha_{config.kind}"), lambda: setattr(config, "kind", "domain"))


@program
def hasattr_later():
    config = SimpleNamespace()
    return world(lambda: 2.0 if hasattr(config, "alpha") else 1.0, lambda: setattr(config, "alpha", 1))


@program
def vars_of_a_namespace():
    config = SimpleNamespace(a=1.0, b=2.0)
    return world(lambda: vars(config)["b"], lambda: setattr(config, "b", 3.0))


@program
def an_enum():
    class Mode(enum.Enum):
        SUM = "sum"
        MEAN = "mean"

    config = SimpleNamespace(mode=Mode.MEAN)
    return world(lambda: 1.0 if config.mode is Mode.MEAN else 5.0, lambda: setattr(config, "mode", Mode.SUM))


@program
def an_int_enum_by_value():
    class Mode(enum.IntEnum):
        ONE = 1
        TWO = 2

    config = SimpleNamespace(mode=Mode.ONE)
    return world(lambda: config.mode * 1.5, lambda: setattr(config, "mode", Mode.TWO))


@program
def a_property():
    class Config:
        def __init__(self):
            self.epoch = 0

        @property
        def alpha(self):
            return 1.0 + 0.5 * self.epoch

    config = Config()
    return world(lambda: config.alpha, lambda: setattr(config, "epoch", 3))


@program
def a_cached_property_deleted():
    class Config:
        def __init__(self):
            self.epoch = 0

        @functools.cached_property
        def alpha(self):
            return 1.0 + 0.5 * self.epoch

    config = Config()
    assert config.alpha == 1.0

    def change():
        config.epoch = 3
        del config.alpha
        assert config.alpha == 2.5

    return world(lambda: config.alpha, change)


@program
def a_property_of_the_model():
    class Model(nn.Linear):
        epoch = 0

        @property
        def alpha(self):
            return 1.0 + self.epoch

        def forward(self, x):
            return super().forward(x) * self.alpha

    model = Model(4, 2)
    return World(model, lambda model, x: {"loss": model(x).square().mean()}, change=lambda: setattr(model, "epoch", 2))


@program
def losses_is_a_partial():
    def losses(model, x, alpha):
        return {"loss": model(x).square().mean() * alpha}

    partial = functools.partial(losses, alpha=1.0)
    return World(net(), partial, change=lambda: partial.keywords.update(alpha=2.0))


@program
def a_partial_criterion_rebound():
    box = SimpleNamespace(criterion=functools.partial(F.smooth_l1_loss, beta=1.0))
    return World(
        net(),
        lambda model, x: {"loss": box.criterion(model(x), x[:, :3])},
        change=lambda: setattr(box, "criterion", functools.partial(F.smooth_l1_loss, beta=0.1)),
    )


@program
def a_partial_with_changed_keywords():
    criterion = functools.partial(F.smooth_l1_loss, beta=1.0)
    return World(
        net(),
        lambda model, x: {"loss": criterion(model(x), x[:, :3])},
        change=lambda: criterion.keywords.update(beta=0.1),
    )


@program
def a_function_attribute():
    def losses(model, x):
        return {"loss": model(x).square().mean() * losses.alpha}

    losses.alpha = 1.0
    return World(net(), losses, change=lambda: setattr(losses, "alpha", 2.0))


@program
def a_module_level_global():
    return world(lambda: TEMPERATURE, lambda: globals().update(TEMPERATURE=0.5), restore=reset)


def reset():
    globals().update(TEMPERATURE=1.0, DISTANCE=F.mse_loss)


@program
def a_global_alias_of_a_function():
    return World(
        net(),
        lambda model, x: {"loss": DISTANCE(model(x), x[:, :3])},
        change=lambda: globals().update(DISTANCE=F.l1_loss),
        restore=reset,
    )


@program
def an_alias_of_a_function_in_a_dict():
    registry = {"act": torch.tanh}
    return World(
        net(),
        lambda model, x: {"loss": registry["act"](model(x)).square().mean()},
        change=lambda: registry.update(act=torch.sigmoid),
    )
