"""The plan: routes resolved against parameters into one frozen loss × parameter table.

Every check of a declaration happens here, and nothing is checked again later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from funcfreeze.declare.ema import Ema, cut_ties, shown_targets
from funcfreeze.declare.overlaps import Overlap, resolve_merge
from funcfreeze.declare.overlaps import told as told_overlaps
from funcfreeze.declare.plan_data import routes_from_data, routes_to_data
from funcfreeze.declare.plan_table import format_plan
from funcfreeze.declare.routes import Declaration, Route, Selection, Weight, declare
from funcfreeze.declare.selectors import Leaf, RouteError, label, resolve, to_selector
from funcfreeze.declare.timing import ALWAYS, Timing
from funcfreeze.merge.rule import PLACES


@dataclass(frozen=True)
class Row:
    """One parameter: all its names, and for each loss that may update it the weights that are added up.

    Attributes:
        names: every path of the parameter, the one it is known by first.
        shape: its shape.
        trainable: False if `requires_grad` was False: frozen for good.
        weights: loss name -> the weights of its routes, in the order the losses were declared; those of the routes that
            are active add up.
        timings: loss name -> when each of these routes is active. Only losses of which one is timed.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    trainable: bool
    weights: Mapping[str, tuple[Weight, ...]]
    timings: Mapping[str, tuple[Timing, ...]] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path the parameter is known by."""
        return self.names[0]

    @property
    def elements(self) -> int:
        """How many numbers the parameter holds."""
        return int(torch.Size(self.shape).numel())

    def __hash__(self) -> int:
        return hash((self.names, self.shape, self.trainable, frozenset(self.weights), frozenset(self.timings.items())))

    def at(self, count: int) -> Row:
        """The row of one count: what is active then, at any time."""
        if not self.timings:
            return self
        active = {
            loss: tuple(
                weight for weight, timing in zip(terms, self.timings[loss], strict=True) if count in timing.counts
            )
            if loss in self.timings
            else terms
            for loss, terms in self.weights.items()
        }
        return replace(self, weights={loss: terms for loss, terms in active.items() if terms}, timings={})


@dataclass(frozen=True)
class FrozenStatistics:
    """Which norms keep their running statistics.

    Attributes:
        norms: the paths of the norms.
        declared: the selectors that they were declared by; not compared.

    >>> print(FrozenStatistics(("backbone.1", "backbone.4"), declared=("backbone",)))
    backbone (2 norms)
    """

    norms: tuple[str, ...]
    declared: tuple[str, ...] = field(compare=False)

    def __str__(self) -> str:
        return f"{', '.join(self.declared)} ({len(self.norms)} norm{'' if len(self.norms) == 1 else 's'})"


@dataclass(frozen=True)
class Plan:
    """The resolved loss × parameter table: which loss may update which parameters, with what weight.

    Printing it shows the table; plans compare by what they say. `frozen_statistics` are the norms that a `Step` keeps
    from moving their running statistics, if it does, `targets` are averaged twins of parts of the model, and `merge`
    says where a rule decides what becomes of the losses' gradients.

    >>> from torch import nn
    >>> net = nn.ModuleDict({"encoder": nn.Linear(4, 2), "head": nn.Linear(2, 1)})
    >>> from funcfreeze.model.sites import module_leaves
    >>> plan = resolve_plan({"cls": "*", "adv": {"encoder": -0.1}}, module_leaves(net))
    >>> print(plan)
    parameter       elements  cls   adv
    encoder.weight         8    1  -0.1
    encoder.bias           2    1  -0.1
    head.weight            2    1     ·
    head.bias              1    1     ·
    cls updates 4 of 4 parameters (13 of 13 elements)
    adv updates 2 of 4 parameters (10 of 13 elements)
    >>> Plan.from_dict(plan.to_dict()) == plan
    True
    """

    losses: tuple[str, ...]
    rows: tuple[Row, ...]
    frozen_statistics: FrozenStatistics | None = None
    targets: tuple[tuple[str, Ema], ...] = ()
    merge: tuple[Overlap, ...] = ()

    def __str__(self) -> str:
        cut = cut_ties(self.targets, (row.names for row in self.rows))
        told = [*shown_targets(self.targets), *cut]
        lines = [format_plan(self.losses, self.rows), *told_overlaps(self.merge, self.rows)]
        lines += [f"targets  {line}" for line in told]
        if self.frozen_statistics is not None:
            lines.append(f"frozen statistics  {self.frozen_statistics}")
        return "\n".join(lines)

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """The paths of all parameters, in the order of the rows."""
        return tuple(row.path for row in self.rows)

    @cached_property
    def routed(self) -> tuple[str, ...]:
        """The paths of the parameters that some loss may update."""
        return tuple(row.path for row in self.rows if row.weights)

    @cached_property
    def timings(self) -> tuple[Timing, ...]:
        """The different timings of routes; none if every route is always active."""
        timed = (timing for row in self.rows for timings in row.timings.values() for timing in timings)
        return tuple(dict.fromkeys(timing for timing in timed if timing != ALWAYS))

    def at(self, count: int) -> Plan:
        """The plan of one count: the routes that are active then, at any time."""
        return Plan(self.losses, tuple(row.at(count) for row in self.rows), merge=self.merge) if self.timings else self

    def to_dict(self) -> dict[str, Any]:
        """Plain data (strings, numbers, lists, dicts), ready for JSON. See `from_dict`."""
        return {
            "losses": list(self.losses),
            "parameters": [
                {
                    "names": list(row.names),
                    "shape": list(row.shape),
                    "trainable": row.trainable,
                    **routes_to_data(row.weights, row.timings),
                }
                for row in self.rows
            ],
            **({} if self.frozen_statistics is None else {"frozen_statistics": _listed(self.frozen_statistics)}),
            **({"targets": {name: target.to_dict() for name, target in self.targets}} if self.targets else {}),
            **({"merge": [overlap.to_dict() for overlap in self.merge]} if self.merge else {}),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote down.

        Raises:
            RouteError: the data is not a plan's, or holds a weight or rule that is a function, which such data cannot.
        """
        try:
            rows = tuple(
                Row(tuple(row["names"]), tuple(row["shape"]), bool(row["trainable"]), *routes_from_data(row))
                for row in data["parameters"]
            )
            frozen = data.get("frozen_statistics")
            statistics = None if frozen is None else FrozenStatistics(tuple(frozen["norms"]), tuple(frozen["declared"]))
            targets = tuple((name, Ema.from_dict(target)) for name, target in data.get("targets", {}).items())
            merge = tuple(map(Overlap.from_dict, data.get("merge", ())))
            return Plan(tuple(data["losses"]), rows, statistics, targets, merge)
        except (KeyError, TypeError, AttributeError) as error:
            raise RouteError(f"this is not a plan's data: {type(error).__name__}: {error}") from error


def _listed(statistics: FrozenStatistics) -> dict[str, list[str]]:
    return {"norms": list(statistics.norms), "declared": list(statistics.declared)}


def resolve_plan(routes: object, leaves: Sequence[Leaf], merge: object = None) -> Plan:
    """Resolve routes against parameters, or check that a `Plan` is one of these very parameters.

    Args:
        routes: loss -> what it may update, or a `Plan`.
        leaves: the parameters.
        merge: a rule, or selector -> rule, for where losses meet; None for those of the plan, if it is one.

    Raises:
        TypeError: something in `merge` is no rule.
        RouteError: everything that is wrong with the declaration, at once.
    """
    if isinstance(routes, Plan):
        return _merging(_of_these_parameters(routes, leaves), leaves, merge)
    if not isinstance(routes, Mapping) or not routes:
        shown = "an empty one" if isinstance(routes, Mapping) else f"{type(routes).__name__}: {routes!r}"
        raise RouteError(f'routes are a mapping such as {{"cls": "*", "adv": "encoder"}}, got {shown}')
    problems: list[str] = []
    claimed_by: list[dict[str, list[Route]]] = [{} for _ in leaves]
    for loss, given in routes.items():
        if not isinstance(loss, str):
            problems.append(f"a loss is named by a string, got {type(loss).__name__}: {loss!r}")
            continue
        try:
            declaration = declare(given)
        except RouteError as error:
            problems.append(f"loss {loss!r}: {error}")
            continue
        claims, found = _claims(declaration, leaves)
        problems += [f"loss {loss!r}: {problem}" for problem in found]
        for index, claimed in claims.items():
            claimed_by[index][loss] = claimed
    raise_problems(problems)
    rows = tuple(_row(leaf, claimed) for leaf, claimed in zip(leaves, claimed_by, strict=True))
    return _merging(Plan(tuple(routes), rows), leaves, merge)


def _merging(plan: Plan, leaves: Sequence[Leaf], merge: object) -> Plan:
    """The plan with merge rules."""
    found = tuple(resolve_merge(merge, leaves, plan.rows, plan.losses))
    if merge is None or found == plan.merge:
        return plan
    if plan.merge:
        had = ", ".join(f"{overlap.label}: {overlap.rule}" for overlap in plan.merge)
        raise RouteError(f"the plan has merge rules already ({had}); give merge= when it is made, or here, not both")
    return replace(plan, merge=found)


def _row(leaf: Leaf, claimed: Mapping[str, Sequence[Route]]) -> Row:
    """A parameter's row, given each loss's routes to it."""
    weights = {loss: tuple(route.weight for route in routes) for loss, routes in claimed.items()}
    timings = {loss: tuple(route.timing for route in routes) for loss, routes in claimed.items()}
    timed = {loss: given for loss, given in timings.items() if any(timing != ALWAYS for timing in given)}
    return Row(leaf.names, tuple(leaf.tensor.shape), leaf.trainable, weights, timed)


def refuse_what_steps_do(routes: object) -> None:
    """Refuse a plan that freezes statistics, or has targets, where the user calls the model and the optimizer.

    Raises:
        RouteError: naming the norms, or the targets.
    """
    if isinstance(routes, Plan) and routes.targets:
        raise RouteError(
            f"the plan has targets ({', '.join(name for name, _ in routes.targets)}), which a Step moves after its "
            "update; here the update is yours: give the routes, or a plan of funcfreeze.plan(model, routes)"
        )
    if isinstance(routes, Plan) and routes.frozen_statistics is not None:
        raise RouteError(
            f"the plan freezes the running statistics of {', '.join(routes.frozen_statistics.norms)}, which a Step "
            "does while it calls the model; here you call it: put these norms into eval mode yourself (norm.eval()), "
            "and give the routes, or a plan of funcfreeze.plan(model, routes)"
        )


def refuse_rules_of_steps(plan: Plan) -> None:
    """Refuse a plan whose merge rules keep a state, or that look at activations, where there is no `Step` for them.

    Raises:
        RouteError: naming each.
    """
    raise_problems(
        [
            f"merge {overlap.label!r}: {overlap.rule} keeps a state from step to step, and there is none here; use it "
            "in a Step, whose State holds it"
            for overlap in plan.merge
            if overlap.rule.init is not None
        ]
        + [
            f"merge {overlap.label!r}: {overlap.rule} looks at activations, which takes a graph of which all hooks are "
            "known: use it in a Step, or at='parameters'"
            for overlap in plan.merge
            if overlap.rule.at != PLACES[0]
        ]
    )


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one `RouteError` that lists all problems, or nothing if there is none."""
    if len(problems) == 1:
        raise RouteError(problems[0])
    if problems:
        raise RouteError("\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)]))


def _claims(declaration: Declaration, leaves: Sequence[Leaf]) -> tuple[dict[int, list[Route]], list[str]]:
    """Which of one loss's routes claim each leaf, and what is wrong with them."""
    claims: dict[int, list[Route]] = {}
    mistimed = [route.timing_problem for route in declaration.routes if route.timing_problem is not None]
    problems = mistimed[:]
    for route in declaration.routes:
        chosen: set[int] = set()
        for selector in route.selectors:
            found, wrong = resolve(selector, leaves)
            chosen |= found
            problems += wrong
        for index in sorted(chosen):
            claims.setdefault(index, []).append(route)
    for index, claimed in claims.items():
        if len(claimed) > 1 and not mistimed:
            problems += _conflicts(leaves[index], claimed, declaration.exclusive)
    return claims, problems


def _conflicts(leaf: Leaf, claimed: Sequence[Route], exclusive: bool) -> list[str]:
    """What is wrong with several routes of one loss that claim one parameter."""
    tied = f" (one parameter, tied as {' = '.join(leaf.names)})" if len(leaf.names) > 1 else ""
    entries = " and ".join(_shown(route) for route in claimed)
    if exclusive:
        return [
            f"{leaf.path}{tied} is claimed by {len(claimed)} entries, {entries}; take it out of all but one, as in "
            'path("*") - "encoder"'
        ]
    names = [frozenset(name for name in leaf.names if _claims_name(route, leaf, name)) for route in claimed]
    contradict = any(
        (one.weight != other.weight or one.timing != other.timing) and not (names[i] & names[j])
        for i, one in enumerate(claimed)
        for j, other in enumerate(claimed[:i])
    )
    if contradict:
        return [
            f"{leaf.path}{tied} has contradictory routes by its different names: {entries}; route it by one name only"
        ]
    return []


def _claims_name(route: Route, leaf: Leaf, name: str) -> bool:
    return any(selector.matches(replace(leaf, names=(name,))) for selector in route.selectors)


def _shown(route: Route) -> str:
    when = "" if route.timing == ALWAYS else f" {route.timing}"
    return f"{' | '.join(label(selector) for selector in route.selectors)!r}: {route.weight!r}{when}"


def _of_these_parameters(plan: Plan, leaves: Sequence[Leaf]) -> Plan:
    """The plan in the order of these leaves; where they are not the parameters it was resolved against, an error."""
    planned = {row.path: row for row in plan.rows}
    present = {leaf.path: leaf for leaf in leaves}
    problems = [f"the plan has {path}, the model does not" for path in planned if path not in present]
    problems += [f"the model has {path}, the plan does not" for path in present if path not in planned]
    for path in planned.keys() & present.keys():
        row, leaf = planned[path], present[path]
        if row.shape != tuple(leaf.tensor.shape):
            problems.append(f"{path} has shape {row.shape} in the plan and {tuple(leaf.tensor.shape)} in the model")
        if row.names != leaf.names:
            problems.append(f"{path} is tied as {row.names} in the plan and as {leaf.names} in the model")
        if row.weights and not leaf.trainable:
            problems.append(f"{path} is routed in the plan and frozen in the model (requires_grad is False)")
    raise_problems(problems)
    return replace(plan, rows=tuple(planned[leaf.path] for leaf in leaves))


def chosen(selection: Selection | None, leaves: Sequence[Leaf], noun: str) -> frozenset[int]:
    """The indices of the leaves that a selector, or a list of them, stands for; none for None.

    Raises:
        RouteError: everything that is wrong with the selectors, each told as the noun's.
    """
    if selection is None:
        return frozenset()
    selectors: Sequence[Any] = selection if isinstance(selection, list | tuple) else [selection]
    resolved = [resolve(to_selector(selector), leaves) for selector in selectors]
    raise_problems([f"{noun}: {problem}" for _, problems in resolved for problem in problems])
    return frozenset(index for found, _ in resolved for index in found)
