"""A SymPy expression over torch tensors: what was written, evaluated node by node, on the autograd graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

import sympy
import torch
from torch import Tensor

Expression = Any
"""A `sympy.Expr`; SymPy ships no types."""

DIGITS = 40
"""How far numbers are evaluated by SymPy: far beyond float64's 16 digits, so as good as exact."""

_OPERATIONS: Mapping[Any, Callable[..., Tensor]] = {
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


def evaluate(expression: Expression, tensors: Mapping[str, Tensor]) -> Tensor:
    """The expression's value; a symbol is the tensor of its name, `w[2]` an entry of one.

    Every symbol in the expression is on the autograd graph of the result, even where its derivative is zero: SymPy's
    `free_symbols` and autograd agree on what depends on what.

    >>> x, w = sympy.Symbol("x"), sympy.IndexedBase("w")
    >>> evaluate(sympy.sin(x) + w[1] / 3, {"x": torch.tensor(0.0), "w": torch.tensor([1.0, 6.0])})
    tensor(2., dtype=torch.float64)
    """
    if not expression.free_symbols:
        return torch.tensor(float(expression.evalf(DIGITS)), dtype=torch.float64)
    if isinstance(expression, sympy.Symbol):
        return tensors[expression.name]
    if isinstance(expression, sympy.Indexed):
        return tensors[base_name(expression)][int(expression.indices[0])]
    return _OPERATIONS[expression.func](*(evaluate(argument, tensors) for argument in expression.args))


def problems(expression: Expression) -> Iterator[str]:
    """What in the expression torch cannot evaluate, one clause each.

    >>> x = sympy.Symbol("x")
    >>> list(problems(sympy.zeta(sympy.I * x)))
    ['zeta(I*x) has no counterpart in torch here']
    >>> list(problems(sympy.sin(sympy.I + x)))
    ['I is no finite real number']
    """
    if not expression.free_symbols:
        number = expression.evalf(DIGITS)
        if not in_float64(number):
            yield f"{expression} is no finite real number"
    elif isinstance(expression, sympy.Indexed):
        indices = expression.indices
        if len(indices) != 1 or not isinstance(indices[0], sympy.Integer):
            yield f"{expression} is no entry of a vector, which has one whole number as its index"
    elif not isinstance(expression, sympy.Symbol):
        if expression.func not in _OPERATIONS:
            yield f"{expression} has no counterpart in torch here"
        else:
            for argument in expression.args:
                yield from problems(argument)


def supported() -> str:
    """The functions that an expression may hold."""
    return ", ".join(head.__name__ for head in _OPERATIONS)


def in_float64(number: Any) -> bool:
    """Whether SymPy's number is real, finite and within the range of float64."""
    return bool(number.is_Number and number.is_finite and abs(number) < torch.finfo(torch.float64).max)


def base_name(entry: Any) -> str:
    """The name of the vector whose entry `w[2]` is."""
    return str(entry.base.label)


def names(expression: Expression) -> set[str]:
    """The names of all scalars and vectors in the expression."""
    return {symbol.name for symbol in expression.free_symbols if isinstance(symbol, sympy.Symbol)}


def shortened(shown: object, width: int = 100) -> str:
    """As text, cut where it is long.

    >>> shortened("a" * 30, 10)
    'aaaaaaa...'
    """
    text = str(shown)
    return text if len(text) <= width else f"{text[: width - 3]}..."
