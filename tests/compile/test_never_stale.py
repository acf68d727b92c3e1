"""What the losses read is guarded: changed, they are traced again; unchanged, never."""

from __future__ import annotations

import collections
import dataclasses
import sys
import types

import pytest
import torch
from torch import nn

import funcfreeze as ff

FACTOR = 2.0


class Layer(nn.Module):
    """Reads all kinds of things in its forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.power, self.options, self.config = 1.0, {"shift": 0.0}, types.SimpleNamespace(sign=1.0)
        self.scale = torch.rand(4)

    def forward(self, x):
        h = self.norm(self.linear(x)) * self.scale * self.power + self.options["shift"]
        return h * self.config.sign * FACTOR


def closure_over(value):
    box = {"weight": value}
    number = value

    def losses(model, batch):
        return {"loss": (model(batch) * box["weight"] * number).square().mean()}

    def put(other):
        nonlocal number
        number = other

    return losses, box, put


def change_globals(step, put, box):
    global FACTOR
    FACTOR = 3.0


def change_a_dict(step, put, box):
    step.module.options["shift"] = 0.3


def rebind_a_tensor(step, put, box):
    step.module.scale = torch.rand(4)


def add_a_hook(step, put, box):
    step.module.linear.register_forward_hook(lambda module, args, out: out * 2)


def add_a_parameter_hook(step, put, box):
    step.module.linear.weight.register_hook(lambda grad: grad * 0.5)


CHANGES = {
    "eval": (lambda step, put, box: step.module.eval(), 1),
    "an attribute": (lambda step, put, box: setattr(step.module, "power", 0.5), 1),
    "a dict in an attribute": (change_a_dict, 1),
    "an object in an attribute": (lambda step, put, box: setattr(step.module.config, "sign", -0.5), 1),
    "a tensor in place": (lambda step, put, box: step.module.scale.mul_(2.0), 0),
    "another tensor": (rebind_a_tensor, 0),
    "a hook": (add_a_hook, 1),
    "a hook on a parameter": (add_a_parameter_hook, 1),
    "a global": (change_globals, 1),
    "a closure": (lambda step, put, box: put(0.7), 1),
    "a dict in a closure": (lambda step, put, box: box.update(weight=0.6), 1),
    "an attribute nobody reads": (lambda step, put, box: setattr(step.module, "unread", 1), 0),
}


@pytest.fixture(autouse=True)
def _factor():
    yield
    globals()["FACTOR"] = 2.0


def outcome(step, state, batch):
    state, metrics = step(state, batch)
    return state, metrics["loss"], {path: tensor.clone() for path, tensor in state.params.items()}


ON_INDUCTOR = ("eval", "a tensor in place", "a hook")
"""One of each kind; the others differ only in where they are looked at, which no backend knows of."""


@pytest.mark.parametrize(
    ("change", "backend"), [*((name, "aot_eager") for name in CHANGES), *((name, "inductor") for name in ON_INDUCTOR)]
)
def test_a_change_is_seen(change, backend):
    act, traces = CHANGES[change]
    losses, box, put = closure_over(1.0)
    model = Layer()
    compiled = ff.Step(model, losses, {"loss": "*"}, optimizer=ff.optim.sgd(0.1), compile={"backend": backend})
    eager = ff.Step(model, losses, {"loss": "*"}, optimizer=ff.optim.sgd(0.1), compile=False)
    mine, theirs = compiled.init(), eager.init()
    for turn in range(4):
        if turn == 2:
            act(compiled, put, box)
        batch = torch.randn(6, 4)
        mine, loss, params = outcome(compiled, mine, batch)
        theirs, wanted, after = outcome(eager, theirs, batch)
        torch.testing.assert_close(loss, wanted)
        for path in after:
            torch.testing.assert_close(params[path], after[path])
        assert compiled.traces == 1 + traces * (turn >= 2)


@dataclasses.dataclass(slots=True)
class InSlots:
    rate: float = 1.0


class BehindGetattr:
    def __init__(self):
        self.__dict__["options"] = {"rate": 1.0}

    def __getattr__(self, key):
        return self.__dict__["options"][key]

    def __setattr__(self, key, value):
        self.__dict__["options"][key] = value


class BehindGetitem:
    def __init__(self):
        self.options = {"rate": 1.0}

    def __getitem__(self, key):
        return self.options[key]


def imported():
    from settings_of_a_test import rate

    return rate


def readers():
    """How a factor is read, and how to make it 2, in places further away."""
    slots, attributes, items = InSlots(), BehindGetattr(), BehindGetitem()
    inside, queue, named = ({"rate": 1.0},), collections.deque([1.0]), types.SimpleNamespace(rate=1.0)
    module = types.ModuleType("settings_of_a_test")
    module.rate = 1.0
    sys.modules[module.__name__] = module
    return {
        "slots": (lambda: slots.rate, lambda: setattr(slots, "rate", 2.0)),
        "__getattr__": (lambda: attributes.rate, lambda: setattr(attributes, "rate", 2.0)),
        "__getitem__": (lambda: items["rate"], lambda: items.options.update(rate=2.0)),
        "a dict in a tuple": (lambda: inside[0]["rate"], lambda: inside[0].update(rate=2.0)),
        "a deque": (lambda: queue[0], lambda: queue.__setitem__(0, 2.0)),
        "an import": (imported, lambda: setattr(module, "rate", 2.0)),
        "getattr": (lambda: getattr(named, "rate"), lambda: setattr(named, "rate", 2.0)),  # noqa: B009  # the point
    }


@pytest.mark.parametrize("place", readers())
def test_a_change_further_away_is_seen(place):
    read, change = readers()[place]
    step = ff.Step(
        nn.Linear(4, 1),
        lambda model, x: {"a": model(x).sum() * read()},
        {"a": "*"},
        optimizer=ff.optim.sgd(0.0),
        compile={"backend": "aot_eager"},
    )
    state, x = step.init(), torch.randn(3, 4)
    for _ in range(2):
        state, before = step(state, x)
    assert step.traces == 1
    change()
    state, after = step(state, x)
    torch.testing.assert_close(after["a"], 2 * before["a"])
    assert step.traces == 2


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return x * self.scale * self.weight


def test_parameters_and_buffers_of_another_module_are_read_at_every_step():
    teacher = Teacher()
    step = ff.Step(
        nn.Linear(4, 1),
        lambda model, x: {"a": (model(x) * teacher(x).detach()).sum()},
        {"a": "*"},
        optimizer=ff.optim.sgd(0.0),
        compile={"backend": "aot_eager"},
    )
    state, x = step.init(), torch.randn(3, 4)
    state, before = step(state, x)
    for change, factor in (
        (lambda: setattr(teacher, "scale", torch.tensor(3.0)), 3.0),
        (lambda: teacher.scale.mul_(2.0), 6.0),
        (lambda: setattr(teacher, "weight", nn.Parameter(torch.tensor(0.5))), 3.0),
        (lambda: teacher.load_state_dict({"scale": torch.tensor(7.0), "weight": torch.tensor(1.0)}, assign=True), 7.0),
    ):
        change()
        state, after = step(state, x)
        torch.testing.assert_close(after["a"], factor * before["a"])
    assert step.traces == 1


def test_a_tensor_that_was_one_of_the_states_and_is_another_now():
    found = []
    for compile in ({"backend": "aot_eager"}, False):
        model, held = nn.Linear(4, 1), types.SimpleNamespace()
        step = ff.Step(
            model,
            lambda model, x, held=held: {"a": (model(x) * held.target.sum()).sum()},
            {"a": "*"},
            optimizer=ff.optim.sgd(0.1),
            compile=compile,
        )
        state = step.init()
        state = state.replace(params={path: torch.ones_like(tensor) for path, tensor in state.params.items()})
        held.target = state.params["weight"]
        state, _ = step(state, torch.ones(3, 4))
        held.target = torch.ones(1, 4)
        state, metrics = step(state, torch.ones(3, 4))
        found.append(metrics["a"])
    torch.testing.assert_close(*found)


def test_a_variable_that_was_rebound_stays_so_when_a_new_size_is_traced():
    target = torch.ones(4)
    step = ff.Step(
        nn.Linear(4, 4),
        lambda model, x: {"a": (model(x) * target).sum()},
        {"a": "*"},
        optimizer=ff.optim.sgd(0.0),
        compile={"backend": "aot_eager"},
    )
    state = step.init()
    for size, value in ((3, 1.0), (3, 2.0), (5, 3.0), (5, 4.0)):
        target = given = torch.full((4,), value)
        x = torch.randn(size, 4)
        state, metrics = step(state, x)
        assert target is given
        wanted = step.call(state, lambda model, x=x, given=given: (model(x) * given).sum())
        torch.testing.assert_close(metrics["a"], wanted)
    assert step.traces == 2


def test_the_order_of_keys_in_the_batch():
    step = ff.Step(
        nn.Linear(4, 1),
        lambda model, batch: {"a": model(next(iter(batch.values()))).sum()},
        {"a": "*"},
        optimizer=ff.optim.sgd(0.0),
        compile={"backend": "aot_eager"},
    )
    state, x, y = step.init(), torch.randn(3, 4), torch.randn(3, 4)
    for batch in ({"a": x, "b": y}, {"b": y, "a": x}, {"a": x, "b": y}):
        state, metrics = step(state, batch)
        first = next(iter(batch.values()))
        torch.testing.assert_close(metrics["a"], step.call(state, lambda model, first=first: model(first).sum()))
    assert step.traces == 2


def test_the_default_device_holds_in_a_trace():
    def losses(model, x):
        return {"a": model(x).sum()}, {"device": torch.ones(2).device.type}

    step = ff.Step(nn.Linear(4, 1), losses, {"a": "*"}, optimizer=ff.optim.sgd(0.0), compile={"backend": "aot_eager"})
    state = step.init()
    state, metrics = step(state, torch.randn(3, 4))
    assert metrics["device"] == "cpu"
    with torch.device("meta"):
        state, metrics = step(state, torch.randn(3, 4, device="cpu"))
    assert metrics["device"] == "meta"
    assert step.traces == 2


def test_back_and_forth_is_traced_once_each():
    losses, _, _ = closure_over(1.0)
    step = ff.Step(Layer(), losses, {"loss": "*"}, optimizer=ff.optim.sgd(0.1), compile={"backend": "aot_eager"})
    state = step.init()
    for turn in range(6):
        step.module.train(turn % 2 == 0)
        state, _ = step(state, torch.randn(6, 4))
    assert step.traces == 2


def test_a_hook_that_is_removed_is_seen():
    losses, _, _ = closure_over(1.0)
    model = Layer()
    handle = model.norm.register_forward_hook(lambda module, args, out: out * 2)
    step = ff.Step(model, losses, {"loss": "*"}, optimizer=ff.optim.sgd(0.0), compile={"backend": "aot_eager"})
    state = step.init()
    batch = torch.randn(6, 4)
    state, hooked = step(state, batch)
    handle.remove()
    state, plain = step(state, batch)
    assert step.traces == 2
    torch.testing.assert_close(hooked["loss"], 4 * plain["loss"], rtol=1e-12, atol=0)


def test_hooks_elsewhere_cost_no_trace():
    losses, _, _ = closure_over(1.0)
    step = ff.Step(Layer(), losses, {"loss": "*"}, optimizer=ff.optim.sgd(0.1), compile={"backend": "aot_eager"})
    state = step.init()
    for _ in range(3):
        nn.Linear(2, 2).register_forward_hook(lambda *args: None)
        state, _ = step(state, torch.randn(6, 4))
    assert step.traces == 1


def test_absent_losses_and_numbers_in_the_batch():
    def losses(model, batch):
        x, both = batch
        h = model(x)
        return {"a": h.square().mean(), "b": h.sum() if both else None}

    model = nn.Linear(4, 4)
    runs = []
    for compile in ({"backend": "aot_eager"}, False):
        step = ff.Step(model, losses, {"a": "weight", "b": "bias"}, optimizer=ff.optim.adam(0.1), compile=compile)
        state = step.init()
        torch.manual_seed(3)
        for turn in range(6):
            state, metrics = step(state, (torch.randn(5, 4), turn % 2 == 0))
            assert metrics.keys() == ({"a", "b"} if turn % 2 == 0 else {"a"})
        runs.append((step.traces, state))
    assert runs[0][0] == 2
    assert int(runs[0][1].optimizer["bias"]["step"]) == 3  # untouched half of the time
    for path, parameter in runs[1][1].params.items():
        torch.testing.assert_close(runs[0][1].params[path], parameter)


class Slotted:
    """Keeps its attribute where nothing else can see it."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


BOX = {"factor": 1.0}
TENSOR = torch.ones(())


class Reader(nn.Module):
    """Reads from its class, nested objects, globals and a method of its own."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.config = types.SimpleNamespace(inner=types.SimpleNamespace(factor=1.0))
        self.options = [Slotted(1.0)]
        self.one = self.other = torch.ones(())
        self.register_buffer("mask", None)

    def help(self):
        return self.config.inner.factor * BOX["factor"] * TENSOR

    def forward(self, x):
        h = self.linear(x) * self.factor * self.help() * self.options[0].value * self.one
        return h if self.mask is None else h * self.mask


class Doubled(Reader):
    def forward(self, x):
        return super().forward(x) * 2


class Trainer:
    """Losses as a method that calls another one."""

    def __init__(self):
        self.alpha = 1.0

    def weight(self):
        return self.alpha

    def losses(self, model, batch, *, options={"factor": 1.0}):  # noqa: B006  # the point
        return {"loss": (model(batch) * self.weight() * options["factor"]).sum()}


def rebind_the_global_tensor(trainer, model):
    globals()["TENSOR"] = torch.full((), 2.0)


READ = {
    "a helper method": lambda trainer, model: setattr(trainer, "alpha", 2.0),
    "a default": lambda trainer, model: Trainer.losses.__kwdefaults__["options"].update(factor=2.0),
    "a class attribute": lambda trainer, model: setattr(Reader, "factor", 2.0),
    "a nested object": lambda trainer, model: setattr(model.config.inner, "factor", 2.0),
    "a global dict": lambda trainer, model: BOX.update(factor=2.0),
    "a global tensor": rebind_the_global_tensor,
    "one of two places of a tensor": lambda trainer, model: setattr(model, "one", torch.full((), 2.0)),
    "an object in a list": lambda trainer, model: model.options.__setitem__(0, Slotted(2.0)),
    "the class": lambda trainer, model: setattr(model, "__class__", Doubled),
    "a global hook": lambda trainer, model: HANDLES.append(
        nn.modules.module.register_module_forward_hook(
            lambda module, args, out: out * 2 if isinstance(module, Reader) else None
        )
    ),
}
HANDLES = []


@pytest.fixture
def _as_before():
    yield
    Reader.factor = 1.0
    BOX["factor"] = Trainer.losses.__kwdefaults__["options"]["factor"] = 1.0
    globals()["TENSOR"] = torch.ones(())
    while HANDLES:
        HANDLES.pop().remove()


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("change", READ)
def test_what_code_reads_further_away_is_seen(change):
    trainer, model = Trainer(), Reader()
    step = ff.Step(model, trainer.losses, {"loss": "*"}, optimizer=ff.optim.sgd(0.0), compile={"backend": "aot_eager"})
    state, batch = step.init(), torch.randn(3, 4)
    state, before = step(state, batch)
    state, again = step(state, batch)
    torch.testing.assert_close(again["loss"], before["loss"])
    READ[change](trainer, model)
    state, after = step(state, batch)
    torch.testing.assert_close(after["loss"], 2 * before["loss"])
    step(state, batch)
    assert step.traces <= 2


def test_hooks_and_schedules_read_from_closures():
    box = {"rate": 0.0, "factor": 1.0}
    model = nn.Linear(4, 1)
    model.register_forward_hook(lambda module, args, out: out * box["factor"])
    step = ff.Step(
        model,
        lambda model, batch: {"loss": model(batch).sum()},
        {"loss": ff.Route("*", weight=lambda step: box["factor"])},
        optimizer=ff.optim.sgd(lambda step: box["rate"]),
        compile={"backend": "aot_eager"},
    )
    state, batch = step.init(), torch.ones(1, 4)
    state, one = step(state, batch)
    box["factor"] = 2.0
    state, two = step(state, batch)
    torch.testing.assert_close(two["loss"], 2 * one["loss"])
    box["rate"] = 1.0
    before = state.params["bias"].clone()
    state, _ = step(state, batch)
    torch.testing.assert_close(before - state.params["bias"], torch.full((1,), 4.0))


def test_numbers_of_other_kinds_are_others():
    step = ff.Step(
        nn.Linear(4, 1),
        lambda model, batch: {"loss": model(batch[0]).sum() * (2.0 if batch[1] is True else 1.0)},
        {"loss": "*"},
        optimizer=ff.optim.sgd(0.0),
        compile={"backend": "aot_eager"},
    )
    state, x = step.init(), torch.ones(1, 4)
    state, one = step(state, (x, 1))
    state, two = step(state, (x, True))
    torch.testing.assert_close(two["loss"], 2 * one["loss"])


def test_going_back_to_an_earlier_value_finds_the_earlier_graph():
    box, factors = types.SimpleNamespace(mode="one"), {"one": 1.0, "two": 2.0, "three": 3.0}
    step = ff.Step(
        nn.Linear(4, 1),
        lambda model, batch: {"loss": model(batch).square().sum() * 0 + factors[box.mode]},
        {"loss": "*"},
        optimizer=ff.optim.sgd(0.0),
        compile={"backend": "aot_eager"},
    )
    state, x = step.init(), torch.ones(1, 4)
    for box.mode in ("one", "two", "one", "three", "two"):
        state, metrics = step(state, x)
        assert float(metrics["loss"]) == factors[box.mode]
    assert step.traces == 3
