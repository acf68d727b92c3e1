"""A rule's decision, checked, and what was seen on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcfreeze.merge.rows import Rows, diagonal
from funcfreeze.merge.rule import Meeting, Rule, RuleState


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


def decided(rule: Rule, label: str, meeting: Meeting) -> tuple[list[Tensor | None], Tensor | None, RuleState]:
    """The merged gradient for each leaf, the weights (K,) if the rule gives some, and its new state."""
    rows = meeting.rows
    if len(meeting.losses) == 1:
        return [*rows.gradients[0]], torch.ones_like(meeting.values), meeting.state
    try:
        given, after = rule.decide(_apart(meeting)), meeting.state
    except Exception as error:
        error.add_note(f"in the merge rule {rule} for {label!r}, where {', '.join(meeting.losses)} meet")
        raise
    if rule.init is not None:
        given, after = _pair(rule, label, given)
        _check_state(rule, label, meeting.state, after)
    # what a rule is shown is finite; where gradients are not, neither is what they become
    is_finite = rows.gramian.isfinite().all()
    if rule.weights is None:
        _check(rule, label, given, (rows.width,), "a merged gradient", "meeting.matrix has so many columns")
        return rows.parted(torch.where(is_finite.to(given.device), given, torch.nan)), None, after
    _check(rule, label, given, (len(meeting.losses),), "weights", f"the losses here are {', '.join(meeting.losses)}")
    weights = given.to(rows.device, torch.float64)
    weights = torch.where(is_finite, weights, torch.nan)
    return rows.weighted(weights), weights, after


def _apart(meeting: Meeting) -> Meeting:
    """With a state of its own, which a rule may write to: the other one may be needed as it was."""
    return replace(meeting, state={name: kept.clone() for name, kept in meeting.state.items()})


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


def _check(rule: Rule, label: str, given: Any, shape: tuple[int, ...], what: str, why: str) -> None:
    if not isinstance(given, Tensor):
        pair = "; only a rule with `init` returns a pair" if isinstance(given, tuple) else ""
        raise TypeError(f"merge {label!r}: {rule} gives {what} as a tensor, it gave {type(given).__name__}{pair}")
    if tuple(given.shape) != shape or not given.is_floating_point():
        raise ValueError(
            f"merge {label!r}: {rule} gives {what} of shape {shape} and a floating dtype ({why}), it gave "
            f"shape {tuple(given.shape)} and {given.dtype}"
        )


def _pair(rule: Rule, label: str, given: Any) -> tuple[Any, Any]:
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[1], Mapping):
        shown = f"a tuple of {len(given)}" if isinstance(given, tuple) else type(given).__name__
        raise TypeError(
            f"merge {label!r}: {rule} has a state, so it returns a pair: what it decides, and the new "
            f"state as a mapping; it returned {shown}"
        )
    return given


def _check_state(rule: Rule, label: str, before: RuleState, after: Mapping[str, Any]) -> None:
    problems = [f"{name} is gone" for name in before if name not in after]
    problems += [f"{name} is new" for name in after if name not in before]
    problems += [
        f"{name} was {_form(kept)} and became {_form(after[name])}"
        for name, kept in before.items()
        if name in after and _form(kept) != _form(after[name])
    ]
    if problems:
        raise ValueError(
            f"merge {label!r}: the state of {rule} keeps its form from step to step: {'; '.join(problems)}"
        )


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} {value.dtype}"
