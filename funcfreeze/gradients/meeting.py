"""Where losses meet under rules: each is shown the gradients that were kept apart, and what it decides is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcfreeze.declare.plan import raise_problems
from funcfreeze.gradients.law import Place, Routing
from funcfreeze.merge.rows import Rows, diagonal
from funcfreeze.merge.rule import Meeting, Rule, RuleState

Apart = Sequence[Mapping[int, Tensor]]
"""For each loss, leaf -> its gradient."""


class Met(NamedTuple):
    """What was seen where losses met, and what became of it. All float64, for all N losses that may meet there.

    Attributes:
        losses: their names.
        norms: (N,), of their gradients; NaN where a loss was absent, or touched nothing there. So is all below.
        cosines: (N, N), of the angles between them.
        weights: (N,), what the rule gave each; NaN where it gives the merged gradient itself.
        shares: (N,), how much of the merged gradient's squared length comes from each; they sum to 1. NaN as `weights`.
        state: what the rule keeps from here on.
    """

    losses: tuple[str, ...]
    norms: Tensor
    cosines: Tensor
    weights: Tensor
    shares: Tensor
    state: RuleState


def meet(
    routing: Routing,
    apart: Apart,
    values: Mapping[str, Tensor],
    step: Tensor | None,
    states: Mapping[str, RuleState],
    unit: Tensor | None = None,
) -> tuple[dict[int, Tensor], dict[str, Met]]:
    """What the rules make of gradients that were kept apart.

    A loss that has none there has no row. Of one row left it is that; where there is none, nothing was touched.

    Args:
        routing: where losses meet.
        apart: their gradients, weighted.
        values: the losses by name, unweighted.
        step: the number of steps taken so far; None if nobody counts.
        states: label of an overlap -> what its rule keeps.
        unit: what all gradients were multiplied with, before a rule is to see them (see `Rows`).

    Returns:
        leaf -> merged gradient, and label -> what was seen.

    Raises:
        RouteError: sparse gradients, naming all.
        ValueError, TypeError: what a rule gave is of another form.
    """
    raise_problems([*_sparse_problems(routing, apart)])
    merged: dict[int, Tensor] = {}
    seen: dict[str, Met] = {}
    for place in routing.places:
        rows = [loss for loss in place.losses if any(leaf in apart[loss] for leaf in place.leaves)]
        if rows:
            gradients = Rows([[apart[loss].get(leaf) for leaf in place.leaves] for loss in rows], unit)
            state = states.get(place.label, {})
            found, seen[place.label] = _decided(place, rows, routing, gradients, values, step, state)
            merged |= {leaf: g for leaf, g in zip(place.leaves, found, strict=True) if g is not None}
    return merged, seen


def _decided(
    place: Place,
    present: Sequence[int],
    routing: Routing,
    rows: Rows,
    values: Mapping[str, Tensor],
    step: Tensor | None,
    state: RuleState,
) -> tuple[list[Tensor | None], Met]:
    """The merged gradients of one overlap, and what was seen there."""
    names = tuple(routing.losses[loss] for loss in present)
    there = torch.stack([values[name].detach().to(rows.device, torch.float64) for name in names])
    places = tuple(place.losses.index(loss) for loss in present)
    count = _count(place.rule, step, rows.device)
    meeting = Meeting(names, places, len(place.losses), there, count, state, rows)
    merged, weights, after = decided(place, meeting)
    everyone = tuple(routing.losses[loss] for loss in place.losses)
    return merged, seen_in(rows, everyone, places, weights, after, is_added_up=False)


def decided(place: Place, meeting: Meeting) -> tuple[list[Tensor | None], Tensor | None, RuleState]:
    """The merged gradient for each leaf, the weights (K,) if the rule gives some, and its new state."""
    rule, rows = place.rule, meeting.rows
    if len(meeting.losses) == 1:
        return [*rows.gradients[0]], torch.ones_like(meeting.values), meeting.state
    try:
        given, after = rule.decide(meeting), meeting.state
    except Exception as error:
        error.add_note(f"in the merge rule {rule} for {place.label!r}, where {', '.join(meeting.losses)} meet")
        raise
    if rule.init is not None:
        given, after = _pair(place, given)
        _check_state(place, meeting.state, after)
    if rule.weights is None:
        matrix = meeting.matrix
        _check(place, given, (matrix.shape[1],), "a merged gradient", "meeting.matrix has so many columns")
        return rows.parted(given), None, after
    _check(place, given, (len(meeting.losses),), "weights", f"the losses here are {', '.join(meeting.losses)}")
    weights = given.to(rows.device, torch.float64)
    # what a rule is shown is finite; where gradients are not, neither is what they become
    weights = torch.where(rows.gramian.isfinite().all(), weights, torch.nan)
    return rows.weighted(weights), weights, after


def seen_in(
    rows: Rows,
    losses: tuple[str, ...],
    places: tuple[int, ...],
    weights: Tensor | None = None,
    state: RuleState | None = None,
    *,
    is_added_up: bool = True,
) -> Met:
    """What is seen where losses meet.

    Args:
        rows: the gradients of those that have some.
        losses: the names of all that may meet there.
        places: of each row its place among these.
        weights: of the rows; None for those of a sum, or for none.
        state: what a rule keeps.
        is_added_up: whether no weights are those of a sum.
    """
    gramian = rows.gramian
    norms = diagonal(gramian).sqrt()
    cosines = gramian / (norms[:, None] * norms)
    given = weights if weights is not None else torch.full_like(norms, 1.0 if is_added_up else torch.nan)
    parts = given * (gramian @ given)
    found = [norms, given, parts / parts.sum()]
    if len(losses) > len(places):
        found = [_spread(values, places, len(losses)) for values in found]
        cosines = _spread(torch.stack([_spread(row, places, len(losses)) for row in cosines]), places, len(losses))
    return Met(losses, found[0], cosines, found[1], found[2], state or {})


def _spread(values: Tensor, places: Sequence[int], number: int) -> Tensor:
    """The rows of a tensor at these places of so many, NaN at the others."""
    nothing = torch.full_like(values[0], torch.nan)
    row_at = dict(zip(places, values, strict=True))
    return torch.stack([row_at.get(place, nothing) for place in range(number)])


def _count(rule: Rule, step: Tensor | None, device: torch.device) -> Tensor:
    """The count of steps; where nobody counts, random rules draw one from torch's global generator."""
    if step is not None:
        return step.to(device)
    if not rule.is_random:
        return torch.zeros((), dtype=torch.int64, device=device)
    return torch.randint(2**31, (), device=device)


def _sparse_problems(routing: Routing, apart: Apart) -> Iterator[str]:
    for place in routing.places:
        for leaf in place.leaves:
            losses = [routing.losses[loss] for loss in place.losses if _is_sparse(apart[loss].get(leaf))]
            if losses:
                yield (
                    f"merge {place.label!r}: the gradient of {routing.paths[leaf]} is sparse ({', '.join(losses)}), "
                    "and a rule takes dense ones; make it dense (sparse=False), or take it out of the rule, as in "
                    f'path("*") - "{routing.paths[leaf]}"'
                )


def _is_sparse(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout is not torch.strided


def _check(place: Place, given: Any, shape: tuple[int, ...], what: str, why: str) -> None:
    if not isinstance(given, Tensor):
        pair = "; only a rule with `init` returns a pair" if isinstance(given, tuple) else ""
        raise TypeError(
            f"merge {place.label!r}: {place.rule} gives {what} as a tensor, it gave {type(given).__name__}{pair}"
        )
    if tuple(given.shape) != shape or not given.is_floating_point():
        raise ValueError(
            f"merge {place.label!r}: {place.rule} gives {what} of shape {shape} and a floating dtype ({why}), it gave "
            f"shape {tuple(given.shape)} and {given.dtype}"
        )


def _pair(place: Place, given: Any) -> tuple[Any, Any]:
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[1], Mapping):
        shown = f"a tuple of {len(given)}" if isinstance(given, tuple) else type(given).__name__
        raise TypeError(
            f"merge {place.label!r}: {place.rule} has a state, so it returns a pair: what it decides, and the new "
            f"state as a mapping; it returned {shown}"
        )
    return given


def _check_state(place: Place, before: RuleState, after: Mapping[str, Any]) -> None:
    problems = [f"{name} is gone" for name in before if name not in after]
    problems += [f"{name} is new" for name in after if name not in before]
    problems += [
        f"{name} was {_form(kept)} and became {_form(after[name])}"
        for name, kept in before.items()
        if name in after and _form(kept) != _form(after[name])
    ]
    if problems:
        raise ValueError(
            f"merge {place.label!r}: the state of {place.rule} keeps its form from step to step: {'; '.join(problems)}"
        )


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} {value.dtype}"
