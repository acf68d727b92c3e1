"""Where losses meet: the norms of their gradients, the angles between them, and the share of each, for a reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcfreeze.computation.half import Half
from funcfreeze.declare.plan import Plan, Row
from funcfreeze.declare.plan_table import group_rows
from funcfreeze.merge.deciding import Met, seen_in
from funcfreeze.merge.rows import Rows
from funcfreeze.merge.rule import PLACES


@dataclass(frozen=True)
class Conflict:
    """What was seen over some parameters. NaN where a loss was absent, or touched none of them.

    Attributes:
        losses: the losses that may update them.
        paths: of the parameters.
        elements: how many numbers these hold.
        at: "parameters"; or "activations", where what was seen are the losses' cotangents above the parameters.
        norms: loss -> the length of its gradient, weights applied.
        shares: loss -> how much of the merged gradient's squared length comes from it; they sum to 1. NaN under a rule
            that gives the merged gradient itself.
        cosines: loss -> loss -> the cosine of the angle between their gradients.
    """

    losses: tuple[str, ...]
    paths: tuple[str, ...]
    elements: int
    norms: Mapping[str, float]
    shares: Mapping[str, float]
    cosines: Mapping[str, Mapping[str, float]]
    at: str = PLACES[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "losses": list(self.losses),
            "paths": list(self.paths),
            "elements": self.elements,
            "at": self.at,
            "norms": dict(self.norms),
            "shares": dict(self.shares),
            "cosines": {loss: dict(row) for loss, row in self.cosines.items()},
        }


class Conflicts(dict[str, Conflict]):
    """Name of an overlap -> what was seen there. Printing it shows a table.

    >>> one = Conflict(("a", "b"), ("w",), 3, {"a": 1.0, "b": 2.0}, {"a": 0.25, "b": 0.75},
    ...                {"a": {"a": 1.0, "b": -0.5}, "b": {"a": -0.5, "b": 1.0}})
    >>> print(Conflicts({"trunk": one}))
    trunk (1 parameter, 3 elements)
       norm  share      a      b
    a     1   0.25   1.00  -0.50
    b     2   0.75  -0.50   1.00
    >>> print(Conflicts())
    no two losses meet
    """

    def __str__(self) -> str:
        return "\n".join(line for name, one in self.items() for line in _table(name, one)) or "no two losses meet"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: one.to_dict() for name, one in self.items()}


def conflicts_of(half: Half, plan: Plan) -> Conflicts:
    """What a half with each loss's gradients shows."""
    ruled = {path for overlap in plan.merge for path in overlap.paths}
    rows = {row.path: row for row in plan.rows}
    found = Conflicts()
    for overlap in plan.merge:
        if overlap.paths:
            here = [rows[path] for path in overlap.paths]
            met = half.met.get(overlap.label)
            seen = _added_up(half, here, overlap.losses) if met is None else met
            _note(found, overlap.label, here, overlap.losses, seen, overlap.rule.at)
    for group in group_rows([row for row in plan.rows if len(row.weights) > 1 and row.path not in ruled]):
        here = [rows[row.path] for row in group.rows]
        losses = tuple(loss for loss in plan.losses if loss in here[0].weights)
        _note(found, group.title.rsplit(" (", 1)[0], here, losses, _added_up(half, here, losses))
    return found


def _added_up(half: Half, here: Sequence[Row], losses: tuple[str, ...]) -> Met | None:
    """What is seen where gradients are added up; None where there is none."""
    per_loss = {loss: [half.per_loss.get(loss, {}).get(row.path) for row in here] for loss in losses}
    present = [loss for loss, row in per_loss.items() if any(gradient is not None for gradient in row)]
    if not present:
        return None
    gradients = Rows([[None if g is None else _dense(g) for g in per_loss[loss]] for loss in present])
    return seen_in(gradients, losses, tuple(losses.index(loss) for loss in present))


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _note(
    found: Conflicts,
    name: str,
    here: Sequence[Row],
    losses: tuple[str, ...],
    met: Met | None,
    at: str = PLACES[0],
) -> None:
    nan = [float("nan")] * len(losses)
    norms, shares = (nan, nan) if met is None else (met.norms.tolist(), met.shares.tolist())
    cosines = [nan] * len(losses) if met is None else met.cosines.tolist()
    found[name] = Conflict(
        losses,
        tuple(row.path for row in here),
        sum(row.elements for row in here),
        dict(zip(losses, norms, strict=True)),
        dict(zip(losses, shares, strict=True)),
        {loss: dict(zip(losses, row, strict=True)) for loss, row in zip(losses, cosines, strict=True)},
        at,
    )


def _table(name: str, one: Conflict) -> Iterator[str]:
    noun = "parameter" if len(one.paths) == 1 else "parameters"
    above = ", at the activations above" if one.at != PLACES[0] else ""
    yield f"{name} ({len(one.paths)} {noun}, {one.elements:,} elements{above})"
    cells = [["", "norm", "share", *one.losses]]
    for loss in one.losses:
        shown = [f"{one.cosines[loss][other]:.2f}" for other in one.losses]
        cells.append([loss, f"{one.norms[loss]:.3g}", f"{one.shares[loss]:.2f}", *shown])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        rest = "  ".join(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        yield f"{row[0].ljust(widths[0])}  {rest}"
