"""What users' rules and transforms read from Python is seen in a compiled step when it changes; writes are refused."""

from __future__ import annotations

import copy
import functools
import itertools
import types

import pytest
import torch
from torch import nn

import funcfreeze as ff
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
