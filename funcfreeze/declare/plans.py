"""The plans of an alternation's members: one table for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from funcfreeze.declare.ema import cut_ties, shown_targets
from funcfreeze.declare.overlaps import told
from funcfreeze.declare.plan import Plan, Row
from funcfreeze.declare.plan_table import format_plan
from funcfreeze.declare.timing import ALWAYS, Timing


@dataclass(frozen=True)
class Plans(Mapping[str, Plan]):
    """Member -> its `Plan`, over the parameters of one model. Printing it shows one table.

    Attributes:
        plans: member -> plan, in the order in which members run.
        turns: member -> when it runs.
        shared: in words, what is run once a call and for which members; not compared, and not in the data.

    >>> from torch import nn
    >>> from funcfreeze.declare.plan import resolve_plan
    >>> from funcfreeze.model.sites import module_leaves
    >>> leaves = module_leaves(nn.ModuleDict({"q": nn.Linear(2, 1), "pi": nn.Linear(2, 1)}))
    >>> q, pi = resolve_plan({"td": "q"}, leaves), resolve_plan({"gain": "pi", "entropy": "pi"}, leaves)
    >>> print(Plans({"critic": q, "actor": pi}, {"critic": Timing(), "actor": Timing(every=2)}))
                         critic  actor (every 2)
    parameter  elements      td    gain  entropy
    q.weight          2       1       ·        ·
    q.bias            1       1       ·        ·
    pi.weight         2       ·       1        1
    pi.bias           1       ·       1        1
    critic.td updates 2 of 4 parameters (3 of 6 elements)
    actor.gain updates 2 of 4 parameters (3 of 6 elements)
    actor.entropy updates 2 of 4 parameters (3 of 6 elements)
    """

    plans: Mapping[str, Plan]
    turns: Mapping[str, Timing]
    shared: str = field(default="", compare=False)

    def __getitem__(self, member: str) -> Plan:
        return self.plans[member]

    def __iter__(self) -> Iterator[str]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def __str__(self) -> str:
        losses = [f"{member}.{loss}" for member, plan in self.plans.items() for loss in plan.losses]
        groups = [(_title(member, self.turns[member]), len(plan.losses)) for member, plan in self.plans.items()]
        frozen = [
            f"frozen statistics  {member}: {plan.frozen_statistics}"
            for member, plan in self.plans.items()
            if plan.frozen_statistics is not None
        ]
        names = [row.names for row in self.rows]
        targets = [
            f"targets  {told}"
            for member, plan in self.plans.items()
            for told in (*shown_targets(plan.targets, member), *cut_ties(plan.targets, names))
        ]
        shared = [f"shared  {self.shared}"] if self.shared else []
        merge = [
            line.replace("merge  ", f"merge  {member}: ", 1)
            for member, plan in self.plans.items()
            for line in told(plan.merge, plan.rows)
        ]
        return "\n".join([format_plan(losses, self.rows, groups), *shared, *merge, *targets, *frozen])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: each member's plan and turns."""
        return {
            member: {"plan": plan.to_dict(), "turns": self.turns[member].to_dict()}
            for member, plan in self.plans.items()
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plans:
        """The plans that `to_dict` wrote down."""
        return Plans(
            {member: Plan.from_dict(part["plan"]) for member, part in data.items()},
            {member: Timing.from_dict(part["turns"]) for member, part in data.items()},
        )

    @property
    def rows(self) -> list[Row]:
        """One row a parameter, in which losses go by `member.loss`."""
        return [
            replace(
                rows[0],
                weights={
                    f"{member}.{loss}": terms
                    for member, row in zip(self.plans, rows, strict=True)
                    for loss, terms in row.weights.items()
                },
                timings={
                    f"{member}.{loss}": timings
                    for member, row in zip(self.plans, rows, strict=True)
                    for loss, timings in row.timings.items()
                },
            )
            for rows in zip(*(plan.rows for plan in self.plans.values()), strict=True)
        ]


def _title(member: str, turns: Timing) -> str:
    return member if turns == ALWAYS else f"{member} ({turns})"
