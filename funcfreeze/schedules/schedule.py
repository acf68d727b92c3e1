"""The value that a schedule is: a name and its arguments, and the arithmetic of such values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from funcfreeze.schedules.formulas import FORMULAS, Check, Formula, closed, finite, numbers, pieces


@dataclass(frozen=True, repr=False)
class Schedule:
    """A number for every step, written down; made by the functions of `funcfreeze.schedules`, and by arithmetic.

    Called with a step (an int or a 0-d integer tensor) it gives a 0-d float64 tensor on the step's device, and never
    waits for that device. A tensor of several steps gives as many numbers, for a plot.

    It is plain data: it prints as it was written, compares by value, and goes to a dict and back. Numbers and schedules
    are added, subtracted and multiplied; a schedule is divided by a number.

    >>> from funcfreeze.schedules import cosine, dann
    >>> weight = -0.3 * dann(800)
    >>> weight
    -0.3 * dann(total_steps=800, gamma=10.0)
    >>> weight(400)
    tensor(-0.2960, dtype=torch.float64)
    >>> Schedule.from_dict(weight.to_dict()) == weight
    True
    >>> 1 - cosine(0.1, 0.0, 100)
    1 - cosine(a=0.1, b=0.0, steps=100)
    >>> Schedule("dan", ())
    Traceback (most recent call last):
        ...
    ValueError: no schedule is named 'dan'; there are constant, linear, ...
    """

    name: str
    arguments: tuple[tuple[str, Any], ...]
    scale: float = 1.0
    _compute: Callable[[Tensor], Tensor] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        formula = _ALL.get(self.name)
        if formula is None:
            raise ValueError(f"no schedule is named {self.name!r}; there are {', '.join(_ALL)}")
        given, expected = [name for name, _ in self.arguments], [*formula.arguments]
        if given != expected:
            raise ValueError(f"{self.name} takes {', '.join(expected)}; got {', '.join(given) or 'nothing'}")
        plain = _checked(self.name, formula, dict(self.arguments), self.scale)
        object.__setattr__(self, "arguments", tuple(plain.items()))
        object.__setattr__(self, "_compute", formula.bind(*plain.values()))

    def __call__(self, step: int | Tensor) -> Tensor:
        value = self._compute(torch.as_tensor(step).to(torch.float64))
        return value if self.scale == 1 else self.scale * value

    @property
    def has_table(self) -> bool:
        """Whether anything in it is looked up in a table, which is a tensor, and not computed from plain numbers."""
        return self.name == "table" or any(part.has_table for part in _schedules_in(self.arguments))

    def __repr__(self) -> str:
        body = _SHOWN.get(self.name, _call)(self.name, dict(self.arguments))
        if self.scale == 1:
            return body
        body = f"({body})" if self.name in _SHOWN else body
        return f"-{body}" if self.scale == -1 else f"{self.scale!r} * {body}"

    def __add__(self, other: Schedule | float) -> Schedule:
        return _combined("add", self, _term("added to", other))

    def __radd__(self, other: float) -> Schedule:
        return _combined("add", _term("added to", other), self)

    def __sub__(self, other: Schedule | float) -> Schedule:
        return _combined("add", self, -_term("subtracted from", other))

    def __rsub__(self, other: float) -> Schedule:
        return _combined("add", _term("subtracted from", other), -self)

    def __mul__(self, other: Schedule | float) -> Schedule:
        factor = _term("multiplied by", other)
        if isinstance(factor, Schedule):
            return _combined("multiply", self, factor)
        return replace(self, scale=self.scale * factor)

    def __rmul__(self, other: float) -> Schedule:
        return self * other

    def __truediv__(self, other: float) -> Schedule:
        divisor = _term("divided by", other, numbers_alone=True)
        if divisor == 0:
            raise ValueError(f"schedules are divided by numbers other than 0, got {other!r}")
        return replace(self, scale=self.scale / divisor)

    def __neg__(self) -> Schedule:
        return self * -1

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what is computed with, which may be on a device.
        return Schedule, (self.name, self.arguments, self.scale)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain data, for JSON and checkpoints."""
        arguments = {name: _to_data(value) for name, value in self.arguments}
        return {"name": self.name, "arguments": arguments, "scale": self.scale}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_dict` wrote down."""
        missing = [key for key in ("name", "arguments", "scale") if key not in data]
        if missing:
            raise ValueError(f"a schedule's dict has name, arguments and scale; {', '.join(missing)} missing: {data!r}")
        arguments = {name: _from_data(value) for name, value in data["arguments"].items()}
        return cls(data["name"], tuple(arguments.items()), data["scale"])


Term = Schedule | int | float


def _checked(name: str, formula: Formula, arguments: Mapping[str, Any], scale: object) -> dict[str, Any]:
    """The arguments as plain data, or an error that tells everything that is wrong with them."""
    plain, problems = {}, []
    for what, check, value in [
        *((what, check, arguments[what]) for what, check in formula.arguments.items()),
        ("scale", finite, scale),
    ]:
        try:
            plain[what] = check(what, value)
        except ValueError as error:
            problems.append(str(error))
    plain.pop("scale", None)
    if not problems and (problem := formula.problem(*plain.values())):
        problems.append(problem)
    if problems:
        raise ValueError(f"{name}: {'; '.join(problems)}")
    return plain


def _term(done: str, other: object, *, numbers_alone: bool = False) -> Any:
    """What a schedule is combined with: a number or another schedule."""
    if isinstance(other, Schedule) and not numbers_alone:
        return other
    wanted = f"schedules are {done} finite numbers{'' if numbers_alone else ' and schedules'}"
    try:
        return finite("it", other)
    except ValueError:
        pass
    if isinstance(other, Schedule | Real):
        raise ValueError(f"{wanted}, got {other!r}")
    raise TypeError(
        f"{wanted}, got {type(other).__name__}: {other!r}; what is no plain data goes into a function of the step: "
        "lambda step: other * schedule(step)"
    )


def _combined(name: str, left: Term, right: Term) -> Schedule:
    return Schedule(name, (("left", left), ("right", right)))


def _a_term(what: str, value: object) -> Term:
    return value if isinstance(value, Schedule) else finite(what, value)


def _a_schedule(what: str, value: object) -> Schedule:
    if not isinstance(value, Schedule):
        raise ValueError(f"{what} must be a schedule, got {value!r}")
    return value


def _some_schedules(what: str, value: object) -> tuple[Schedule, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} must be a list of schedules, got {value!r}")
    return tuple(_a_schedule(f"{what}[{index}]", given) for index, given in enumerate(value))


def _value(term: Term, step: Tensor) -> Any:
    return term(step) if isinstance(term, Schedule) else term


def _join(step: Tensor, schedules: tuple[Schedule, ...], boundaries: tuple[float, ...]) -> Tensor:
    value = schedules[0](step)
    for boundary, later in zip(boundaries, schedules[1:], strict=True):
        value = torch.where(step < boundary, value, later(step - boundary))
    return value


_TERMS: Mapping[str, Check] = {"left": _a_term, "right": _a_term}

_ALL: Mapping[str, Formula] = {
    **FORMULAS,
    "join": Formula(
        closed(_join),
        {"schedules": _some_schedules, "boundaries": numbers},
        lambda schedules, boundaries: pieces("schedules", len(schedules), boundaries),
    ),
    "add": Formula(
        closed(lambda step, left, right: _value(left, step) + _value(right, step)),
        _TERMS,
        lambda *terms: None if any(isinstance(term, Schedule) for term in terms) else "one of both is a schedule",
    ),
    "multiply": Formula(
        closed(lambda step, left, right: left(step) * right(step)), {"left": _a_schedule, "right": _a_schedule}
    ),
}


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def _sum(name: str, arguments: Mapping[str, Any]) -> str:
    left, right = arguments["left"], arguments["right"]
    sign, right = ("-", -right) if _is_negative(right) else ("+", right)
    return f"{left!r} {sign} {_in_brackets(right, 'add')}"


def _product(name: str, arguments: Mapping[str, Any]) -> str:
    left, right = arguments["left"], arguments["right"]
    shown = _in_brackets(right, "add", "multiply") if right.scale == 1 else f"({right!r})"
    return f"{_in_brackets(left, 'add')} * {shown}"


_SHOWN: Mapping[str, Callable[[str, Mapping[str, Any]], str]] = {"add": _sum, "multiply": _product}
"""What is written with signs."""


def _is_negative(term: Term) -> bool:
    return (term.scale if isinstance(term, Schedule) else term) < 0


def _in_brackets(term: Term, *names: str) -> str:
    """A term, in brackets if it is one of these by itself."""
    bare = isinstance(term, Schedule) and term.scale == 1 and term.name in names
    return f"({term!r})" if bare else repr(term)


def _schedules_in(value: Any) -> Iterator[Schedule]:
    if isinstance(value, Schedule):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _schedules_in(part)


def _to_data(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_dict()
    return [_to_data(part) for part in value] if isinstance(value, tuple) else value


def _from_data(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Schedule.from_dict(value)
    return tuple(map(_from_data, value)) if isinstance(value, list | tuple) else value
