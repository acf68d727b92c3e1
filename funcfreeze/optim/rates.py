"""A learning rate or a weight decay as it was given: one for all parameters, or by selector."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from funcfreeze.declare.selectors import Leaf, RouteError
from funcfreeze.optim.choice import BySelector, Choice, Found, by_label
from funcfreeze.optim.hyperparameters import LearningRate, check_rate
from funcfreeze.optim.transform import lines

Rates = LearningRate | BySelector[LearningRate]
"""One for all parameters, or a mapping from selectors."""


@dataclass(frozen=True, eq=False)
class Option:
    """A learning rate or a weight decay of every parameter, as it was given.

    Attributes:
        name: of the option.
        values: by the label of the selector; without selectors the only one, by no name.
        choice: the selectors, or None.
        rest: for parameters that no selector takes; None if there may be none.
    """

    name: str
    values: Mapping[str, LearningRate]
    choice: Choice | None
    rest: LearningRate | None

    @staticmethod
    def of(owner: str, name: str, given: Rates, rest: LearningRate | None) -> Option:
        """Check what was given.

        Raises:
            TypeError, ValueError: it is neither a rate nor a mapping from selectors; tells all that is wrong in one.
        """
        if isinstance(given, list | tuple):
            raise TypeError(
                f"{owner}: {name} is one rate, or a mapping from selectors such as "
                f'{{"encoder": 1e-5, "head": 1e-3}} where torch.optim has parameter groups; got {given!r}'
            )
        if not isinstance(given, Mapping):
            check_rate(owner, name, given)
            return Option(name, {"": given}, None, None)
        values, choice, twice = by_label(given)
        problems = [f"{label}: written twice" for label in twice]
        for label, value in values.items():
            try:
                check_rate(owner, f"{name}[{label!r}]", value)
            except (TypeError, ValueError) as error:
                problems.append(str(error).removeprefix(f"{owner}: "))
        if not values and rest is None:
            problems.append("it is empty, and every parameter needs one")
        if problems:
            head = f"{owner}: {name} is a mapping selector -> number, 0-d tensor or schedule:"
            raise RouteError(lines(head, problems))
        return Option(name, values, choice, rest)

    @property
    def is_bound(self) -> bool:
        """Whether nothing is chosen, or only among a model's parameters."""
        return self.choice is None or self.choice.bound is not None

    def bind(self, leaves: Sequence[Leaf]) -> Option:
        """The same, with its selectors bound to a model's parameters."""
        return self if self.choice is None else replace(self, choice=self.choice.bind(leaves))

    def by_path(self, params: Mapping[str, Tensor]) -> Callable[[str], LearningRate | None]:
        """From the path of a parameter to what was given for it; to None where that is not clear."""
        if self.choice is None:
            return lambda path: self.values[""]
        takers = self.choice.among(params).takers

        def value(path: str) -> LearningRate | None:
            labels = takers.get(path)
            if labels is None or len(labels) > 1:
                return None
            return self.values[labels[0]] if labels else self.rest

        return value

    def problems(self, params: Mapping[str, Tensor], paths: Collection[str], are_all: bool) -> Iterator[str]:
        """What is wrong with the selectors.

        Args:
            params: all parameters.
            paths: those that are to be updated.
            are_all: whether no others are ever updated.
        """
        if self.choice is None:
            return
        found = self.choice.among(params)
        for wrong in found.problems.values():
            yield from wrong
        if strangers := [path for path in paths if path not in found.takers]:
            yield f"bound to other parameters; these are unknown: {', '.join(strangers)}"
        disputed: dict[tuple[str, ...], list[str]] = {}
        for path in paths:
            if len(found.takers.get(path, ())) > 1:
                disputed.setdefault(found.takers[path], []).append(path)
        for labels, those in disputed.items():
            yield (
                f"{', '.join(those)}: claimed by {' and '.join(labels)}; take one from the other, as in "
                'ff.path("*") - "encoder"'
            )
        bare = [path for path in paths if found.takers.get(path) == ()]
        if bare and self.rest is None:
            yield f"{', '.join(bare)}: claimed by none of {', '.join(self.values)}"
        if are_all:
            yield from self._idle(found, paths)

    def _idle(self, found: Found, paths: Collection[str]) -> Iterator[str]:
        for label in self.values:
            taken = [path for path, labels in found.takers.items() if label in labels]
            if label not in found.problems and not set(taken) & set(paths):
                shown = ", ".join(taken[:3]) + (f" and {len(taken) - 3} more" if len(taken) > 3 else "")
                yield f"{label} takes only what nothing updates ({shown}); leave it out, or route a loss there"
