"""Dynamic weight averaging: weights by how fast each loss falls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcfreeze.merge.rule import Meeting, Rule, RuleState, number_problem, refuse, whole_problem


@dataclass(frozen=True)
class _DWA:
    period: int
    temperature: float = 2.0

    def __call__(self, meeting: Meeting) -> tuple[Tensor, RuleState]:
        state = meeting.state
        last, earlier = meeting.taken(state["last"]), meeting.taken(state["earlier"])
        rates = torch.where(earlier > 0, last / torch.where(earlier > 0, earlier, 1.0), 1.0)
        weights = len(rates) * (rates / self.temperature).softmax(0)
        total = meeting.put(state["total"], meeting.taken(state["total"]) + meeting.values)
        number = meeting.put(state["number"], meeting.taken(state["number"]) + 1)
        steps = state["steps"] + 1
        is_over = steps % self.period == 0
        mean = torch.where(number > 0, total / number.clamp(min=1), state["last"])
        return weights, {
            "last": torch.where(is_over, mean, state["last"]),
            "earlier": torch.where(is_over, state["last"], state["earlier"]),
            "total": torch.where(is_over, 0.0, total),
            "number": torch.where(is_over, 0.0, number),
            "steps": steps,
        }


def _begun(number: int) -> RuleState:
    empty = torch.zeros(number, dtype=torch.float64)
    named = {name: empty.clone() for name in ("last", "earlier", "total", "number")}
    return {**named, "steps": torch.zeros((), dtype=torch.int64)}


def dwa(period: int, *, temperature: float = 2.0) -> Rule:
    """Dynamic weight averaging: K softmax(r / T), where r_k is the loss's last mean over the mean before that.

    All weights are 1 for the first two periods. It keeps sums of the losses in the state. They weigh what the losses do
    to the parameters under the rule, where those meet; a head of a loss's own gets that loss's gradient as it is.

    Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019, arXiv:1803.10704.

    Args:
        period: over how many steps a mean is taken; the paper takes an epoch.
        temperature: T; the larger, the more alike the weights are.
    """
    refuse(
        "dwa",
        whole_problem("period", period, 1),
        number_problem("temperature", temperature, lambda value: value > 0, "above 0"),
    )
    return Rule(_DWA(period, temperature), init=_begun, name="dwa")
