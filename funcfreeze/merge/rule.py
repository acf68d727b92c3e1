"""What a merge rule is, and what it sees where losses meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from inspect import signature
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from funcfreeze.merge.rows import Rows, diagonal

RuleState = Mapping[str, Tensor]
"""What a rule keeps from step to step."""

PLACES = ("parameters", "activations")
"""Where a rule may look at the losses' gradients."""


@dataclass(frozen=True, eq=False)
class Meeting:
    """What a rule sees: one row for every loss that touches a parameter of the overlap, in the order of the plan.

    A rule changes nothing of what it is shown. Of one row alone no rule is asked: the merged gradient is that row, and
    a state stays as it is.

    Attributes:
        losses: the names of the K rows.
        places: of each row, its place among all losses that may meet there. A rule's state is for all of these.
        number: how many these are.
        values: the losses, (K,) float64, unweighted.
        step: the number of steps taken so far, 0-d int64.
        state: what the rule keeps.
        rows: the gradients, weights of the routes applied; zero where a loss does not reach.
    """

    losses: tuple[str, ...]
    places: tuple[int, ...]
    number: int
    values: Tensor
    step: Tensor
    state: RuleState
    rows: Rows

    @cached_property
    def gramian(self) -> Tensor:
        """The inner products of the losses' gradients, (K, K) float64. Finite: what is not is told otherwise.

        Those of large gradients in float32 are added up in it: beyond a norm of 1e19 they are not finite, which makes
        the merged gradient NaN, and below 1e-22 they are zero.
        """
        found = self.rows.gramian
        return torch.where(found.isfinite().all(), found, torch.eye(len(found), dtype=found.dtype, device=found.device))

    @cached_property
    def norms(self) -> Tensor:
        """How long the losses' gradients are, (K,) float64."""
        return diagonal(self.gramian).sqrt()

    @cached_property
    def matrix(self) -> Tensor:
        """The gradients one below the other, (K, elements of the overlap); a complex one as its two parts.

        In the gradients' dtype, float32 at least; `gramian`, `norms` and `values` are float64, so that
        `(1 / meeting.norms).to(meeting.matrix) @ meeting.matrix` is written with a `to`.
        The columns are the parameters that a loss touched, one after the other as the plan lists them, each flattened.
        Finite: zeros where not all of them are, which is told otherwise.
        """
        return self.rows.stacked().masked_fill_(~self.rows.gramian.isfinite().all(), 0.0)

    def taken(self, kept: Tensor) -> Tensor:
        """Of a vector for all losses that may meet here, the entries of the rows."""
        return torch.stack([kept[place] for place in self.places])

    def put(self, kept: Tensor, values: Tensor) -> Tensor:
        """The vector for all losses that may meet here, with new entries for the rows."""
        new = {place: values[row] for row, place in enumerate(self.places)}
        return torch.stack([new.get(place, kept[place]) for place in range(self.number)])


Decide = Callable[[Meeting], Any]
"""From a meeting to weights or a vector; with a state of its own to that and the new state."""


@dataclass(frozen=True)
class Rule:
    """How the gradients of several losses become one.

    A rule gives either weights for the losses' gradients, or the merged gradient itself.

    Attributes:
        weights: from a `Meeting` to K weights; the merged gradient is their sum of the rows.
        vector: from a `Meeting` to the merged gradient, one number for every column of `meeting.matrix`.
        init: from the number of losses that may meet to the state that the rule begins with. A rule that has one
            returns a pair: what it decides, and its new state.
        name: for tables and messages.
        at: "parameters", or "activations": where the losses' cotangents meet.
        compiles: whether it may be part of a compiled step.
        is_random: whether it draws random numbers, by the count of steps.
        is_sum: whether it is the plain sum, for which nothing has to be kept apart.

    Raises:
        TypeError, ValueError: not one of `weights` and `vector`, or no function; or another place, or a state there.

    >>> inverse_norms = Rule(lambda meeting: 1 / meeting.norms, name="inverse_norms")
    >>> inverse_norms
    inverse_norms()
    >>> import funcfreeze as ff
    >>> from torch import nn
    >>> losses = lambda model, x: {"a": model(x).sum(), "b": 3 * model(x)[0, 0]}
    >>> step = ff.Step(nn.Linear(1, 2), losses, {"a": "*", "b": "*"}, optimizer=ff.optim.sgd(1.0), merge=inverse_norms)
    >>> step.gradients(step.init(), torch.zeros(1, 1))["bias"]
    tensor([1.7071, 0.7071])
    """

    weights: Decide | None = None
    vector: Decide | None = None
    init: Callable[[int], RuleState] | None = None
    name: str = ""
    at: str = "parameters"
    compiles: bool = True
    is_random: bool = False
    is_sum: bool = False

    def __post_init__(self) -> None:
        given = [decide for decide in (self.weights, self.vector) if decide is not None]
        if len(given) != 1 or not callable(given[0]):
            shown = " and ".join(map(repr, given)) or "neither"
            raise TypeError(f"a Rule is given a function as `weights`, or one as `vector`, got {shown}")
        if self.at not in PLACES:
            raise ValueError(f"a rule's `at` is 'parameters' or 'activations', got {self.at!r}")
        if self.init is not None and not _takes_one(self.init):
            raise TypeError(
                f"a Rule's `init` is a function from a number of losses to a state (tensors by name), got {self.init!r}"
            )
        if self.init is not None and self.at != PLACES[0]:
            raise ValueError("a rule that keeps a state looks at parameters, not at activations")
        object.__setattr__(self, "name", self.name or str(getattr(given[0], "__name__", type(given[0]).__name__)))

    @property
    def decide(self) -> Decide:
        """The one of `weights` and `vector` that there is."""
        decide = self.weights or self.vector
        assert decide is not None
        return decide

    @property
    def options(self) -> dict[str, Any]:
        """Its options that are not as they are by default."""
        given = self.decide
        own = (
            {field.name: getattr(given, field.name) for field in fields(given) if _differs(given, field)}
            if is_dataclass(given)
            else {}
        )
        return {**own, **({"at": self.at} if self.at != PLACES[0] else {})}

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"

    def looking_at(self, at: str) -> Rule:
        """The same rule, looking at the losses' gradients elsewhere."""
        return replace(self, at=at)


def _takes_one(init: Any) -> bool:
    """Whether it can be called with one argument."""
    try:
        signature(init).bind(1)
    except TypeError:
        return False
    except ValueError:  # a builtin that does not say
        return callable(init)
    return True


def _differs(given: Any, field: Any) -> bool:
    """By what they look like: tensors and arrays do not compare to one truth."""
    return repr(getattr(given, field.name)) != repr(field.default)


def checked_rule(given: object, where: str) -> Rule:
    """A rule, or an error that says what it is instead.

    Raises:
        TypeError: something else.
    """
    if isinstance(given, Rule):
        return given
    if callable(given) and str(getattr(given, "__module__", "")).startswith("funcfreeze.merge"):
        name = getattr(given, "__name__", "")
        raise TypeError(f"{where}: a rule is made by calling it: funcfreeze.merge.{name}(...)")
    if callable(given):
        raise TypeError(
            f"{where}: {getattr(given, '__name__', type(given).__name__)} is no rule; make one of a function with "
            "funcfreeze.merge.Rule(weights=f) or Rule(vector=f), of TorchJD's with funcfreeze.merge.from_torchjd(...)"
        )
    raise TypeError(f"{where}: a rule such as funcfreeze.merge.pcgrad(), got {type(given).__name__}: {given!r}")


def number_problem(name: str, value: object, is_good: Callable[[Any], bool], wanted: str) -> Sequence[str]:
    """What is wrong with an option that is a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return () if is_number and is_good(value) else (f"{name} must be {wanted}, got {value!r}",)


def whole_problem(name: str, value: object, least: int | None = None) -> Sequence[str]:
    """What is wrong with an option that is an int, and not less than something."""
    if isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least):
        return ()
    return (f"{name} must be an int{'' if least is None else f' of at least {least}'}, got {value!r}",)


def refuse(rule: str, *problems: Sequence[str]) -> None:
    """Raise for all problems with a rule's options at once.

    Raises:
        ValueError: if there is one.
    """
    found = [problem for some in problems for problem in some]
    if found:
        raise ValueError(f"merge.{rule}: {'; '.join(found)}")
