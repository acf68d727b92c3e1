"""Learning rates and weight decays at a step, and the groups of parameters with equal ones: a kernel call for each."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from funcfreeze.declare.selectors import Leaf, RouteError
from funcfreeze.optim.hyperparameters import LearningRate, Rate, rate_at, rate_near
from funcfreeze.optim.rates import Option, Rates
from funcfreeze.optim.transform import lines
from funcfreeze.schedules.schedule import Schedule


class Pace(NamedTuple):
    """How fast parameters move and decay at a step."""

    lr: Rate
    weight_decay: Rate

    def near(self, tensor: Tensor) -> Pace:
        """The same where the tensor's device can read it."""
        return Pace(rate_near(self.lr, tensor), rate_near(self.weight_decay, tensor))

    @property
    def decays(self) -> bool:
        """Whether there is a decay. One in a tensor is not asked for, which would wait for the device."""
        return isinstance(self.weight_decay, Tensor) or self.weight_decay != 0


def apart(rate: Rate) -> tuple[Tensor | None, float]:
    """A rate as an operator takes it: in a tensor, and else as a number."""
    return (rate, 0.0) if isinstance(rate, Tensor) else (None, float(rate))


class Given(NamedTuple):
    """A learning rate and a weight decay as they were given."""

    lr: LearningRate
    weight_decay: LearningRate


@dataclass(frozen=True)
class Groups:
    """Parameters that were given the same.

    Attributes:
        numbers: path -> the number of its group, for all parameters for which that is clear.
        pairs: for each group, where among the values its learning rate and its weight decay are.
        values: all that was given, equal ones once, with the name of the option.
    """

    numbers: Mapping[str, int]
    pairs: Sequence[tuple[int, int]]
    values: Sequence[tuple[str, LearningRate]]


@dataclass(frozen=True, eq=False)
class Paces:
    """The learning rates and weight decays of an optimizer.

    Attributes:
        owner: the optimizer's name, for messages.
        lr: the learning rates.
        weight_decay: the weight decays.
    """

    owner: str
    lr: Option
    weight_decay: Option
    _known: dict[tuple[str, ...], Groups] = field(default_factory=dict)

    @staticmethod
    def of(owner: str, lr: Rates, weight_decay: Rates) -> Paces:
        """Check what was given.

        Raises:
            TypeError, ValueError: one is neither a rate nor a mapping from selectors to rates.
        """
        return Paces(owner, Option.of(owner, "lr", lr, None), Option.of(owner, "weight_decay", weight_decay, 0.0))

    @property
    def are_by_selector(self) -> bool:
        """Whether they are not the same for all parameters."""
        return any(option.choice is not None for option in self._options)

    @property
    def are_bound(self) -> bool:
        """Whether they are for all parameters alike, or for a model's."""
        return all(option.is_bound for option in self._options)

    def bind(self, leaves: Sequence[Leaf]) -> Paces:
        """The same, with selectors bound to a model's parameters."""
        return Paces(self.owner, self.lr.bind(leaves), self.weight_decay.bind(leaves))

    def check(self, params: Mapping[str, Tensor], touched: Collection[str] | None = None) -> None:
        """Raises unless each parameter has one learning rate and one weight decay.

        Args:
            params: all that there are.
            touched: those that matter now; None if that is all, and then every selector must take some of them.

        Raises:
            RouteError: tells everything that is wrong.
        """
        needed = params if touched is None else touched
        problems = [
            f"{option.name}: {problem}"
            for option in self._options
            for problem in option.problems(params, needed, touched is None and bool(params))
        ]
        if problems:
            raise RouteError(lines(f"{self.owner}: the rates do not fit the parameters that are updated:", problems))

    def given(self, paths: Collection[str]) -> dict[str, Given]:
        """What was given for these parameters, where that is clear: they are bound then."""
        lr_of, decay_of = (option.by_path({}) for option in self._options)
        found = {path: (lr_of(path), decay_of(path)) for path in paths}
        return {path: Given(lr, decay) for path, (lr, decay) in found.items() if lr is not None and decay is not None}

    def at(
        self, step: int | Tensor | None, params: Mapping[str, Tensor], touched: Collection[str]
    ) -> list[tuple[Pace, list[str]]]:
        """The paces at a step, each with the parameters that have it. No schedule is called twice.

        Raises:
            RouteError: a parameter has no pace, or two.
        """
        if not self.are_by_selector:
            lr, decay = (rate_at(self.owner, option.name, option.values[""], step) for option in self._options)
            return [(Pace(lr, decay), [*touched])]
        groups = self._groups(params)
        paths: dict[int, list[str]] = {}
        for path in touched:
            if path not in groups.numbers:
                self.check(params, touched)
            paths.setdefault(groups.numbers[path], []).append(path)
        values: dict[int, Rate] = {}
        for number in paths:
            for index in groups.pairs[number]:
                if index not in values:
                    values[index] = rate_at(self.owner, *groups.values[index], step)
        return [
            (Pace(values[groups.pairs[number][0]], values[groups.pairs[number][1]]), each)
            for number, each in paths.items()
        ]

    @property
    def _options(self) -> tuple[Option, Option]:
        return self.lr, self.weight_decay

    def _groups(self, params: Mapping[str, Tensor]) -> Groups:
        paths = tuple(params)
        if paths not in self._known:
            self._known[paths] = self._grouped(params)
        return self._known[paths]

    def _grouped(self, params: Mapping[str, Tensor]) -> Groups:
        numbers: dict[str, int] = {}
        pairs: dict[tuple[int, int], int] = {}
        values: dict[Hashable, tuple[int, tuple[str, LearningRate]]] = {}

        def place(option: Option, value: LearningRate) -> int:
            return values.setdefault(_identity(value), (len(values), (option.name, value)))[0]

        lr_of, decay_of = (option.by_path(params) for option in self._options)
        for path in params:
            lr, decay = lr_of(path), decay_of(path)
            if lr is not None and decay is not None:
                pair = place(self.lr, lr), place(self.weight_decay, decay)
                numbers[path] = pairs.setdefault(pair, len(pairs))
        return Groups(numbers, [*pairs], [value for _, value in values.values()])


def _identity(value: LearningRate) -> Hashable:
    """The same for numbers that are equal, and for schedules; a tensor, or a function of the user's, is only itself."""
    if isinstance(value, Schedule):
        return value
    return float(value) if isinstance(value, int | float) else (id(value),)
