"""GradNorm: weights that learn to keep the gradients' norms in step with how far the losses have come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcfreeze.merge.rows import diagonal
from funcfreeze.merge.rule import Meeting, Rule, RuleState, number_problem, refuse


@dataclass(frozen=True)
class _GradNorm:
    alpha: float = 1.5
    lr: float = 0.025

    def __call__(self, meeting: Meeting) -> tuple[Tensor, RuleState]:
        state = meeting.state
        weights, norms = meeting.taken(state["weights"]), diagonal(meeting.gramian).sqrt()
        seen, first = meeting.taken(state["seen"]), meeting.taken(state["first"])
        first = torch.where(seen, first, meeting.values)
        ratios = torch.where(first == 0, 1.0, meeting.values / torch.where(first == 0, 1.0, first))
        new = learned(weights, norms, ratios, self.alpha, self.lr)
        total = weights.sum()  # of the rows that there are; the others keep theirs
        return weights, {
            "weights": meeting.put(state["weights"], new * total / new.sum()),
            "first": meeting.put(state["first"], first),
            "seen": meeting.put(state["seen"], torch.ones_like(seen)),
        }


def learned(weights: Tensor, norms: Tensor, ratios: Tensor, alpha: float, lr: float) -> Tensor:
    """The weights after a step on Σ |w_i n_i - mean(w n) r_i^α|, in which the second term is a constant.

    Args:
        weights: (K,).
        norms: n, of the gradients without these weights.
        ratios: of every loss to its first value; r_i is that over the mean of all, or 1 if that is not positive.
        alpha: how strongly losses that lag behind are pulled.
        lr: the step.
    """
    weighted = weights * norms
    mean = ratios.mean()
    rates = torch.where(mean > 0, ratios / torch.where(mean > 0, mean, 1.0), 1.0)
    targets = weighted.mean() * rates.clamp(min=0.0) ** alpha
    return (weights - lr * (weighted - targets).sign() * norms).clamp(min=1e-4)


def _begun(number: int) -> RuleState:
    return {
        "weights": torch.ones(number, dtype=torch.float64),
        "first": torch.zeros(number, dtype=torch.float64),
        "seen": torch.zeros(number, dtype=torch.bool),
    }


def gradnorm(*, alpha: float = 1.5, lr: float = 0.025) -> Rule:
    """GradNorm: a weight for every loss, learned so that all train at similar rates. They sum to the number of losses.

    It keeps its weights and the first value of every loss in the state; a loss that began at 0 counts as one that has
    not moved. They weigh what the losses do to the
    parameters under the rule, where those meet; a head of a loss's own gets that loss's gradient as it is.

    Algorithm 1 of Chen et al., GradNorm, ICML 2018, arXiv:1711.02257, with a plain gradient step on the weights.

    Args:
        alpha: how strongly losses that lag behind are pulled, at least 0.
        lr: the step of the weights, above 0.
    """
    refuse(
        "gradnorm",
        number_problem("alpha", alpha, lambda value: value >= 0, "at least 0"),
        number_problem("lr", lr, lambda value: value > 0, "above 0"),
    )
    return Rule(_GradNorm(alpha, lr), init=_begun, name="gradnorm")
