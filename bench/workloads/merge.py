"""How the losses' gradients become one where they meet, as a workload says it."""

from __future__ import annotations

from dataclasses import dataclass

RULES = ("sum", "mean", "pcgrad", "mgda", "imtl-g", "cagrad", "aligned-mtl", "graddrop", "upgrad")

RADIUS = 0.5
"""CAGrad's c, for everybody; every other rule is as its own defaults have it."""

SAME = 1e-6
"""Relative difference of displacements that rounding explains in float64."""

LOOSE = 0.2
"""The same where others iterate: Adam's first step is a sign for every element, so that a gradient which is wrong by
one part in a thousand turns about one element in a thousand round, and a step is 0.06 of its size away."""


@dataclass(frozen=True)
class Merge:
    """A rule for all parameters that several losses may update: those of the trunk.

    Attributes:
        rule: one of `RULES`.
        at: "parameters", or "activations": where the losses' gradients are looked at.
        tolerance: how far updates may be apart in float64, relative to their size.
    """

    rule: str
    at: str = "parameters"
    tolerance: float = SAME

    @property
    def name(self) -> str:
        """As it is called in names of workloads."""
        return self.rule if self.at == "parameters" else f"{self.rule}-{self.at}"
