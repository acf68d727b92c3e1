"""SymPy's side by itself: every function torch is given, and the scale of errors."""

from __future__ import annotations

import itertools
import math

import pytest
import sympy
import torch

from funcfreeze.proof.equations import verify_equations
from funcfreeze.proof.symbolic.exact import Calculus, Exact
from funcfreeze.proof.symbolic.operations import evaluate, problems, shortened, supported
from funcfreeze.proof.symbolic.read import read_equations

x, y = sympy.symbols("x y")

ONE_ARGUMENT = [
    sympy.exp, sympy.log, sympy.sin, sympy.cos, sympy.tan, sympy.asin, sympy.acos, sympy.atan, sympy.sinh, sympy.cosh,
    sympy.tanh, sympy.asinh, sympy.atanh, sympy.erf, sympy.erfc, sympy.loggamma, sympy.Abs, sympy.sign,
]  # fmt: skip


@pytest.mark.parametrize("function", ONE_ARGUMENT, ids=str)
def test_functions_of_one_argument(function) -> None:
    assert verify_equations({"L": function(x) * y}, {"L": "*"}, {"x": 0.6, "y": -2}).ok


@pytest.mark.parametrize(
    "expression",
    [
        sympy.acosh(x + 2),
        sympy.atan2(x, y),
        sympy.Max(x, y, 0.5) * x,
        sympy.Min(x, y, 0.5) * x,
        x**3 / (1 + y**2),
        (x + 3) ** y,
        sympy.pi**x + 2**y,
        sympy.sqrt(x) + x ** sympy.Rational(-2, 3) + x**0.5,
        sympy.log(x, 2) + sympy.E**y,
        sympy.zeta(3) * x + sympy.gamma(sympy.Rational(1, 3)) * y,  # constants may be anything
        sympy.Mul(0, x, evaluate=False) + sympy.Pow(x, 0, evaluate=False) + y,
    ],
    ids=itertools.count(),  # what SymPy prints of a sum differs from process to process
)
def test_other_forms(expression) -> None:
    report = verify_equations({"L": expression}, {"L": "*"}, {"x": 0.6, "y": -2})
    assert report.ok, str(report)


def test_every_supported_function_is_tested_here() -> None:
    tested = {function.__name__ for function in ONE_ARGUMENT} | {"acosh", "atan2", "Max", "Min", "Pow", "Mul", "Add"}
    assert set(supported().split(", ")) == tested


def test_torch_evaluates_what_was_written_in_float64() -> None:
    seen = evaluate(sympy.Rational(1, 3) + x, {"x": torch.tensor(0.0, dtype=torch.float64)})
    assert seen.dtype == torch.float64
    assert seen.item() == 1 / 3
    assert list(problems(sympy.Rational(1, 3) + x)) == []


def test_derivatives_have_many_digits() -> None:
    calculus = Calculus(read_equations({"L": sympy.exp(x)}, {"x": 1}, {}))
    ((number, _),) = calculus.gradient("L", "x")
    assert str(number) == "2.718281828459045235360287471352662497757"
    assert calculus.problems == []


def test_the_point_is_the_float64_number_not_its_decimal() -> None:
    (slope,) = Calculus(read_equations({"L": x**2 / 2}, {"x": 0.1}, {})).gradient("L", "x")
    assert slope.error(0.1) == 0.0
    assert slope.number != sympy.Rational(1, 10)


def test_scale_is_terms_plus_what_the_point_could_move() -> None:
    (slope,) = Calculus(read_equations({"L": x**3 - x * y}, {"x": 2, "y": 11}, {})).gradient("L", "x")
    assert float(slope.number) == 3 * 4 - 11
    assert float(slope.scale) == (12 + 11) + (2 * 12 + 11)


def test_error_is_absolute_where_there_is_no_scale_and_infinite_for_no_number() -> None:
    zero = Exact(sympy.S.Zero, sympy.S.Zero)
    assert zero.error(0.25) == 0.25
    assert zero.error(math.nan) == zero.error(math.inf) == math.inf


def test_long_formulas_are_cut() -> None:
    assert shortened(sum(sympy.symbols("t:99"))).endswith("...")
    assert len(shortened(sum(sympy.symbols("t:99")))) == 100
