"""More places for numbers: defaults, closures, the environment, iterators, proxies."""

from __future__ import annotations

import collections
import functools
import itertools
import os
import types
from types import MappingProxyType, SimpleNamespace

import numpy as np
import torch
from lockstep import LINE, World, program
from torch import nn

from programs.config import net, world


@program(old="Dynamo does not guard the defaults of a function that it inlines")
def a_default_argument():
    def losses(model, x, alpha=1.0):
        return {"loss": model(x).square().mean() * alpha}

    return World(net(), losses, change=lambda: setattr(losses, "__defaults__", (2.0,)))


@program
def a_default_of_a_helper():
    def scale(x, alpha=1.0):
        return x * alpha

    return World(
        net(),
        lambda model, x: {"loss": scale(model(x).square().mean())},
        change=lambda: setattr(scale, "__defaults__", (2.0,)),
    )


@program
def a_mutable_default():
    def losses(model, x, config={"alpha": 1.0}):  # noqa: B006  # the point
        return {"loss": model(x).square().mean() * config["alpha"]}

    return World(net(), losses, change=lambda: losses.__defaults__[0].update(alpha=2.0))


@program
def a_keyword_default_of_a_helper():
    def scale(x, *, alpha=1.0):
        return x * alpha

    return World(
        net(),
        lambda model, x: {"loss": scale(model(x).square().mean())},
        change=lambda: scale.__kwdefaults__.update(alpha=2.0),
    )


@program
def a_nonlocal():
    alpha = 1.0

    def change():
        nonlocal alpha
        alpha = 2.0

    return world(lambda: alpha, change)


@program
def a_nonlocal_changed_every_step():
    alpha = 1.0

    def change():
        nonlocal alpha
        alpha += 0.25

    return world(lambda: alpha, dict.fromkeys(range(1, 6), change), steps=6)


@program
def a_counter_written_in_losses():
    calls = 0

    def losses(model, x):
        nonlocal calls
        calls += 1
        return {"loss": model(x).square().mean() * calls}

    return World(net(), losses, seen=lambda: calls)


@program
def an_lru_cached_helper():
    config = SimpleNamespace(size=2)

    @functools.lru_cache
    def table(size):
        return float(size) ** 0.5

    return world(lambda: table(config.size), lambda: setattr(config, "size", 3))


@program(known="Dynamo looks through lru_cache")
def an_lru_cache_that_reads_elsewhere():
    config = SimpleNamespace(alpha=1.0)

    @functools.lru_cache
    def alpha():
        return config.alpha

    def change():
        config.alpha = 2.0

    return world(alpha, change)


@program
def an_lru_cache_cleared():
    config = SimpleNamespace(alpha=1.0)

    @functools.lru_cache
    def alpha():
        return config.alpha

    def change():
        config.alpha = 2.0
        alpha.cache_clear()

    return world(alpha, change)


@program
def an_environment_variable():
    os.environ["LOCKSTEP_ALPHA"] = "1.0"
    return world(
        lambda: float(os.environ["LOCKSTEP_ALPHA"]),
        lambda: os.environ.update(LOCKSTEP_ALPHA="2.0"),
        restore=lambda: os.environ.pop("LOCKSTEP_ALPHA", None),
    )


@program(known="os.environ.get is not guarded")
def an_environment_variable_with_default():
    return world(
        lambda: 2.0 if os.environ.get("LOCKSTEP_DEBUG", "0") == "1" else 1.0,
        lambda: os.environ.update(LOCKSTEP_DEBUG="1"),
        restore=lambda: os.environ.pop("LOCKSTEP_DEBUG", None),
    )


@program(known="os.getenv is not guarded")
def os_getenv():
    return world(
        lambda: float(os.getenv("LOCKSTEP_BETA", "1.0")),
        lambda: os.environ.update(LOCKSTEP_BETA="2.0"),
        restore=lambda: os.environ.pop("LOCKSTEP_BETA", None),
    )


@program(refused=LINE)
def an_iterator_of_factors():
    factors = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    return world(lambda: next(factors), None)


@program
def an_itertools_count():
    count = itertools.count(1)
    return world(lambda: next(count) * 1.0, None)


@program(refused=LINE)
def an_itertools_cycle():
    cycle = itertools.cycle([1.0, 2.0])
    return world(lambda: next(cycle), None)


@program(refused=LINE)
def a_generator_of_factors():
    def factors():
        value = 1.0
        while True:
            yield value
            value *= 0.5

    made = factors()
    return world(lambda: next(made), None)


@program
def a_mapping_proxy():
    config = {"alpha": 1.0}
    view = MappingProxyType(config)
    return world(lambda: view["alpha"], lambda: config.update(alpha=2.0))


@program(known="a key that a ChainMap does not hold yet is not guarded")
def a_chain_map():
    user, defaults = {}, {"alpha": 1.0}
    config = collections.ChainMap(user, defaults)
    return world(lambda: config["alpha"], lambda: user.update(alpha=2.0))


@program
def a_user_dict():
    config = collections.UserDict(alpha=1.0)
    return world(lambda: config["alpha"], lambda: config.update(alpha=2.0))


@program
def a_default_dict():
    config = collections.defaultdict(lambda: 1.0)
    return world(lambda: config["alpha"], lambda: config.update(alpha=2.0), seen=lambda: dict(config))


@program(known="the order of an OrderedDict is not guarded")
def an_ordered_dict_moved_to_end():
    config = collections.OrderedDict(a=1.0, b=2.0)
    return world(lambda: next(iter(config.values())), lambda: config.move_to_end("a"))


@program
def a_dict_subclass_with_attributes():
    class Config(dict):
        def __getattr__(self, name):
            return self[name]

        __setattr__ = dict.__setitem__

    config = Config(alpha=1.0)
    return world(lambda: config.alpha, lambda: setattr(config, "alpha", 2.0))


@program
def a_getattr_fallback():
    class Config:
        def __init__(self):
            self.values = {"alpha": 1.0}

        def __getattr__(self, name):
            return self.values[name]

    config = Config()
    return world(lambda: config.alpha, lambda: config.values.update(alpha=2.0))


@program
def a_module_of_settings():
    module = types.ModuleType("lockstep_settings")
    module.alpha = 1.0
    return world(lambda: module.alpha, lambda: setattr(module, "alpha", 2.0))


@program
def a_bound_method_of_a_trainer():
    class Trainer:
        def __init__(self):
            self.epoch = 0

        def weight(self):
            return 1.0 / (1 + self.epoch)

        def losses(self, model, x):
            return {"loss": model(x).square().mean() * self.weight()}

    trainer = Trainer()
    return World(net(), trainer.losses, change=lambda: setattr(trainer, "epoch", 3))


@program
def a_callable_object():
    class Criterion:
        def __init__(self):
            self.alpha = 1.0

        def __call__(self, model, x):
            return {"loss": model(x).square().mean() * self.alpha}

    criterion = Criterion()
    return World(net(), criterion, change=lambda: setattr(criterion, "alpha", 2.0))


@program(known="methods of classes are not guarded")
def a_method_replaced_on_the_class():
    class Criterion:
        def scale(self):
            return 1.0

    criterion = Criterion()
    return world(lambda: criterion.scale(), lambda: setattr(Criterion, "scale", lambda self: 2.0))


@program
def a_method_replaced_on_the_instance():
    class Criterion:
        def scale(self):
            return 1.0

    criterion = Criterion()
    return world(lambda: criterion.scale(), lambda: setattr(criterion, "scale", lambda: 2.0))


@program
def a_forward_replaced_on_the_module():
    model = nn.Linear(4, 2)

    def change():
        model.forward = lambda x: torch.tanh(x @ model.weight.T)

    return World(model, lambda model, x: {"loss": model(x).square().mean()}, change=change)


@program
def a_criterion_module_with_numbers():
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    return World(
        net(),
        lambda model, x: {"loss": criterion(model(x), torch.zeros(6, dtype=torch.long))},
        change=lambda: setattr(criterion, "label_smoothing", 0.5),
    )


@program
def a_criterion_with_class_weights_changed_in_place():
    criterion = nn.CrossEntropyLoss(weight=torch.ones(3))
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    return World(
        net(),
        lambda model, x: {"loss": criterion(model(x), target)},
        change=lambda: criterion.weight.copy_(torch.tensor([1.0, 2.0, 3.0])),
    )


@program
def a_numpy_scalar():
    config = SimpleNamespace(alpha=np.float64(1.0))
    return world(lambda: config.alpha, lambda: setattr(config, "alpha", np.float64(2.0)))


@program(refused=LINE)
def a_numpy_array_indexed():
    schedule = np.linspace(1.0, 2.0, 5)
    config = SimpleNamespace(epoch=0)
    return world(lambda: float(schedule[config.epoch]), lambda: setattr(config, "epoch", 3))


@program
def a_numpy_array_changed_in_place():
    weights = np.ones(3)

    def change():
        weights[1] = 5.0

    return World(
        net(), lambda model, x: {"loss": (model(x) * torch.from_numpy(weights)).square().mean()}, change=change
    )


@program
def a_numpy_array_changed_in_place_as_tensor():
    weights = np.ones(3)

    def change():
        weights[1] = 5.0

    return World(net(), lambda model, x: {"loss": (model(x) * torch.as_tensor(weights)).square().mean()}, change=change)


@program
def a_list_of_floats_made_a_tensor():
    weights = [1.0, 1.0, 1.0]
    return World(
        net(),
        lambda model, x: {"loss": (model(x) * torch.tensor(weights)).square().mean()},
        change=lambda: weights.__setitem__(1, 4.0),
    )
