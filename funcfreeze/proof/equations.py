"""Equations, differentiated by SymPy and routed by the law, against what every engine computes: `verify_equations`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from funcfreeze import gradients
from funcfreeze.declare.plan import Plan, Row, raise_problems, resolve_plan
from funcfreeze.declare.routes import weight_value
from funcfreeze.declare.selectors import Leaf, closest
from funcfreeze.loops.differentiate import grad_and_value
from funcfreeze.proof.report import Check, Report

if TYPE_CHECKING:
    from funcfreeze.proof.symbolic.exact import Calculus, Exact
    from funcfreeze.proof.symbolic.read import Equation, Equations

TOLERANCE = 1e-12
"""The largest relative error that passes: float64's rounding of some thousand operations."""


def verify_equations(losses: object, routes: object, at: object, *, cotangents: object = None) -> Report:
    """Compare every engine with derivatives taken by SymPy: is the procedure right, on equations one can check by hand?

    SymPy differentiates every loss, the law routes and weights the derivatives, g[p] = Σₖ w[k,p]·∂Lₖ/∂p, and they are
    evaluated with 40 digits. Each engine computes the same by autograd in float64, from the same expressions.

    A loss is an expression over symbols. A symbol whose value is a list is a vector: an expression over whole vectors
    works entry by entry, as torch does, and is no scalar; it needs an external gradient v in `cotangents`, as
    `Tensor.backward(gradient=v)` does, and stands for Σᵢ vᵢ·Lᵢ. Entries are written with `sympy.IndexedBase`: with
    `w = IndexedBase("w")`, `w[0] * w[1]` is a scalar. A list of scalar expressions is a vector too.

    A parameter is touched by a loss that is routed to it and has it among its `free_symbols`, even where the derivative
    is zero (of `sign(x)`, say). SymPy drops x from `x - x` and `0*x` as they are written, so there is no such symbol,
    neither for the law nor for torch. An untouched parameter must come out as None, not as zero.

    Symbols stand for real numbers, and are known by their names. At a kink (|x| at 0) there is no derivative, only what
    SymPy and torch each say of it: choose another point.

    Args:
        losses: loss name -> expression, or a list of them.
        routes: loss name -> which symbols it may update, as everywhere (see `Route`), or a `Plan`.
        at: symbol (or its name) -> a number or a list of numbers, the float64 nearest to each. Every symbol needs one;
            a value for a symbol that no equation holds is a mistake unless a route names it: then it must come out
            untouched.
        cotangents: loss name -> the external gradient of one that is no scalar.

    Returns:
        A report with a check for each loss's value and each parameter, by each engine: the losses that reach it, the
        derivatives as formulas, the expected gradient. Errors are relative to the absolute terms of the derivative and
        to how far relative changes of the point would move it, so that cancellation does not count as a mistake.

    Raises:
        RouteError: everything that is wrong with the equations and the point, then with the routes, then every value
            and derivative that is no finite real number there.
        TypeError: a weight is a schedule: there is no step here.

    >>> import sympy
    >>> a, b, c, x = sympy.symbols("a b c x")
    >>> y, z = b + a * x, c + a * x
    >>> report = verify_equations(
    ...     {"on_y": 7 - y, "on_z": 7 - z}, {"on_y": "b", "on_z": ["a", "c"]}, {"a": 1, "b": 2, "c": 3, "x": 5}
    ... )
    >>> report.ok, len(report.checks)
    (True, 18)
    >>> for check in report.checks[6:18:3]:
    ...     print(check.subject, check.losses, check.detail)
    a (routed) ('on_z',) ∂on_z/∂a = -x; gradient -5
    b (routed) ('on_y',) ∂on_y/∂b = -1; gradient -1
    c (routed) ('on_z',) ∂on_z/∂c = -1; gradient -1
    x (routed) () untouched: no loss may update it
    >>> verify_equations({"L": a * b}, {"L": "a"}, {"a": 1})
    Traceback (most recent call last):
        ...
    funcfreeze.declare.selectors.RouteError: loss 'L' = a*b holds b, and `at` has no value for it; there are 'a'
    """
    # not at the top: SymPy comes with torch, which does not import it before it compiles; it takes a third of a second
    from funcfreeze.proof.symbolic.exact import Calculus
    from funcfreeze.proof.symbolic.read import read_equations

    equations = read_equations(losses, at, {} if cotangents is None else cotangents)
    tensors = equations.tensors()
    plan = resolve_plan(routes, [Leaf((name,), tensor) for name, tensor in tensors.items()])
    raise_problems([*_name_problems(equations, plan), *_idle_problems(equations, plan)])
    calculus = Calculus(equations)
    exact_values = {name: calculus.value(name) for name in equations.losses}
    expected = [_expectation(row, equations, calculus) for row in plan.rows]
    raise_problems(calculus.problems)
    computed = {
        engine: grad_and_value(equations.evaluate, routes, engine=engine)(tensors) for engine in gradients.ENGINES
    }
    values = [
        _check_value(f"value of {name} ({engine})", equation, exact_values[name], found.get(name))
        for name, equation in equations.losses.items()
        for engine, (_, found) in computed.items()
    ]
    parameters = [
        target.check(engine, grads[target.parameter]) for target in expected for engine, (grads, _) in computed.items()
    ]
    facts = {"dtype": "float64", "at": {name: _plain(value) for name, value in equations.point.items()}}
    external = {name: _plain(one.external) for name, one in equations.losses.items() if one.length is not None}
    return Report(
        f"{', '.join(computed)} against SymPy's derivatives",
        (*values, *parameters),
        {**facts, "cotangents": external} if external else facts,
    )


def _name_problems(equations: Equations, plan: Plan) -> Iterator[str]:
    for name in equations.losses:
        if name not in plan.losses:
            yield f"loss {name!r} has an equation and no route{closest(name, plan.losses)}"
    for name in plan.losses:
        if name not in equations.losses:
            yield f"loss {name!r} has a route and no equation{closest(name, equations.losses)}"


def _idle_problems(equations: Equations, plan: Plan) -> Iterator[str]:
    """Values for symbols that are in no equation and in no route: most likely misspelt."""
    for row in plan.rows:
        held = any(equation.depends_on(row.path) for equation in equations.losses.values())
        if not held and not row.weights:
            others = (name for name in equations.point if name != row.path)
            yield f"`at` has a value for {row.path}, which is in no equation and no route{closest(row.path, others)}"


@dataclass(frozen=True)
class _Expectation:
    """What the law says of one parameter: the losses that touch it, by which derivatives, and its gradient."""

    parameter: str
    shape: tuple[int, ...]
    losses: tuple[str, ...]
    reason: str
    gradient: tuple[Exact, ...] | None

    def check(self, engine: str, seen: Tensor | None) -> Check:
        error, problem = self._compare(seen)
        return Check(f"{self.parameter} ({engine})", self.losses, error, TOLERANCE, f"{self.reason}{problem}")

    def _compare(self, seen: Tensor | None) -> tuple[float, str]:
        if self.gradient is None:
            return (0.0, "") if seen is None else (math.inf, f"; expected None, got {_shown(seen)}")
        expected = _numbers([float(entry.number) for entry in self.gradient], self.shape)
        if seen is None:
            return math.inf, f"; expected {expected}, got None"
        if seen.shape != self.shape or seen.dtype != torch.float64:
            return math.inf, (
                f"; expected {expected} of shape {self.shape} and dtype torch.float64, "
                f"got {_shown(seen)} of shape {tuple(seen.shape)} and dtype {seen.dtype}"
            )
        numbers = seen.flatten().tolist()
        error = max(entry.error(number) for entry, number in zip(self.gradient, numbers, strict=True))
        return error, f"; gradient {expected}" if error <= TOLERANCE else f"; expected {expected}, got {_shown(seen)}"


def _expectation(row: Row, equations: Equations, calculus: Calculus) -> _Expectation:
    """The law, g[p] = Σₖ w[k,p]·∂Lₖ/∂p over the losses that hold p."""
    from funcfreeze.proof.symbolic.exact import weighted_sum

    weights = {loss: float(weight_value(terms, None)) for loss, terms in row.weights.items()}
    reaching = {loss: weight for loss, weight in weights.items() if equations.losses[loss].depends_on(row.path)}
    if not reaching:
        routed = ", ".join(weights)
        reason = f"{routed} may update it and is without it" if routed else "no loss may update it"
        return _Expectation(row.path, row.shape, (), f"untouched: {reason}", None)
    derivatives = {loss: calculus.gradient(loss, row.path) for loss in reaching}
    merged = (
        weighted_sum((weight, derivatives[loss][entry]) for loss, weight in reaching.items())
        for entry in range(max(1, row.elements))
    )
    formulas = (
        calculus.formula(loss, row.path) + ("" if weight == 1.0 else f" (weight {weight:g})")
        for loss, weight in reaching.items()
    )
    return _Expectation(row.path, row.shape, tuple(reaching), ", ".join(formulas), tuple(merged))


def _check_value(subject: str, equation: Equation, expected: Exact, seen: Tensor | None) -> Check:
    error = math.inf if seen is None else expected.error(float(seen))
    number = f"{float(expected.number):.12g}"
    found = f"value {number}" if error <= TOLERANCE else f"expected {number}, got {_shown(seen)}"
    return Check(subject, (equation.name,), error, TOLERANCE, f"{equation}; {found}")


def _shown(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    return _numbers(tensor.flatten().tolist(), tuple(tensor.shape))


def _numbers(numbers: Sequence[float], shape: tuple[int, ...]) -> str:
    """A scalar as a number, a vector as a list of its first few."""
    texts = [f"{number:.12g}" for number in numbers]
    return f"[{', '.join(texts[:6])}{', ...' if len(texts) > 6 else ''}]" if shape else texts[0]


def _plain(value: float | tuple[float, ...]) -> float | list[float]:
    return list(value) if isinstance(value, tuple) else value
