"""Which routing holds at which count, and which parameters thaw there."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from funcfreeze.declare.plan import Plan, Row
from funcfreeze.gradients.law import Routing


class Timetable:
    """The routings of a plan: one for every set of active routes that is not the same, made when it is first asked for.

    Args:
        plan: which loss may update which parameters, and when.
        differentiable: leaves that require grad in the forward also where no loss may update them.

    Attributes:
        is_timed: whether it depends on the count what is active.
        resets: the paths of parameters whose optimizer state is fresh at some count.
    """

    def __init__(self, plan: Plan, differentiable: Set[int] = frozenset()) -> None:
        self.is_timed = bool(plan.timings)
        self.resets = tuple(row.path for row in plan.rows if _resets(row))
        self._plan = plan
        self._differentiable = differentiable
        self._spans = tuple(dict.fromkeys(timing.counts for timing in plan.timings))
        self._known: dict[tuple[bool, ...], Routing] = {}

    def at(self, count: int | None) -> Routing:
        """The routing of a count.

        Raises:
            RouteError: there is no count, and a route is timed.
        """
        active = () if count is None else tuple(count in span for span in self._spans)
        if active not in self._known or (self.is_timed and count is None):
            self._known[active] = self._made(count, active)
        return self._known[active]

    def _made(self, count: int | None, active: tuple[bool, ...]) -> Routing:
        plan = self._plan if count is None else self._plan.at(count)
        resting = frozenset(
            loss
            for row, now in zip(self._plan.rows, plan.rows, strict=True)
            for loss, terms in row.weights.items()
            if len(now.weights.get(loss, ())) < len(terms)
        )
        made = replace(Routing.of(plan, self._differentiable), active=active, resting=resting)
        return next((known for known in self._known.values() if known.says_as(made)), made)

    def thawing(self, count: int) -> list[str]:
        """The paths of parameters whose optimizer state is fresh at a count: a route with `reset` thaws them there."""
        if not self.resets or count == 0:
            return []
        return [
            row.path
            for row in self._plan.rows
            if any(timing.resets_at(count) for timings in row.timings.values() for timing in timings)
            and not row.at(count - 1).weights
        ]


def _resets(row: Row) -> bool:
    return any(timing.reset for timings in row.timings.values() for timing in timings)
