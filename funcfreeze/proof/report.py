"""Reports: what was compared, how far apart it was, whether that is near enough. Plain data that prints readably."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        subject: what was compared: a group of parameters, or a property.
        losses: the losses that reach it.
        error: the worst difference seen, relative to the scale of what was compared; infinite if it is no number.
        tolerance: the largest error that passes.
        detail: what was seen, in words; where it failed, where and on both sides.
    """

    subject: str
    losses: tuple[str, ...] = ()
    error: float = 0.0
    tolerance: float = 0.0
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain data; an infinite error is written as None, which JSON knows."""
        return {
            "subject": self.subject,
            "losses": list(self.losses),
            "error": self.error if math.isfinite(self.error) else None,
            "tolerance": self.tolerance,
            "ok": self.ok,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class Report:
    """The outcome of a verification: all its checks.

    Attributes:
        title: what was verified against what.
        checks: every comparison that was made; none at all is not ok.
        facts: the circumstances: dtype, steps and the like.

    >>> report = Report("a against b", (Check("encoder", ("cls", "adv"), 2e-16, 1e-12),), {"dtype": "float64"})
    >>> print(report)
    ok: a against b (dtype float64)
    what     losses      error  tolerance
    encoder  cls, adv  2.0e-16    1.0e-12  ok
    >>> report.ok, report.worst
    (True, 2e-16)
    """

    title: str
    checks: tuple[Check, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something was checked and every check passed."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def worst(self) -> float:
        """The largest error of all checks."""
        return max((check.error for check in self.checks), default=math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "title": self.title,
            "ok": self.ok,
            "worst": self.worst if math.isfinite(self.worst) else None,
            "facts": dict(self.facts),
            "checks": [check.to_dict() for check in self.checks],
        }

    def __str__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        head = f"{'ok' if self.ok else 'NOT OK'}: {self.title}{f' ({facts})' if facts else ''}"
        rows = [("what", "losses", "error", "tolerance", "")]
        rows += [
            (
                check.subject,
                ", ".join(check.losses) or "-",
                _number(check.error),
                _number(check.tolerance),
                _verdict(check),
            )
            for check in self.checks
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join([head, *(_line(row, widths) for row in rows)])


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _verdict(check: Check) -> str:
    verdict = "ok" if check.ok else "FAILED"
    return f"{verdict}: {check.detail}" if check.detail else verdict


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    subject, losses, error, tolerance, verdict = row
    return (
        f"{subject:<{widths[0]}}  {losses:<{widths[1]}}  {error:>{widths[2]}}  {tolerance:>{widths[3]}}  {verdict}"
    ).rstrip()
