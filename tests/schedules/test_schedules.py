"""Schedules against their closed formulas, and as plain values."""

from __future__ import annotations

import copy
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

import funcfreeze as ff
from funcfreeze.optim import (
    constant_schedule,
    cosine_decay_schedule,
    dann_schedule,
    linear_schedule,
    warmup_constant_schedule,
    warmup_cosine_decay_schedule,
)
from funcfreeze.schedules import (
    Schedule,
    constant,
    cosine,
    cosine_restarts,
    cosine_wave,
    dann,
    exponential,
    join,
    linear,
    piecewise,
    polynomial,
    staircase,
    table,
    triangle_wave,
)


def warmup_cosine(step: float) -> float:
    if step < 10:
        return 0.1 + 0.9 * step / 10
    return 0.2 + 0.8 * (1 + math.cos(math.pi * min((step - 10) / 30, 1))) / 2


def half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def restarts(step: int, first: int, growth: int) -> float:
    """Period by period."""
    while step >= first:
        step, first = step - first, first * growth
    return 0.1 + 0.9 * half_cosine(step / first)


CASES = [
    (constant(0.3), lambda step: 0.3),
    (linear(1, 0.2, 20), lambda step: 1.0 - 0.8 * min(step / 20, 1)),
    (cosine(0.2, 2.0, 20), lambda step: 2.0 - 1.8 * half_cosine(min(step / 20, 1))),
    (cosine_wave(1.0, 0.1, 10), lambda step: 0.1 + 0.9 * half_cosine(step / 10)),
    (cosine_restarts(1.0, 0.1, 9), lambda step: restarts(step, 9, 1)),
    (cosine_restarts(1.0, 0.1, 5, 2), lambda step: restarts(step, 5, 2)),
    (cosine_restarts(1.0, 0.1, 1, growth=3), lambda step: restarts(step, 1, 3)),
    (exponential(0.4, 0.99, 2), lambda step: 0.4 * 0.99 ** (step / 2)),
    (exponential(3, 0), lambda step: 3 * 0**step),
    (staircase(0.4, 0.9, 10), lambda step: 0.4 * 0.9 ** (step // 10)),
    (polynomial(1.0, 0.1, 20, power=2.5), lambda step: 0.1 + 0.9 * (1 - min(step / 20, 1)) ** 2.5),
    (polynomial(1, 0, 35), lambda step: 1 - min(step / 35, 1)),
    (piecewise([1, 0.5, 2], [10, 20.5]), lambda step: 1 if step < 10 else 0.5 if step < 20.5 else 2),
    (piecewise([0.7], []), lambda step: 0.7),
    (triangle_wave(1, 3, 4, 6), lambda step: 1 + 2 * (step % 10 / 4 if step % 10 <= 4 else (10 - step % 10) / 6)),
    (triangle_wave(1, 3, 4, 0), lambda step: 1 + 2 * (step % 4) / 4),
    (table([0.5, 1, -3]), lambda step: [0.5, 1, -3][min(step, 2)]),
    (dann(30), lambda step: 2 / (1 + math.exp(-10 * min(step / 30, 1))) - 1),
    (
        join([linear(0, 1, 10), cosine(1, 0.5, 9), 0.25], (10, 19)),
        lambda step: step / 10 if step < 10 else 0.5 + 0.5 * half_cosine((step - 10) / 9) if step < 19 else 0.25,
    ),
    (join([table([1, 2]), table([3, 4])], [10]), lambda step: (1, 2)[step > 0] if step < 10 else (3, 4)[step > 10]),
    (constant_schedule(0.3), lambda step: 0.3),
    (linear_schedule(1.0, 0.2, 20), lambda step: 1.0 - 0.8 * min(step / 20, 1)),
    (cosine_decay_schedule(2.0, 20, 0.1), lambda step: 0.2 + 1.8 * (1 + math.cos(math.pi * min(step / 20, 1))) / 2),
    (warmup_constant_schedule(0.1, 0.7, 10), lambda step: 0.1 + 0.6 * min(step / 10, 1)),
    (warmup_constant_schedule(0.1, 0.7, 0), lambda step: 0.7),
    (warmup_cosine_decay_schedule(0.1, 1.0, 10, 40, 0.2), warmup_cosine),
    (warmup_cosine_decay_schedule(0.5, 1.0, 0, 20), lambda step: (1 + math.cos(math.pi * min(step / 20, 1))) / 2),
    (dann_schedule(30), lambda step: 2 / (1 + math.exp(-10 * min(step / 30, 1))) - 1),
    (-0.3 * dann_schedule(30, gamma=5), lambda step: -0.3 * (2 / (1 + math.exp(-5 * min(step / 30, 1))) - 1)),
]
every_schedule = pytest.mark.parametrize(
    ("schedule", "formula"), CASES, ids=[str(index) for index in range(len(CASES))]
)


@every_schedule
@pytest.mark.parametrize("step", [0, 1, 9, 10, 11, 19, 20, 35, 40, 1000])
def test_values(schedule, formula, step):
    for given in (step, torch.tensor(step), torch.tensor(step, dtype=torch.int32)):
        value = schedule(given)
        assert (value.shape, value.dtype) == ((), torch.float64)
        assert float(value) == pytest.approx(formula(step), rel=1e-14, abs=2e-15)


@every_schedule
def test_several_steps_at_once_for_a_plot(schedule, formula):
    expected = torch.tensor([float(formula(step)) for step in range(50)], dtype=torch.float64)
    torch.testing.assert_close(schedule(torch.arange(50)), expected, rtol=1e-14, atol=2e-15)


@every_schedule
def test_on_the_steps_own_device(schedule, formula):
    """A tensor on another one would be an error here."""
    for _ in range(2):
        value = schedule(torch.tensor(3, device="meta"))
        assert (value.device.type, value.shape, value.dtype) == ("meta", (), torch.float64)
        assert float(schedule(3)) == pytest.approx(formula(3), rel=1e-14, abs=2e-15)


def test_restarts_begin_exactly_where_they_do():
    """By a logarithm, whose last digits may be wrong just there."""
    for first, growth in [(1, 2), (1, 3), (3, 3), (7, 5), (10, 10)]:
        start, length = 0, first
        while start < 10**12:
            schedule = cosine_restarts(1.0, 0.0, first, growth)
            assert float(schedule(start)) == 1.0
            assert float(schedule(start - 1 if start else 0)) == pytest.approx(
                half_cosine((length // growth - 1) / (length // growth)) if start else 1.0, abs=1e-9
            )
            start, length = start + length, length * growth


def test_ff_schedules_is_there():
    assert ff.schedules.cosine is cosine
    assert ff.schedules.Schedule is ff.optim.Schedule
    assert all(callable(getattr(ff.schedules, name)) for name in ff.schedules.__all__)


@every_schedule
def test_plain_data_and_back(schedule, formula):
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert hash(Schedule.from_dict(schedule.to_dict())) == hash(schedule)
    assert eval(repr(schedule)) == schedule
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert copied == schedule
        assert float(copied(7)) == float(schedule(7))


def test_values_compare_by_what_they_are():
    assert dann_schedule(800) == dann_schedule(800.0, gamma=10)
    assert dann_schedule(800) != dann_schedule(801)
    assert dann_schedule(800) != -dann_schedule(800)
    assert -(0.5 * dann_schedule(800)) * 2 == -dann_schedule(800)
    assert repr(-0.3 * dann_schedule(800)) == "-0.3 * dann_schedule(total_steps=800, gamma=10.0)"
    assert repr(constant_schedule(1)) == "constant_schedule(value=1)"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: linear_schedule(0, 1, 0), "linear_schedule: transition_steps must be more than 0, got 0"),
        (lambda: cosine_decay_schedule(1, -5), "cosine_decay_schedule: decay_steps must be more than 0, got -5"),
        (lambda: dann_schedule(0), "dann_schedule: total_steps must be more than 0, got 0"),
        (
            lambda: warmup_constant_schedule(0, 1, -1),
            "warmup_constant_schedule: warmup_steps must be at least 0, got -1",
        ),
        (lambda: warmup_cosine_decay_schedule(0, 1, 9, 9), "more than warmup_steps, got decay_steps=9, warmup_steps=9"),
        (lambda: constant_schedule(math.nan), "constant_schedule: value must be a finite number, got nan"),
        (
            lambda: constant_schedule(torch.ones(())),
            r"constant_schedule: value must be a finite number, got tensor\(1.\)",
        ),
        (lambda: dann_schedule(5) * math.inf, "schedules are multiplied by finite numbers and schedules, got inf"),
        (lambda: Schedule.from_dict({"name": "x", "arguments": {}, "scale": 1}), "no schedule is named 'x'; there are"),
        (lambda: Schedule.from_dict({"name": "x"}), "arguments, scale missing"),
        (lambda: cosine(1, 0, -5), "cosine: steps must be more than 0, got -5"),
        (lambda: cosine(1, 0, "5"), "cosine: steps must be a finite number, got '5'"),
        (lambda: constant(np.bool_(True)), r"constant: value must be a finite number, got np.True_"),
        (
            lambda: cosine_restarts(1, 0, 5, 1.5),
            "growth must be a whole number of at least 1, got 1.5",
        ),
        (lambda: exponential(1, -0.5), "exponential: rate must be at least 0, got -0.5"),
        (lambda: triangle_wave(0, 1, 0, 3), "triangle_wave: up must be more than 0, got 0"),
        (lambda: piecewise([1, 2], [3, 4]), "piecewise: values are one more than boundaries, got 2 and 2"),
        (lambda: piecewise([1, 2, 3], [4, 4]), r"piecewise: boundaries must rise, got \[4, 4\]"),
        (lambda: piecewise([1, None], [4]), r"piecewise: values\[1\] must be a finite number, got None"),
        (lambda: table([]), r"table: values must have at least one number, got \[\]"),
        (lambda: table([1.0, math.nan]), r"table: values\[1\] must be a finite number, got nan"),
        (lambda: table("123"), "table: values must be a list of numbers, got '123'"),
        (lambda: join([linear(0, 1, 5)], [5]), "join: schedules are one more than boundaries, got 1 and 1"),
        (lambda: join(linear(0, 1, 5), []), "join: schedules must be a list of schedules, got linear"),
        (lambda: join([linear(0, 1, 5), abs], [5]), r"join: schedules\[1\] must be a schedule, got <built-in"),
        (lambda: join([linear(0, 1, 5), True], [5]), "constant: value must be a finite number, got True"),
        (
            lambda: Schedule.from_dict({"name": "add", "arguments": {"left": 1, "right": 2}, "scale": 1}),
            "add: one of both is a schedule",
        ),
        (
            lambda: Schedule.from_dict({"name": "dann_schedule", "arguments": {"steps": 1}, "scale": 1}),
            "dann_schedule takes total_steps, gamma; got steps",
        ),
    ],
)
def test_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_everything_that_is_wrong_at_once():
    text = "linear: a must be a finite number, got True; b must be a finite number, got inf; steps must be more than 0"
    with pytest.raises(ValueError, match=f"^{text}, got 0$"):
        linear(True, math.inf, 0)


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), Fraction(1, 2)])
def test_numbers_of_others_become_pythons_own(number):
    for schedule in (constant(number), number * constant(1), constant(1) * number, number + constant(0)):
        assert eval(repr(schedule)) == schedule
        assert json.loads(json.dumps(schedule.to_dict())) == schedule.to_dict()
        assert float(schedule(3)) == 0.5
    assert repr(linear(np.int64(0), 1, np.int32(7))) == "linear(a=0, b=1, steps=7)"


def test_dicts_of_earlier_versions_are_read():
    """As 0.1.0 wrote them."""
    for data, schedule in [
        (
            {"name": "dann_schedule", "arguments": {"total_steps": 800, "gamma": 10.0}, "scale": -0.3},
            -0.3 * dann_schedule(800),
        ),
        (
            {
                "name": "warmup_cosine_decay_schedule",
                "arguments": {
                    "init_value": 0.0,
                    "peak_value": 1.0,
                    "warmup_steps": 10,
                    "decay_steps": 30,
                    "end_value": 0.0,
                },
                "scale": 1.0,
            },
            warmup_cosine_decay_schedule(0.0, 1.0, 10, 30),
        ),
    ]:
        assert Schedule.from_dict(data) == schedule
        assert schedule.to_dict() == data


def test_a_plan_of_an_earlier_version_is_read():
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(1, 1, bias=False)})
    plan = ff.plan(model, {"a": {"encoder": -0.3 * dann_schedule(800)}})
    weight = {"schedule": {"name": "dann_schedule", "arguments": {"total_steps": 800, "gamma": 10.0}, "scale": -0.3}}
    assert plan.to_dict()["parameters"][0]["weights"] == {"a": [weight]}
    assert ff.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
