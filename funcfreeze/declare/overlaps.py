"""Where losses meet under a merge rule: which parameters one rule decides about, and whose gradients it is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from funcfreeze.declare.routes import Weight
from funcfreeze.declare.selectors import Leaf, RouteError, Selector, label, resolve, to_selector
from funcfreeze.merge import BY_NAME
from funcfreeze.merge.rule import PLACES, Rule, checked_rule

Merge = Rule | Mapping[str, Rule] | Mapping[Selector, Rule] | Mapping[Selector | str, Rule]
"""A bare rule for all parameters, or a rule for each selector."""


class Routed(Protocol):
    """What has to be known of a parameter."""

    @property
    def path(self) -> str: ...
    @property
    def elements(self) -> int: ...
    @property
    def weights(self) -> Mapping[str, tuple[Weight, ...]]: ...


@dataclass(frozen=True)
class Overlap:
    """The parameters of one entry of `merge=` that two or more losses may update: one joint decision.

    Attributes:
        label: the selector of the entry.
        rule: what decides.
        paths: of the parameters; empty where no two losses meet.
        losses: those that may update one of them, in the order of the plan.
    """

    label: str
    rule: Rule
    paths: tuple[str, ...]
    losses: tuple[str, ...]

    @property
    def kept_under(self) -> str:
        """What the state of the rule is called: that of other losses is another one."""
        return f"{self.rule.name}: {', '.join(self.losses)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a rule of the user's own is written down as what it looks like."""
        known = {"rule": self.rule.name, "options": self.rule.options}
        is_ours = self.rule.name in BY_NAME and type(self.rule.decide).__module__.startswith("funcfreeze.merge.")
        rule = known if is_ours else {"function": repr(self.rule)}
        return {"selector": self.label, **rule, "parameters": list(self.paths), "losses": list(self.losses)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Overlap:
        """What `to_dict` wrote down.

        Raises:
            RouteError: a rule that was a function.
        """
        if "function" in data:
            raise RouteError(
                f"the merge rule {data['function']} of {data['selector']!r} was a function, which plain data cannot "
                "hold; use a rule of funcfreeze.merge, or resolve the plan anew"
            )
        rule = BY_NAME[data["rule"]](**data["options"])
        return Overlap(data["selector"], rule, tuple(data["parameters"]), tuple(data["losses"]))


def resolve_merge(
    merge: object, leaves: Sequence[Leaf], rows: Sequence[Routed], losses: Sequence[str]
) -> list[Overlap]:
    """The overlaps of a declaration.

    Args:
        merge: a rule, a mapping selector -> rule, or None.
        leaves: the parameters as selectors see them.
        rows: the same parameters with their routes.
        losses: in the order of the plan.

    Raises:
        TypeError: something in it is no rule.
        RouteError: everything that is wrong with the selectors, at once.
    """
    if merge is None:
        return []
    given = merge if isinstance(merge, Mapping) else {"*": merge}
    titles = [label(selector) if isinstance(selector, str | Selector) else repr(selector) for selector in given]
    rules = [checked_rule(rule, f"merge[{title!r}]") for title, rule in zip(titles, given.values(), strict=True)]
    overlaps: list[Overlap] = []
    problems: list[str] = []
    claimed: dict[int, list[str]] = {}
    for title, selector, rule in zip(titles, given, rules, strict=True):
        try:
            chosen, wrong = resolve(to_selector(selector), leaves)
        except RouteError as error:
            chosen, wrong = frozenset(), [str(error)]
        problems += [f"merge: {problem}{_hint(selector, losses)}" for problem in wrong]
        for index in chosen:
            claimed.setdefault(index, []).append(title)
        met = [rows[index] for index in sorted(chosen) if len(rows[index].weights) > 1]
        there = tuple(loss for loss in losses if any(loss in row.weights for row in met))
        overlaps.append(Overlap(title, rule, tuple(row.path for row in met), there))
    twice = {index: titles for index, titles in claimed.items() if len(titles) > 1 and rows[index].weights}
    problems += [
        f"merge: {rows[index].path} is claimed by {len(titles)} entries, {' and '.join(map(repr, titles))}; take it "
        'out of all but one, as in path("*") - "encoder"'
        for index, titles in sorted(twice.items())
    ]
    if len(problems) > 1:
        raise RouteError("\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)]))
    if problems:
        raise RouteError(problems[0])
    return overlaps


def _hint(selector: object, losses: Sequence[str]) -> str:
    """What a key that selects nothing may have been meant for."""
    if isinstance(selector, str) and selector in losses:
        meant = "the keys of merge= select parameters: a rule is for all losses that meet there"
        return f"; {selector!r} is a loss, and {meant}"
    if isinstance(selector, tuple | frozenset) and selector and all(isinstance(part, str) for part in selector):
        joined = " | ".join(f'path("{part}")' for part in selector)
        return f"; for one decision about all of these, {joined}; for one each, an entry each"
    return ""


def refuse_crossings(overlaps: Sequence[Overlap], why: str) -> None:
    """Refuse rules that decide above parameters.

    Raises:
        ValueError: naming them.
    """
    labels = [one.label for one in overlaps if one.paths and one.rule.at != PLACES[0]]
    if labels:
        raise ValueError(f"merge {', '.join(map(repr, labels))}: at='activations' decides where losses meet, {why}")


def eager_rules(overlaps: Sequence[Overlap]) -> list[str]:
    """The rules that cannot be compiled, in words."""
    return [f"merge {one.label!r}: {one.rule}" for one in overlaps if one.paths and not one.rule.compiles]


def told(overlaps: Sequence[Overlap], rows: Sequence[Routed]) -> Iterator[str]:
    """A line for the plan's table about each overlap."""
    known = {row.path: row for row in rows}
    for overlap in overlaps:
        here = [known[path] for path in overlap.paths]
        if not here:
            yield f"merge  {overlap.label}: {overlap.rule} has nothing to do, since no two losses meet there"
            continue
        elements = f"{sum(row.elements for row in here):,}"
        noun = "parameter" if len(here) == 1 else "parameters"
        weighted = [loss for loss in overlap.losses if any(row.weights.get(loss, (1.0,)) != (1.0,) for row in here)]
        also = f", {' and '.join(weighted)} with {'its' if len(weighted) == 1 else 'their'} weight" if weighted else ""
        where = f"{len(here)} {noun} ({elements} elements)"
        yield f"merge  {overlap.label}: {overlap.rule} on {where}, where {', '.join(overlap.losses)} meet{also}"
