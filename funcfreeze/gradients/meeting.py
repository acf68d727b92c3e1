"""Where losses meet under rules: each is shown the gradients that were kept apart, and what it decides is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from funcfreeze.declare.plan import raise_problems
from funcfreeze.gradients.law import Place, Routing
from funcfreeze.merge.deciding import Met, decided, seen_in
from funcfreeze.merge.rows import Rows
from funcfreeze.merge.rule import Meeting, Rule, RuleState

Apart = Sequence[Mapping[int, Tensor]]
"""For each loss, leaf -> its gradient."""


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
            found, seen[place.label] = _decided(place, rows, routing.losses, gradients, values, step, state)
            merged |= {leaf: g for leaf, g in zip(place.leaves, found, strict=True) if g is not None}
    return merged, seen


def cross(
    place: Place,
    cotangents: Mapping[int, Sequence[Tensor | None]],
    losses: Sequence[str],
    values: Mapping[str, Tensor],
    step: Tensor | None,
    unit: Tensor | None,
) -> tuple[list[Tensor | None], Met]:
    """What a rule makes of cotangents where losses meet.

    Args:
        place: which rule, and for whom.
        cotangents: of each loss that is there, one for every input of the node at which they meet.
        losses: the names of all losses.
        values: the losses by name, unweighted.
        step: the number of steps taken so far; None if nobody counts.
        unit: what all cotangents were multiplied with.
    """
    present = [loss for loss in place.losses if loss in cotangents]
    rows = Rows([cotangents[loss] for loss in present], unit)
    return _decided(place, present, losses, rows, values, step, {})


def _decided(
    place: Place,
    present: Sequence[int],
    losses: Sequence[str],
    rows: Rows,
    values: Mapping[str, Tensor],
    step: Tensor | None,
    state: RuleState,
) -> tuple[list[Tensor | None], Met]:
    """The merged gradients of one overlap, and what was seen there."""
    names = tuple(losses[loss] for loss in present)
    there = torch.stack([values[name].detach().to(rows.device, torch.float64) for name in names])
    places = tuple(place.losses.index(loss) for loss in present)
    count = _count(place.rule, step, rows.device)
    meeting = Meeting(names, places, len(place.losses), there, count, state, rows)
    merged, weights, after = decided(place.rule, place.label, meeting)
    everyone = tuple(losses[loss] for loss in place.losses)
    return merged, seen_in(rows, everyone, places, weights, after, is_added_up=False)


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
