"""What users' rules and transforms read from Python is seen in a compiled step when it changes; writes are refused."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import itertools
import logging
import pathlib
import sys
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.compile import named
from funcfreeze.merge import Rule

GRAPH = {"backend": "aot_eager"}
FACTOR, TABLE = 1.0, {"factor": 1.0}
TENSOR = torch.tensor(1.0)


def losses(model, x):
    h = model[0](x).tanh()
    return {"a": model[1](h).square().mean(), "b": model[2](h).sin().mean()}


ROUTES = {"a": ["0", "1"], "b": ["0", "2"]}


def pair_of_steps(**options):
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)])
    given = {"optimizer": ff.optim.sgd(0.1), **options}
    return [ff.Step(copy.deepcopy(model), losses, ROUTES, compile=how, **given) for how in (False, GRAPH)]


def assert_equal_steps(eager, compiled, times=1):
    one, other = eager.init(), compiled.init()
    for _ in range(times):
        x = torch.randn(5, 3)
        one, _ = eager(one, x)
        other, _ = compiled(other, x)
        torch.testing.assert_close(dict(other.params), dict(one.params), rtol=1e-9, atol=1e-10)


class Scaled:
    """A rule with settings of all kinds."""

    shared = 1.0

    def __init__(self):
        self.factor, self.listed, self.settings = 1.0, [1.0, 2.0], types.SimpleNamespace(deep={"factor": 1.0})
        self.tensor = torch.tensor(1.0)

    @property
    def doubled(self):
        return 2 * self.factor

    def own(self, meeting):
        return self.doubled * self.listed[0] * self.shared * self.settings.deep["factor"] * self.tensor

    def __call__(self, meeting):
        return self.own(meeting) / meeting.norms


def from_globals(meeting):
    return globally(meeting) * TENSOR / meeting.norms


def globally(meeting):
    return FACTOR * TABLE["factor"]


def closing_over(value):
    box = [value]

    def rule(meeting):
        return value * box[0] / meeting.norms

    def change(other):
        nonlocal value
        value = other

    return rule, box, change


def changes():
    """By name: a rule's function, and what changes what it reads."""
    scaled = [Scaled() for _ in range(6)]
    closure, box, change = closing_over(1.0)
    other_closure, other_box, _ = closing_over(1.0)
    slots = [2.0]
    part = functools.partial(lambda by, meeting: by[0] / meeting.norms, slots)
    found = {
        "attribute": (scaled[0], lambda: setattr(scaled[0], "factor", 3.0)),
        "list entry": (scaled[1], lambda: scaled[1].listed.__setitem__(0, 3.0)),
        "class attribute": (scaled[2], lambda: setattr(Scaled, "shared", 3.0)),
        "nested": (scaled[3], lambda: scaled[3].settings.deep.update(factor=3.0)),
        "tensor in place": (scaled[4], lambda: scaled[4].tensor.fill_(3.0)),
        "another tensor": (scaled[5], lambda: setattr(scaled[5], "tensor", torch.tensor(3.0))),
        "closure": (closure, lambda: change(3.0)),
        "list in a closure": (other_closure, lambda: other_box.__setitem__(0, 3.0)),
        "partial": (part, lambda: slots.__setitem__(0, 3.0)),
        "global": (from_globals, lambda: globals().update(FACTOR=3.0)),
        "entry of a global": (from_globals, lambda: TABLE.update(factor=3.0)),
        "global tensor": (from_globals, lambda: globals().update(TENSOR=torch.tensor(3.0))),
    }
    del box
    return found


@pytest.fixture
def put_back():
    kept = dict(globals()), dict(TABLE), Scaled.shared
    yield
    globals().update(FACTOR=kept[0]["FACTOR"], TENSOR=kept[0]["TENSOR"])
    TABLE.update(kept[1])
    Scaled.shared = kept[2]


@pytest.mark.parametrize("name", [*changes()])
def test_a_change_is_seen(name, put_back):
    decide, change = changes()[name]
    eager, compiled = pair_of_steps(merge=Rule(decide))
    assert_equal_steps(eager, compiled, times=2)
    assert compiled.traces == 1
    change()
    assert_equal_steps(eager, compiled, times=2)
    assert compiled.traces == (1 if name == "tensor in place" else 2)


def test_going_back_costs_nothing():
    decide = Scaled()
    eager, compiled = pair_of_steps(merge=Rule(decide))
    for factor in (1.0, 2.0, 1.0, 2.0):
        decide.factor = factor
        assert_equal_steps(eager, compiled)
    assert compiled.traces == 2


class Counting:
    def __init__(self):
        self.calls, self.seen = 0, []

    def __call__(self, meeting):
        self.calls += 1
        self.seen.append(meeting.values)
        return self.calls / meeting.norms


def test_writes_are_refused_and_taken_back():
    decide = Counting()
    _, compiled = pair_of_steps(merge=Rule(decide))
    with pytest.raises(RuntimeError, match=r"Counting\.calls.*changed while a merge rule .* belongs in its state"):
        compiled(compiled.init(), torch.randn(5, 3))
    assert (decide.calls, decide.seen) == (0, [])
    eager, _ = pair_of_steps(merge=Rule(decide))
    eager(eager.init(), torch.randn(5, 3))
    assert decide.calls == 1


def test_a_counter_that_is_drawn_from():
    numbers = itertools.count(1)
    _, compiled = pair_of_steps(merge=Rule(lambda meeting: next(numbers) / meeting.norms))
    with pytest.raises(RuntimeError, match="numbers in .* changed while a merge rule"):
        compiled(compiled.init(), torch.randn(5, 3))


def scaled_by(settings):
    def update(grads, state, params, *, step=None):
        return {path: None if g is None else -settings["lr"] * g for path, g in grads.items()}, state

    return ff.optim.Transform(lambda params: (), update)


@pytest.mark.parametrize("chained", [False, True], ids=["alone", "chained"])
@pytest.mark.parametrize("halves", [False, True], ids=["whole", "in halves"])
def test_transforms(chained, halves):
    settings = {"lr": 0.1}
    own = scaled_by(settings)
    tx = ff.optim.chain(ff.optim.clip_by_global_norm(1.0), own) if chained else own
    eager, compiled = pair_of_steps(optimizer=tx)
    states = [eager.init(), compiled.init()]
    for lr in (0.1, 0.5, 0.1):
        settings["lr"] = lr
        x = torch.randn(5, 3)
        for index, step in enumerate((eager, compiled)):
            if halves:
                states[index], _ = step.apply_gradients(states[index], step.compute(states[index], x))
            else:
                states[index], _ = step(states[index], x)
        torch.testing.assert_close(dict(states[1].params), dict(states[0].params), rtol=1e-9, atol=1e-10)
    assert compiled.traces == (3 if halves else 2)


def test_a_schedule_of_a_users_own_is_no_reading():
    box = {"lr": 0.1}
    eager, compiled = pair_of_steps(optimizer=ff.optim.sgd(lambda step: box["lr"]))
    assert_equal_steps(eager, compiled)
    box["lr"] = 0.7
    assert_equal_steps(eager, compiled)
    assert compiled.traces == 1


SCRIPT = """
import torch, funcfreeze as ff
from torch import nn
from test_what_rules_read import GRAPH, ROUTES, losses

def slow_norms(meeting):
    kept = meeting.taken(meeting.state["norms"])
    norms = 0.9 * kept + 0.1 * meeting.norms * (1 + meeting.step)
    return norms.mean() / norms, {"norms": meeting.put(meeting.state["norms"], norms)}

rule = ff.merge.Rule(slow_norms, init=lambda losses: {"norms": torch.ones(losses, dtype=torch.float64)})
model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)])
fast = ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1), merge={"0": rule}, compile=GRAPH, donate=False)
state, x = fast.init(), torch.randn(5, 3)
for step in range(12):
    state, metrics = fast(state, x)
    norms = values = metrics["ff/norm/0"]
"""


def test_globals_of_the_names_of_attributes_are_no_readings():
    """A script at module level, with globals `state`, `step` and `norms`, and a rule that names attributes so."""
    names = {"__name__": "a_script_of_the_users"}
    exec(compile(SCRIPT, "script.py", "exec"), names)
    assert names["fast"].traces == 1


class Trainer:
    """A method as a rule, in an object that changes at every step."""

    def __init__(self):
        self.done, self.history, self.factor = 0, [], 1.0

    def rule(self, meeting):
        return self.factor / meeting.norms


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = 1.0

    def forward(self, meeting):
        return self.alpha / meeting.norms


class Slotted:
    __slots__ = ("__hidden", "factor", "unset")

    def __init__(self):
        self.factor, self.__hidden = 1.0, 2.0

    def __call__(self, meeting):
        return self.factor * self.__hidden / meeting.norms


class Loose:
    """Answers to any name, from a dict."""

    def __init__(self, **kept):
        self._kept = kept

    def __getattr__(self, name):
        return self._kept[name]


def test_what_a_rule_does_not_name_may_change():
    trainer = Trainer()
    eager, compiled = pair_of_steps(merge=Rule(trainer.rule))
    for _ in range(4):
        assert_equal_steps(eager, compiled)
        trainer.done += 1
        trainer.history.append(torch.ones(2))
        trainer.state = object()
    assert compiled.traces == 1
    trainer.factor = 2.0
    assert_equal_steps(eager, compiled)
    assert compiled.traces == 2


def inner_of(settings):
    inner = Rule(lambda meeting: settings["factor"] / meeting.norms)
    return lambda meeting: inner.decide(meeting)


def with_an_attribute(meeting):
    return with_an_attribute.factor / meeting.norms


def importing(meeting):
    import a_config_of_the_users

    return a_config_of_the_users.factor / meeting.norms


def test_more_that_is_seen(monkeypatch, tmp_path):
    net, slotted, loose, settings = Net(), Slotted(), Loose(factor=1.0), {"factor": 1.0}
    array = np.ones(1)
    with_an_attribute.factor = 1.0
    config = types.ModuleType("a_config_of_the_users")
    config.factor = 1.0
    monkeypatch.setitem(sys.modules, "a_config_of_the_users", config)
    by_name = types.SimpleNamespace(factor=1.0)
    (tmp_path / "trace.py").write_text("factor = 1.0\n\ndef rule(meeting):\n    return factor / meeting.norms\n")
    monkeypatch.syspath_prepend(tmp_path)  # a file of the user's with the name of one of Python's
    monkeypatch.delitem(sys.modules, "trace", raising=False)
    named._is_a_package_of_the_users.cache_clear()
    trace = importlib.import_module("trace")
    for decide, change in [
        (net, lambda: setattr(net, "alpha", 3.0)),
        (net.forward, lambda: setattr(net, "alpha", 4.0)),
        (slotted, lambda: setattr(slotted, "factor", 3.0)),
        (slotted, lambda: setattr(slotted, "_Slotted__hidden", 5.0)),
        (lambda meeting: loose.factor / meeting.norms, lambda: loose._kept.update(factor=3.0)),
        (inner_of(settings), lambda: settings.update(factor=3.0)),
        (with_an_attribute, lambda: setattr(with_an_attribute, "factor", 3.0)),
        (importing, lambda: setattr(config, "factor", 3.0)),
        (lambda meeting: getattr(by_name, "factor", 9.0) / meeting.norms, lambda: setattr(by_name, "factor", 3.0)),
        (trace.rule, lambda: setattr(trace, "factor", 3.0)),
        (lambda meeting: float(array[0]) / meeting.norms, lambda: array.__setitem__(0, 3.0)),
    ]:
        eager, compiled = pair_of_steps(merge=Rule(decide))
        assert_equal_steps(eager, compiled)
        change()
        assert_equal_steps(eager, compiled, times=2)
        assert compiled.traces == 2, decide


class Odd:
    def __init__(self):
        self.factor = 1.0
        self.path, self.lock, self.log = pathlib.Path("x"), threading.Lock(), logging.getLogger("fresh")
        self.dead = weakref.proxy(Trainer())
        self.big = {number: number for number in range(5_000)}
        self.loop = [1.0]
        self.loop.append(self.loop)
        self.names = {Loose: 1, 2.5: "x"}

    def __call__(self, meeting):
        if len(meeting.losses) > 9:
            self.log.warning("%s %s %s %s", self.path, self.lock, self.dead, self.names)
            LOG.warning("never")
        return self.factor * self.loop[0] * self.big[1] / meeting.norms


LOG = logging.getLogger("a fresh one")


def test_odd_objects_are_no_matter():
    decide = Odd()
    eager, compiled = pair_of_steps(merge=Rule(decide))
    assert_equal_steps(eager, compiled, times=2)
    decide.factor = 2.0
    assert_equal_steps(eager, compiled)
    assert compiled.traces == 2


@functools.lru_cache
def ones_of(number):
    return torch.ones(number)


def test_a_cache_of_a_helper_is_not_left_with_what_only_stands_for_tensors():
    decide = Rule(lambda meeting: ones_of(len(meeting.losses)) * 2.0)
    ones_of.cache_clear()
    _, compiled = pair_of_steps(merge=decide)
    with pytest.raises(RuntimeError, match="the cache of ones_of changed while a merge rule"):
        compiled(compiled.init(), torch.randn(5, 3))
    assert type(ones_of(2)) is torch.Tensor
    eager, compiled = pair_of_steps(merge=decide)
    assert_equal_steps(eager, compiled)


class Writing:
    __slots__ = ("__dict__", "calls")

    def __init__(self):
        self.calls = 0

    def __call__(self, meeting):
        global MADE
        self.calls += 1
        self.last = meeting.norms
        MADE = meeting.norms
        return 1 / meeting.norms


def test_all_that_was_written_is_taken_back():
    decide = Writing()
    _, compiled = pair_of_steps(merge=Rule(decide))
    with pytest.raises(RuntimeError, match=r"(?s)MADE.*Writing\.calls.*Writing\.last changed"):
        compiled(compiled.init(), torch.randn(5, 3))
    assert decide.calls == 0
    assert vars(decide) == {}
    assert "MADE" not in globals()


def test_tensors_are_not_kept_alive():
    holder = Scaled()
    _, compiled = pair_of_steps(merge=Rule(holder))
    compiled(compiled.init(), torch.randn(5, 3))
    seen = weakref.ref(holder.tensor)
    holder.tensor = torch.tensor(2.0)
    torch._dynamo.reset()
    compiled(compiled.init(), torch.randn(5, 3))
    assert compiled.traces == 2
    del compiled
    gc.collect()
    assert seen() is None
