"""Sums and products of schedules: their numbers, against Python's own arithmetic, and that they stay plain data."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random

import pytest
import torch

from funcfreeze.schedules import Schedule, constant, cosine, dann, join, linear, polynomial, table

LEAVES = [
    (linear(0.3, -0.8, 7), lambda step: 0.3 - 1.1 * min(step / 7, 1)),
    (cosine(1.5, 0.5, 11), lambda step: 0.5 + (1 + math.cos(math.pi * min(step / 11, 1))) / 2),
    (dann(9, gamma=3), lambda step: 2 / (1 + math.exp(-3 * min(step / 9, 1))) - 1),
    (table([0.5, -1.5, 2.25]), lambda step: [0.5, -1.5, 2.25][min(step, 2)]),
    (constant(-0.75), lambda step: -0.75),
]
NUMBERS = [-2, -1, -0.3, 0, 0.5, 1, 3]


def expression(draw: random.Random, depth: int):
    """A schedule built by arithmetic, and what it is."""
    if depth == 0:
        return draw.choice(LEAVES)
    one, f = expression(draw, depth - 1)
    other, g = expression(draw, draw.randrange(depth))
    number = draw.choice(NUMBERS)
    nonzero = number or 4
    return draw.choice(
        [
            (one + other, lambda step: f(step) + g(step)),
            (one - other, lambda step: f(step) - g(step)),
            (other - one, lambda step: g(step) - f(step)),
            (one * other, lambda step: f(step) * g(step)),
            (number + one, lambda step: number + f(step)),
            (one + number, lambda step: f(step) + number),
            (number - one, lambda step: number - f(step)),
            (one - number, lambda step: f(step) - number),
            (number * one, lambda step: number * f(step)),
            (one * number, lambda step: f(step) * number),
            (one / nonzero, lambda step: f(step) / nonzero),
            (-one, lambda step: -f(step)),
            (join([one, other], [4]), lambda step: f(step) if step < 4 else g(step - 4)),
        ]
    )


@pytest.mark.parametrize("trial", range(60))
def test_any_expression(trial, seed):
    schedule, formula = expression(random.Random(1000 * seed + trial), 1 + trial % 5)
    for step in range(14):
        for given in (step, torch.tensor(step)):
            value = schedule(given)
            assert (value.shape, value.dtype) == ((), torch.float64)
            assert float(value) == pytest.approx(formula(step), rel=1e-12, abs=1e-12)
    assert eval(repr(schedule)) == schedule
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert copy.deepcopy(schedule) == pickle.loads(pickle.dumps(schedule)) == schedule
    assert schedule != schedule + 1
    assert schedule != LEAVES[0][0] + schedule


s, t = linear(0, 1, 10), cosine(1, 0, 10)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (1 - s, "1 - linear(a=0, b=1, steps=10)"),
        (-s, "-linear(a=0, b=1, steps=10)"),
        (-0.3 * s, "-0.3 * linear(a=0, b=1, steps=10)"),
        (s / 2, "0.5 * linear(a=0, b=1, steps=10)"),
        (s + t, "linear(a=0, b=1, steps=10) + cosine(a=1, b=0, steps=10)"),
        (s - 0.5 * t, "linear(a=0, b=1, steps=10) - 0.5 * cosine(a=1, b=0, steps=10)"),
        (s - 1, "linear(a=0, b=1, steps=10) - 1"),
        (2 * (1 - s), "2.0 * (1 - linear(a=0, b=1, steps=10))"),
        ((1 - s) * t, "(1 - linear(a=0, b=1, steps=10)) * cosine(a=1, b=0, steps=10)"),
        (s * (2 * t), "linear(a=0, b=1, steps=10) * (2.0 * cosine(a=1, b=0, steps=10))"),
        (1 - (1 - s), "1 - (1 - linear(a=0, b=1, steps=10))"),
        (sum([s, t]), "0 + linear(a=0, b=1, steps=10) + cosine(a=1, b=0, steps=10)"),
    ],
)
def test_it_prints_as_it_was_written(schedule, text):
    assert repr(schedule) == text


def test_equal_by_value():
    assert 1 - linear(0, 1, 10) == 1.0 - linear(0.0, 1, 10)
    assert 1 - s != s - 1
    assert s * t == linear(0, 1, 10) * cosine(1, 0, 10)
    assert len({s + t, linear(0, 1, 10) + t, s * t}) == 2
    assert s * 2 / 2 == s == -1 * -s


def test_what_is_made_of_schedules_is_frozen():
    with pytest.raises(AttributeError):
        (s + t).scale = 2.0
    parts = [s, 0.5]
    joined = join(parts, [3])
    parts[0] = t
    assert joined == join([s, 0.5], [3])


@pytest.mark.parametrize("number", [True, False, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("combine", "done"),
    [
        (lambda x: s + x, "added to"),
        (lambda x: x + s, "added to"),
        (lambda x: s - x, "subtracted from"),
        (lambda x: x - s, "subtracted from"),
        (lambda x: s * x, "multiplied by"),
        (lambda x: x * s, "multiplied by"),
    ],
)
def test_what_is_no_finite_number(combine, done, number):
    with pytest.raises(ValueError, match=f"^schedules are {done} finite numbers and schedules, got {number}$"):
        combine(number)


def test_division():
    for wrong in (0, 0.0):
        with pytest.raises(ValueError, match="^schedules are divided by numbers other than 0, got 0"):
            s / wrong
    for wrong in (True, math.inf, s):
        with pytest.raises(ValueError, match="^schedules are divided by finite numbers, got"):
            s / wrong
    with pytest.raises(TypeError, match="unsupported operand"):
        1 / s


def test_a_product_of_numbers_that_is_none():
    with pytest.raises(ValueError, match="linear: scale must be a finite number, got inf"):
        1e308 * (1e308 * s)


@pytest.mark.parametrize("other", [torch.tensor(2.0), lambda step: 2.0, "x", None, [1.0], polynomial])
@pytest.mark.parametrize("combine", [lambda x: s * x, lambda x: x * s, lambda x: s + x, lambda x: x - s])
def test_what_is_no_plain_data(combine, other):
    with pytest.raises(
        TypeError, match=r"schedules are (added|subtracted|multiplied) .* got .*; what is no plain data"
    ):
        combine(other)
