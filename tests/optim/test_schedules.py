"""Schedules against their closed formulas, and as plain values."""

from __future__ import annotations

import json
import math

import pytest
import torch

from funcfreeze.optim import (
    Schedule,
    constant_schedule,
    cosine_decay_schedule,
    dann_schedule,
    linear_schedule,
    warmup_constant_schedule,
    warmup_cosine_decay_schedule,
)


def warmup_cosine(step: float) -> float:
    if step < 10:
        return 0.1 + 0.9 * step / 10
    return 0.2 + 0.8 * (1 + math.cos(math.pi * min((step - 10) / 30, 1))) / 2


CASES = [
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
        assert float(value) == pytest.approx(formula(step), rel=1e-14, abs=1e-15)


@every_schedule
def test_plain_data_and_back(schedule, formula):
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert hash(Schedule.from_dict(schedule.to_dict())) == hash(schedule)
    assert eval(repr(schedule)) == schedule


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
        (lambda: dann_schedule(5) * math.inf, "dann_schedule: scale must be a finite number, got inf"),
        (lambda: Schedule.from_dict({"name": "x", "arguments": {}, "scale": 1}), "no schedule is named 'x'; there are"),
        (lambda: Schedule.from_dict({"name": "x"}), "arguments, scale missing"),
        (
            lambda: Schedule.from_dict({"name": "dann_schedule", "arguments": {"steps": 1}, "scale": 1}),
            "dann_schedule takes total_steps, gamma; got steps",
        ),
    ],
)
def test_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_only_numbers_scale():
    with pytest.raises(TypeError, match="unsupported operand"):
        dann_schedule(5) * dann_schedule(5)
    with pytest.raises(TypeError):
        "x" * dann_schedule(5)
