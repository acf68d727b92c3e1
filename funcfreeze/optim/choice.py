"""What is given by selector, `{"encoder": ..., "*.bias": ...}`: which of the entries take which parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from funcfreeze.declare.selectors import Leaf, Selector, label, resolve, to_selector

Value = TypeVar("Value")

BySelector = Mapping[str, Value] | Mapping[Selector, Value] | Mapping[Selector | str, Value]
"""A mapping from selectors, or strings that stand for them."""


@dataclass(frozen=True, eq=False)
class Found:
    """Which entries take which parameters.

    Attributes:
        takers: path -> the labels of all entries whose selector takes it.
        problems: label -> what is wrong with its selector, for those with which anything is.
    """

    takers: Mapping[str, tuple[str, ...]]
    problems: Mapping[str, list[str]]


@dataclass(frozen=True, eq=False)
class Choice:
    """Selectors by their labels, and what they take.

    Attributes:
        selectors: label -> selector.
        bound: what they take of a model's parameters, whose ties and module types a bare pytree cannot tell; None
            where they are not bound to a model.
    """

    selectors: Mapping[str, Selector]
    bound: Found | None = None
    _known: dict[tuple[str, ...], Found] = field(default_factory=dict)

    def bind(self, leaves: Sequence[Leaf]) -> Choice:
        """The same, bound to a model's parameters."""
        return replace(self, bound=self._resolved(leaves), _known={})

    def among(self, params: Mapping[str, Tensor]) -> Found:
        """Which of the entries take these parameters, or those of the model that they are bound to."""
        if self.bound is not None:
            return self.bound
        # Matching is slow and its answer depends on the paths: once for each set of parameters, not at each step.
        paths = tuple(params)
        if paths not in self._known:
            self._known[paths] = self._resolved([Leaf((path,), param) for path, param in params.items()])
        return self._known[paths]

    def _resolved(self, leaves: Sequence[Leaf]) -> Found:
        found = {name: resolve(selector, leaves) for name, selector in self.selectors.items()}
        takers = {
            leaf.path: tuple(name for name, (chosen, _) in found.items() if index in chosen)
            for index, leaf in enumerate(leaves)
        }
        return Found(takers, {name: problems for name, (_, problems) in found.items() if problems})


def by_label(given: BySelector[Value]) -> tuple[dict[str, Value], Choice, list[str]]:
    """The values by the labels of their selectors, the selectors, and the labels that are written twice.

    Raises:
        RouteError: a key is no selector.

    >>> by_label({"encoder": 1e-4, "head": 1e-3})[0]
    {'encoder': 0.0001, 'head': 0.001}
    """
    labels = [label(key) for key in given]
    values = dict(zip(labels, given.values(), strict=True))
    selectors = dict(zip(labels, map(to_selector, given), strict=True))
    return values, Choice(selectors), [name for name in selectors if labels.count(name) > 1]
