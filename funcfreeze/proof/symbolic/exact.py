"""Values and derivatives of equations by SymPy alone, in numbers of 40 digits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import sympy

from funcfreeze.proof.symbolic.operations import DIGITS, Expression, base_name, in_float64, shortened
from funcfreeze.proof.symbolic.read import Equation, Equations


class Exact(NamedTuple):
    """A number to 40 digits, and the scale that an error in it is measured by.

    The scale is what rounding acts on: the sum of the absolute terms, plus how far relative changes of the point would
    move the number, Σ|x · ∂f/∂x| (the first-order condition of f: Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd ed., section 1.6). For a number that is no small difference of large ones that is about its size.
    """

    number: Any
    scale: Any

    def error(self, seen: float) -> float:
        """How far `seen` is from the number, in units of the scale (of 1, if that is 0); infinite if it is no number.

        >>> Exact(sympy.Rational(1, 4), sympy.Rational(1, 2)).error(0.5)
        0.5
        """
        if not math.isfinite(seen):
            return math.inf
        return float(abs(sympy.Rational(seen) - self.number) / (self.scale or 1))


def weighted_sum(terms: Iterable[tuple[float, Exact]]) -> Exact:
    """Σ w·f of exact numbers, on the scale Σ |w|·scale.

    >>> half = Exact(sympy.Rational(1, 2), sympy.Integer(1))
    >>> weighted_sum([(1.0, half), (-0.5, half)])
    Exact(number=1/4, scale=3/2)
    """
    number, scale = sympy.S.Zero, sympy.S.Zero
    for weight, term in terms:
        exactly = sympy.Rational(weight)  # the very float64 number that an engine multiplies by
        number += exactly * term.number
        scale += abs(exactly) * term.scale
    return Exact(number, scale)


class Calculus:
    """The equations as scalar expressions over real symbols, one symbol for each entry of each parameter.

    Attributes:
        problems: values and derivatives that were asked for and are no numbers at the point.
    """

    def __init__(self, equations: Equations) -> None:
        self.problems: list[str] = []
        self._symbols = {name: _symbols(name, value) for name, value in equations.point.items()}
        self._point = {
            symbol: sympy.Rational(number)  # exactly: not the decimal that the number is printed as
            for name, value in equations.point.items()
            for symbol, number in zip(self._symbols[name], value if isinstance(value, tuple) else (value,), strict=True)
        }
        self._vectors = {name for name, value in equations.point.items() if isinstance(value, tuple)}
        self._equations = equations.losses
        self._scalars = {name: self._scalar(equation) for name, equation in equations.losses.items()}

    def value(self, loss: str) -> Exact:
        """A loss's value."""
        return self._exact(self._scalars[loss], f"loss {loss!r}")

    def gradient(self, loss: str, parameter: str) -> tuple[Exact, ...]:
        """The loss's derivative by every entry of a parameter."""
        return tuple(
            self._exact(sympy.diff(self._scalars[loss], symbol), f"∂{loss}/∂{symbol}")
            for symbol in self._symbols[parameter]
        )

    def formula(self, loss: str, parameter: str) -> str:
        """The derivative as text, `∂adv/∂b = -1`; a list for a vector.

        Where one expression works entry by entry it is that of each entry, before the external gradient: `∂Q/∂a =
        9*a**2`.
        """
        equation = self._equations[loss]
        entries = any(isinstance(atom, sympy.Indexed) for atom in equation.written[0].free_symbols)
        if equation.elementwise and parameter in self._vectors and not entries:
            each = sympy.diff(self._real(equation.written[0], None), sympy.Symbol(parameter, real=True))
            return f"∂{loss}/∂{parameter} = {shortened(each)}"
        derivatives = [sympy.diff(self._scalars[loss], symbol) for symbol in self._symbols[parameter]]
        return f"∂{loss}/∂{parameter} = {shortened(derivatives if parameter in self._vectors else derivatives[0])}"

    def _scalar(self, equation: Equation) -> Expression:
        """Σᵢ vᵢ·Lᵢ."""
        external = equation.external if isinstance(equation.external, tuple) else (equation.external,)
        written = equation.written * len(external) if equation.elementwise else equation.written
        entries = (self._real(expression, entry) for entry, expression in enumerate(written))
        return sum((sympy.Rational(v) * entry for v, entry in zip(external, entries, strict=True)), sympy.S.Zero)

    def _real(self, expression: Expression, entry: int | None) -> Expression:
        """One entry of an expression over real symbols and exact constants; with no `entry`, over whole vectors.

        SymPy takes a bare symbol as complex, where |x| has no derivative, and a decimal as rounded to 15 digits.
        """
        replaced: dict[Any, Any] = {constant: sympy.Rational(constant) for constant in expression.atoms(sympy.Float)}
        for atom in expression.free_symbols:
            if isinstance(atom, sympy.Indexed):
                replaced[atom] = self._symbols[base_name(atom)][int(atom.indices[0])]
            elif atom.name not in self._vectors or entry is None:
                replaced[atom] = sympy.Symbol(atom.name, real=True)
            elif len(self._symbols[atom.name]) > entry:  # else it is only the vector that some w[2] is an entry of
                replaced[atom] = self._symbols[atom.name][entry]
        return expression.xreplace(replaced)

    def _exact(self, expression: Expression, what: str) -> Exact:
        number = self._number(expression)
        if not in_float64(number):
            where = ", ".join(f"{symbol} = {float(self._point[symbol])}" for symbol in _sorted(expression))
            self.problems.append(
                f"{what}: {shortened(expression)} is {shortened(number)} at {where}, which is no finite real number in "
                "float64; choose another point"
            )
            return Exact(sympy.nan, sympy.nan)
        terms = [self._number(term) for term in sympy.Add.make_args(expression)]
        moved = [self._point[symbol] * self._number(sympy.diff(expression, symbol)) for symbol in _sorted(expression)]
        # a term or slope that is no number (the delta at a kink) says nothing about rounding
        return Exact(number, sum((abs(part) for part in (*terms, *moved) if in_float64(part)), sympy.S.Zero))

    def _number(self, expression: Expression) -> Any:
        return expression.xreplace(self._point).evalf(DIGITS)


def _symbols(name: str, value: float | tuple[float, ...]) -> list[Any]:
    entries = [f"{name}[{entry}]" for entry in range(len(value))] if isinstance(value, tuple) else [name]
    return [sympy.Symbol(entry, real=True) for entry in entries]


def _sorted(expression: Expression) -> list[Any]:
    return sorted(expression.free_symbols, key=str)
