"""Equations as a user writes them, checked and brought to one form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import sympy
import torch
from torch import Tensor

from funcfreeze.declare.plan import raise_problems
from funcfreeze.declare.selectors import closest
from funcfreeze.proof.symbolic import operations
from funcfreeze.proof.symbolic.operations import Expression, base_name, names, shortened

Value = float | tuple[float, ...]
"""A scalar or a vector of float64 numbers."""


@dataclass(frozen=True)
class Equation:
    """One loss: L where it is a scalar, else Σᵢ vᵢ·Lᵢ with the external gradient v.

    Attributes:
        name: the loss.
        written: the expressions as the user wrote them: one, or one for each entry.
        length: the number of entries, None for a scalar.
        external: the external gradient.
    """

    name: str
    written: tuple[Expression, ...]
    length: int | None
    external: Value

    def __str__(self) -> str:
        """As written: `on_y = -a*x - b + 7`."""
        return f"{self.name} = {shortened(self.written[0] if len(self.written) == 1 else list(self.written))}"

    @property
    def elementwise(self) -> bool:
        """Whether one expression over whole vectors stands for all entries."""
        return self.length is not None and len(self.written) == 1

    def depends_on(self, parameter: str) -> bool:
        """Whether the parameter is in what was written."""
        return any(parameter in names(expression) for expression in self.written)

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The loss in torch: a 0-d tensor on the autograd graph of `tensors`."""
        entries = [operations.evaluate(expression, tensors) for expression in self.written]
        if self.length is None:
            factor = torch.tensor(self.external, dtype=torch.float64)
            return entries[0] if self.external == 1.0 else entries[0] * factor
        value = entries[0] if self.elementwise else torch.stack(entries)
        return (value * torch.tensor(self.external, dtype=torch.float64)).sum()


@dataclass(frozen=True)
class Equations:
    """All losses by name, and the point they are looked at."""

    losses: Mapping[str, Equation]
    point: Mapping[str, Value]

    def tensors(self) -> dict[str, Tensor]:
        """The point as float64 tensors."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.point.items()}

    def evaluate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every loss in torch."""
        return {name: equation.evaluate(tensors) for name, equation in self.losses.items()}


def read_equations(losses: object, at: object, cotangents: object) -> Equations:
    """Check equations, point and external gradients, and put them together.

    Raises:
        RouteError: everything that is wrong with them, at once.

    >>> x = sympy.Symbol("x")
    >>> read_equations({"L": x**2}, {"x": [1, 2]}, {"L": [1, -1]}).losses["L"]
    Equation(name='L', written=(x**2,), length=2, external=(1.0, -1.0))
    >>> read_equations({"L": x**2}, {"y": 1}, {})
    Traceback (most recent call last):
        ...
    funcfreeze.declare.selectors.RouteError: loss 'L' = x**2 holds x, and `at` has no value for it; there are 'y'
    """
    found: list[str] = []
    for what, given in {"losses": losses, "at": at, "cotangents": cotangents}.items():
        if not isinstance(given, Mapping) or (not given and what != "cotangents"):
            seen = "an empty one" if isinstance(given, Mapping) else f"{type(given).__name__}: {given!r}"
            found.append(f"`{what}` is a mapping from names, got {seen}")
    raise_problems(found)
    assert isinstance(losses, Mapping)
    assert isinstance(at, Mapping)
    assert isinstance(cotangents, Mapping)
    point = {str(name): _read_value(f"`at` for {name!s}", value, found) for name, value in at.items()}
    written = {name: _read_expressions(name, given, point, found) for name, given in losses.items()}
    external = {name: _read_value(f"the cotangent of {name!r}", given, found) for name, given in cotangents.items()}
    found += [
        f"there is a cotangent for {name!r}, which is no loss{closest(str(name), map(str, losses))}"
        for name in cotangents
        if name not in losses
    ]
    raise_problems(found)  # lengths mean something only where everything has one
    equations = {
        name: _put_together(name, expressions, isinstance(losses[name], list | tuple), point, external.get(name), found)
        for name, expressions in written.items()
    }
    raise_problems(found)
    return Equations(equations, point)


def _read_value(what: str, given: Any, found: list[str]) -> Value:
    if isinstance(given, list | tuple):
        if given and all(map(_is_number, given)):
            return tuple(map(float, given))
    elif _is_number(given):
        return float(given)
    seen = f"{type(given).__name__}: {given!r}"
    found.append(f"{what} is a finite number or a list of them, got {seen}"[:200])
    return math.nan


def _is_number(given: Any) -> bool:
    if isinstance(given, sympy.Expr):
        return operations.in_float64(given.evalf(operations.DIGITS))
    return isinstance(given, Real) and not isinstance(given, bool) and math.isfinite(given)


def _read_expressions(name: object, given: object, point: Mapping[str, Value], found: list[str]) -> tuple[Any, ...]:
    """What was written for a loss, if it is expressions over known symbols that torch can evaluate."""
    if not isinstance(name, str):
        found.append(f"a loss is named by a string, got {type(name).__name__}: {name!r}")
    listed = tuple(given) if isinstance(given, list | tuple) else (given,)
    wrong = [expression for expression in listed if not isinstance(expression, sympy.Expr)]
    if wrong or not listed:
        seen = f"{type(wrong[0]).__name__}: {wrong[0]!r}" if wrong else "an empty list"
        found.append(
            f"loss {name!r} is a SymPy expression or a list of them, got {seen}; "
            'write it with symbols, a, b = sympy.symbols("a b")'[:200]
        )
        return ()
    clauses = [clause for expression in listed for clause in operations.problems(expression)]
    if clauses:
        found.append(f"loss {name!r}: {'; '.join(clauses)}; an expression is made of {operations.supported()}")
        return ()
    shown = f"loss {name!r} = {given}"
    if not any(expression.free_symbols for expression in listed):
        found.append(
            f"{shown} depends on nothing, so there is nothing to differentiate (SymPy drops a symbol from x - x and "
            "0*x as they are written)"
        )
    found += [problem for expression in listed for problem in _symbol_problems(shown, expression, point)]
    return listed


def _symbol_problems(shown: str, expression: Expression, point: Mapping[str, Value]) -> Iterator[str]:
    for missing in sorted(names(expression) - point.keys()):
        yield f"{shown} holds {missing}, and `at` has no value for it{closest(missing, point)}"
    for atom in sorted(expression.free_symbols, key=str):
        name = base_name(atom) if isinstance(atom, sympy.Indexed) else atom.name
        value = point.get(name)
        if isinstance(atom, sympy.Indexed) and value is not None:
            length = len(value) if isinstance(value, tuple) else None
            if length is None:
                yield f"{shown} holds the entry {atom} of a vector, and `at` has the single number {value} for {name}"
            elif not 0 <= int(atom.indices[0]) < length:
                yield f"{shown} holds {atom}, and `at` has {length} numbers for {name}: 0 to {length - 1}"
        elif isinstance(atom, sympy.Symbol) and value is not None:
            yield from _assumption_problems(shown, atom, value)


def _assumption_problems(shown: str, symbol: Any, value: Value) -> Iterator[str]:
    """SymPy simplifies by what is assumed of a symbol (√x² = x where x > 0), so its value must be such a number."""
    for number in map(sympy.Rational, value if isinstance(value, tuple) else (value,)):
        broken = [
            (name, truth)
            for name, truth in symbol.assumptions0.items()
            if getattr(number, f"is_{name}") not in (truth, None)
        ]
        if broken:  # of `positive` and all that follows from it, the one the user most likely wrote
            name, truth = min(broken, key=lambda assumption: (not assumption[1], len(assumption[0])))
            yield (
                f"{shown}: {symbol} was made with {name}={truth}, by which SymPy simplifies, and `at` has "
                f"{float(number)} for it"
            )


def _put_together(
    name: str,
    written: tuple[Expression, ...],
    listed: bool,
    point: Mapping[str, Value],
    external: Value | None,
    found: list[str],
) -> Equation:
    whole = {
        symbol: len(value)
        for symbol in sorted(set().union(*map(_whole_symbols, written)))
        if isinstance(value := point[symbol], tuple)
    }
    shown = f"loss {name!r} = {list(written) if listed else written[0]}"
    vectors = " and ".join(f"{symbol} of {length}" for symbol, length in whole.items())
    if listed and whole:
        found.append(
            f"{shown} is a list, whose expressions are scalars, and holds the vector {vectors} numbers; index it"
        )
    length = len(written) if listed else next(iter(whole.values()), None)
    if not listed and len(set(whole.values())) > 1:  # no length to hold the external gradient against
        found.append(f"{shown} works entry by entry, and holds vectors of different lengths: {vectors} numbers")
    else:
        found += _external_problems(name, shown, length, external)
    return Equation(name, written, length, 1.0 if external is None else external)


def _external_problems(name: str, shown: str, length: int | None, external: Value | None) -> Iterator[str]:
    given = len(external) if isinstance(external, tuple) else None
    if length is not None and external is None:
        yield (
            f"{shown} is no scalar but has {length} entries; give its external gradient, such as "
            f"cotangents={{{name!r}: [1] * {length}}}"
        )
    elif external is not None and given != length:
        expected = "a scalar" if length is None else f"a vector of {length}"
        seen = "a single number" if given is None else f"a list of {given}"
        yield f"{shown} is {expected}, and its cotangent is {seen}"


def _whole_symbols(expression: Expression) -> set[str]:
    """The names of symbols that stand for themselves, not only for the vector some `w[2]` is an entry of."""
    if isinstance(expression, sympy.Indexed):
        return set()
    if isinstance(expression, sympy.Symbol):
        return {expression.name}
    return {name for argument in expression.args for name in _whole_symbols(argument)}
