"""What enters an engine call: cotangents, weighted and added up where flows merge, or as a rule decides there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from funcfreeze.declare.routes import scalar_like
from funcfreeze.gradients.law import Routing
from funcfreeze.gradients.meeting import cross
from funcfreeze.gradients.passes import Captured, Entry, Pass, Seed
from funcfreeze.gradients.sums import add
from funcfreeze.gradients.weights import UNIT_WEIGHT
from funcfreeze.merge.deciding import Met


@dataclass
class Deciding:
    """Calls the rules that decide above parameters, and keeps what they saw.

    Attributes:
        routing: where they do.
        values: the losses by name.
        step: the number of steps taken so far; None if nobody counts.
        seed: the cotangent that every loss starts with; None is one.
        met: what was seen, by the label of the overlap.
    """

    routing: Routing
    values: Mapping[str, Tensor]
    step: Tensor | None
    seed: Tensor | None
    met: dict[str, Met] = field(default_factory=dict)

    def __call__(self, crossing: int, cotangents: Mapping[int, Sequence[Tensor | None]]) -> list[Tensor | None]:
        """What enters at each input of a node, of what each loss has there."""
        place = self.routing.crossings[crossing]
        found, self.met[place.label] = cross(place, cotangents, self.routing.losses, self.values, self.step, self.seed)
        return found


def arriving(
    planned: Pass,
    slots: dict[int, Tensor],
    seeds: Sequence[Tensor | None],
    weights: Sequence[float | Tensor],
    decide: Deciding | None,
) -> list[tuple[Entry, Tensor | None]]:
    """What enters a pass where: added up, or as a rule decides about all that arrives at a node."""
    found = {entry: _sum_up(entry, slots, seeds, weights) for entry in planned.entries if entry.crossing is None}
    crossing: dict[int, list[Entry]] = {}
    for entry in planned.entries:
        if entry.crossing is not None:
            crossing.setdefault(entry.crossing, []).append(entry)
    for number, entries in crossing.items():
        assert decide is not None, "nobody is there to decide"
        cotangents: dict[int, list[Tensor | None]] = {}
        for place, entry in enumerate(entries):
            for source, loss in zip(entry.sources, entry.losses, strict=True):
                value = _entering(source, slots, seeds, weights)
                if value is not None:
                    row = cotangents.setdefault(loss, [None] * len(entries))
                    row[place] = add(row[place], value)
        if cotangents:
            found |= zip(entries, decide(number, cotangents), strict=True)
    return [(entry, found.get(entry)) for entry in planned.entries]


def _sum_up(
    entry: Entry, slots: dict[int, Tensor], seeds: Sequence[Tensor | None], weights: Sequence[float | Tensor]
) -> Tensor | None:
    """The cotangent that enters at a place: what was captured there and the losses' own, each with its weight."""
    total: Tensor | None = None
    for source in entry.sources:
        total = add(total, _entering(source, slots, seeds, weights))
    return total


def _entering(
    source: Seed | Captured,
    slots: dict[int, Tensor],
    seeds: Sequence[Tensor | None],
    weights: Sequence[float | Tensor],
) -> Tensor | None:
    cotangent = slots.pop(source.slot, None) if isinstance(source, Captured) else seeds[source.loss]
    return weighted(cotangent, weights, source.weight)


def weighted(cotangent: Tensor | None, weights: Sequence[float | Tensor], weight: int) -> Tensor | None:
    """A cotangent or a gradient times a weight, by its index."""
    if cotangent is None or weight == UNIT_WEIGHT:
        return cotangent
    value = weights[weight]
    return cotangent if isinstance(value, float) and value == 1.0 else cotangent * scalar_like(value, cotangent)
