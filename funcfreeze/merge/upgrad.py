"""UPGrad: every gradient projected on the cone of directions that conflict with none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcfreeze.merge.faces import MOST, best, faces, restricted, solved, with_derivatives
from funcfreeze.merge.interior import ITERATIONS, minimized, quadratic
from funcfreeze.merge.rows import diagonal
from funcfreeze.merge.rule import Meeting, Rule, number_problem, refuse, whole_problem


@dataclass(frozen=True)
class _UPGrad:
    regularization: float = 1e-4
    iterations: int = ITERATIONS

    def __call__(self, meeting: Meeting) -> Tensor:
        gramian = meeting.gramian
        number, trace = len(gramian), diagonal(gramian).sum()
        known = gramian / torch.where(trace > 0, trace, 1.0)
        own = torch.eye(number, dtype=gramian.dtype, device=gramian.device)
        return projections(known + self.regularization * own, self.iterations).sum(0) / number


def projections(gramian: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """For every gradient the weights of its projection on the dual cone of all: row i is that of g_i, (K, K).

    Row i is the v that minimises vᵀ G v with v_i ≥ 1 and all others ≥ 0.

    >>> projections(torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]], dtype=torch.float64)
    """
    number = len(gramian)
    own = torch.eye(number, dtype=gramian.dtype, device=gramian.device)
    if number > MOST:
        return own + minimized(quadratic(gramian, gramian), torch.ones_like(own), iterations, sums_to_one=False)
    chosen = faces(number, gramian.device, empty=True)
    with torch.no_grad():  # for all gradients at once
        found = solved(restricted(gramian, chosen), -chosen[:, :, None] * gramian)
        slopes = gramian @ (found + own)
        violations = torch.maximum(torch.maximum(-found, -slopes), slopes.abs() * chosen[:, :, None]).amax(1)
        solution, face = best(found.mT, chosen, violations)
    # on a face S: G_SS x_S = -(G_S,i), v = e_i + x
    again = with_derivatives(solution, lambda: solved(restricted(gramian, face), -face * gramian))
    return own + again.clamp(min=0.0)


def upgrad(*, regularization: float = 1e-4, iterations: int = ITERATIONS, at: str = "parameters") -> Rule:
    """The mean of the gradients, each projected on the cone of directions that conflict with no loss.

    So the merged gradient conflicts with none, g_i · d ≥ 0 for all i, and where no two gradients conflict it is their
    mean. The Gramian is divided by its trace, and its diagonal raised by `regularization`: what was promised holds to
    that. Solved exactly up to 8 losses, by an interior point method beyond.

    Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024, arXiv:2406.16232.

    Args:
        regularization: what is added to the diagonal of the Gramian of trace 1; at least 0.
        iterations: of the interior point method.
        at: "parameters", or "activations" (see `Rule`).
    """
    refuse(
        "upgrad",
        number_problem("regularization", regularization, lambda value: value >= 0, "at least 0"),
        whole_problem("iterations", iterations, 1),
    )
    return Rule(_UPGrad(regularization, iterations), name="upgrad", at=at)
