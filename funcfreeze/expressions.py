"""SymPy expressions read as losses: their derivatives in exact numbers, and the same expressions over torch tensors.

The two sides share nothing but the expression: SymPy differentiates it and evaluates with 40 digits, torch evaluates
what was written, node by node, and differentiates by autograd.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from numbers import Real
from typing import Any, NamedTuple, TypeGuard

import sympy
import torch
from torch import Tensor

from funcfreeze.plan import raise_problems
from funcfreeze.selectors import closest

Expression = Any
"""A `sympy.Expr`; SymPy ships no types."""

Number = float | tuple[float, ...]
"""A scalar or a vector, of float64 numbers."""

DIGITS = 40  # far beyond float64's 16, so that the expected numbers are as good as exact

_OPERATIONS: dict[Any, Callable[..., Tensor]] = {
    sympy.Add: lambda *terms: reduce(operator.add, terms),
    sympy.Mul: lambda *factors: reduce(operator.mul, factors),
    sympy.Pow: torch.pow,
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.sin: torch.sin,
    sympy.cos: torch.cos,
    sympy.tan: torch.tan,
    sympy.asin: torch.asin,
    sympy.acos: torch.acos,
    sympy.atan: torch.atan,
    sympy.atan2: torch.atan2,
    sympy.sinh: torch.sinh,
    sympy.cosh: torch.cosh,
    sympy.tanh: torch.tanh,
    sympy.asinh: torch.asinh,
    sympy.acosh: torch.acosh,
    sympy.atanh: torch.atanh,
    sympy.erf: torch.erf,
    sympy.erfc: torch.erfc,
    sympy.loggamma: torch.lgamma,
    sympy.Abs: torch.abs,
    sympy.sign: torch.sign,
    sympy.Max: lambda *terms: reduce(torch.maximum, terms),
    sympy.Min: lambda *terms: reduce(torch.minimum, terms),
}


class Exact(NamedTuple):
    """A number to 40 digits, and the scale that an error in it is measured by.

    The scale is what rounding acts on: the sum of the absolute terms, plus how far relative changes of the point would
    move the number, Σ |x · ∂f/∂x| (the first-order condition of f: Higham, Accuracy and Stability of Numerical
    Algorithms, section 1.6). For a number that is no small difference of large ones that is its own size, about.
    """

    number: Any
    scale: Any

    def error(self, seen: float) -> float:
        """How far `seen` is from the number, in units of the scale (of 1, if that is 0); infinite if not finite."""
        if not math.isfinite(seen):
            return math.inf
        return float(abs(sympy.Rational(seen) - self.number) / (self.scale or 1))


@dataclass(frozen=True)
class Equation:
    """One loss: Σᵢ vᵢ Lᵢ with the external gradient v, or L alone where it is a scalar.

    Attributes:
        name: the loss.
        written: the expressions as the user wrote them: one, or one for each entry.
        length: the number of entries, or None for a scalar.
        external: the external gradient, a number for a scalar.
    """

    name: str
    written: tuple[Expression, ...]
    length: int | None
    external: Number

    @property
    def elementwise(self) -> bool:
        """Whether one expression stands for all entries."""
        return self.length is not None and len(self.written) == 1

    def depends_on(self, parameter: str) -> bool:
        """Whether the parameter's name is in what was written."""
        return any(parameter in _names(expression) for expression in self.written)

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The loss in torch: a 0-d tensor on the autograd graph of `tensors`."""
        entries = [_evaluate(expression, tensors) for expression in self.written]
        if self.length is None:
            return entries[0] if self.external == 1.0 else entries[0] * self.external
        value = entries[0] if self.elementwise else torch.stack(entries)
        return (value * torch.tensor(self.external, dtype=torch.float64)).sum()


@dataclass(frozen=True)
class Equations:
    """All losses, and the point they are differentiated at."""

    losses: Mapping[str, Equation]
    point: Mapping[str, Number]

    def tensors(self) -> dict[str, Tensor]:
        """The point as float64 tensors."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.point.items()}

    def evaluate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every loss in torch."""
        return {name: equation.evaluate(tensors) for name, equation in self.losses.items()}

    def value(self, loss: str) -> Exact:
        """A loss's value by SymPy."""
        return self._exact(self._scalar(loss), f"loss {loss!r}")

    def gradient(self, loss: str, parameter: str) -> tuple[Exact, ...]:
        """A loss's derivative by SymPy, for each entry of the parameter (one for a scalar)."""
        scalar = self._scalar(loss)
        symbols = self._symbols(parameter)
        return tuple(self._exact(sympy.diff(scalar, symbol), f"∂{loss}/∂{symbol}") for symbol in symbols)

    def formula(self, loss: str, parameter: str) -> str:
        """The derivative in words: `∂adv/∂b = -1`.

        For a vector in an elementwise expression it is each entry's, before the external gradient: `∂Q/∂a = 9*a**2`.
        """
        equation = self.losses[loss]
        if equation.elementwise and not any(isinstance(symbol, sympy.Indexed) for symbol in _atoms(equation)):
            symbol = sympy.Symbol(parameter, real=True)
            if isinstance(self.point[parameter], tuple):
                return f"∂{loss}/∂{parameter} = {sympy.diff(self._real(equation.written[0], None), symbol)}"
        scalar = self._scalar(loss)
        derivatives = ", ".join(str(sympy.diff(scalar, symbol)) for symbol in self._symbols(parameter))
        shown = f"[{derivatives}]" if isinstance(self.point[parameter], tuple) else derivatives
        return f"∂{loss}/∂{parameter} = {shortened(shown)}"

    def _symbols(self, parameter: str) -> list[Any]:
        """One real symbol for each entry of a parameter."""
        value = self.point[parameter]
        names = [f"{parameter}[{i}]" for i in range(len(value))] if isinstance(value, tuple) else [parameter]
        return [sympy.Symbol(name, real=True) for name in names]

    def _scalar(self, loss: str) -> Expression:
        """Σᵢ vᵢ Lᵢ over real scalar symbols."""
        equation = self.losses[loss]
        length = equation.length or 1
        external = equation.external if isinstance(equation.external, tuple) else (equation.external,)
        written = equation.written * length if len(equation.written) == 1 else equation.written
        entries = [self._real(expression, entry) for entry, expression in enumerate(written)]
        return sum((sympy.Rational(v) * entry for v, entry in zip(external, entries, strict=True)), sympy.S.Zero)

    def _real(self, expression: Expression, entry: int | None) -> Expression:
        """The expression over real symbols and exact constants, with vectors replaced by one of their entries.

        Real, because SymPy takes a bare symbol as complex, where |x| has no derivative.
        """
        replaced = {constant: sympy.Rational(constant) for constant in expression.atoms(sympy.Float)}
        for atom in expression.free_symbols:
            name = _name(atom)
            if isinstance(atom, sympy.Indexed):
                replaced[atom] = self._symbols(name)[int(atom.indices[0])]
            elif entry is not None and isinstance(self.point[name], tuple):
                replaced[atom] = self._symbols(name)[entry % len(self._symbols(name))]
            else:
                replaced[atom] = sympy.Symbol(name, real=True)
        return expression.xreplace(replaced)

    def _exact(self, expression: Expression, what: str) -> Exact:
        number = self._number(expression)
        if not _in_float64(number):
            where = ", ".join(f"{_name(symbol)} = {self._at(symbol)}" for symbol in _sorted(expression.free_symbols))
            raise_problems(
                [
                    f"{what}: {shortened(str(expression))} is {shortened(str(number))} at {where}, which is no finite real "
                    "number of float64; choose another point"
                ]
            )
        terms = [self._number(term) for term in sympy.Add.make_args(expression)]
        moved = [
            self._at(symbol) * self._number(sympy.diff(expression, symbol)) for symbol in _sorted(expression.free_symbols)
        ]
        return Exact(number, sum((abs(part) for part in (*terms, *moved) if _in_float64(part)), sympy.S.Zero))

    def _number(self, expression: Expression) -> Any:
        at = {symbol: self._at(symbol) for symbol in expression.free_symbols}
        return expression.xreplace(at).evalf(DIGITS)

    def _at(self, symbol: Any) -> Any:
        """A symbol's value: the float64 number itself, exactly, not the decimal it is printed as."""
        name, _, index = symbol.name.rstrip("]").partition("[")
        value = self.point[symbol.name if symbol.name in self.point else name]
        return sympy.Rational(value[int(index)] if isinstance(value, tuple) else value)
