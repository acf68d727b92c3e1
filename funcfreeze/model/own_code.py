"""Functions with a code object of their own.

Dynamo keeps what it compiled with the code object of a function, guards a closure by the code of what it holds, and
remembers by name and line which sizes it saw change. Functions that were made by one `def` and differ in their closures
alone are one and the same to it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Any

_NUMBERS = count(1)


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which nobody takes for another one that was made alike; with globals of its own.

    >>> def adder(n):
    ...     def add(x):
    ...         return x + n
    ...     return add
    >>> one, two = adder(1), adder(2)
    >>> own = with_own_code(two)
    >>> own(1), one.__code__ is two.__code__, one.__code__ is own.__code__
    (3, True, False)
    """
    assert isinstance(function, FunctionType), "a function that was written with def"
    number = next(_NUMBERS)
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}", co_firstlineno=number)
    own = FunctionType(code, dict(function.__globals__), function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    own.__doc__ = function.__doc__
    return own
