"""CAGrad: near the mean gradient, the direction that improves the worst loss most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcfreeze.merge.faces import MOST, best, faces, nested, restricted, solved, with_derivatives
from funcfreeze.merge.interior import ITERATIONS, Derivatives, minimized
from funcfreeze.merge.rows import diagonal
from funcfreeze.merge.rule import Meeting, Rule, number_problem, refuse, whole_problem


@dataclass(frozen=True)
class _CAGrad:
    c: float
    norm_eps: float = 1e-4
    iterations: int = ITERATIONS

    def __call__(self, meeting: Meeting) -> Tensor:
        gramian = meeting.gramian
        number, trace = len(gramian), diagonal(gramian).sum()
        if self.c == 0:
            return torch.full_like(gramian[0], 1 / number)
        known = gramian / torch.where(trace > 0, trace, 1.0)
        found, is_smooth = worst(known, self.c, self.iterations)
        norm = (found @ known @ found).clamp(min=0.0).sqrt()
        radius = self.c * known.mean().clamp(min=0.0).sqrt()
        is_far = is_smooth & (norm >= self.norm_eps)
        weights = 1 / number + radius / torch.where(is_far, norm, 1.0) * found
        return torch.where(is_far, weights, 0.0)


def worst(gramian: Tensor, c: float, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """The w ≥ 0, Σ w = 1 that minimises g₀ · g_w + c |g₀| |g_w|, with g_w = Σ w_k g_k and g₀ the mean.

    Returns:
        The weights (K,), and whether the function is smooth there; where it is not, the minimum is where g_w = 0.
    """
    number = len(gramian)
    slope, radius = gramian.mean(1), c * gramian.mean().clamp(min=0.0).sqrt()
    if number > MOST:  # where the method ends tells which weights are zero; near the kink it is not exact itself
        start = torch.full((number,), 1 / number, dtype=gramian.dtype, device=gramian.device)
        with torch.no_grad():
            chosen = nested(minimized(_derivatives(gramian, slope, radius), start, iterations, sums_to_one=True))
    else:
        chosen = faces(number, gramian.device, empty=False)
    with torch.no_grad():
        found = _on(gramian, chosen, slope, radius)
        products = found @ gramian
        norms = (found * products).sum(1, keepdim=True).clamp(min=0.0).sqrt()
        gradients = slope + radius * products / norms
        level = (found * gradients).sum(1, keepdim=True)
        violations = torch.cat([-found, level - gradients, (gradients - level).abs() * chosen], 1).amax(1)
        solution, face = best(found, chosen, violations)
        is_smooth = violations.nan_to_num(torch.inf, torch.inf).amin() < _TOLERANCE
    weights = with_derivatives(solution, lambda: _on(gramian, face[None], slope, radius)[0])
    weights = torch.where(is_smooth, weights, face / face.sum()).clamp(min=0.0)
    return weights / weights.sum(), is_smooth


def _on(gramian: Tensor, chosen: Tensor, slope: Tensor, radius: Tensor) -> Tensor:
    """On each face S, with t = c |g₀| / |g_w|, the solution of G_SS w_S = (μ 1 - b_S) / t: (faces, K).

    Both conditions on w, its sum and |g_w|, make t the root of a quadratic equation.
    """
    both = torch.stack([chosen, chosen * slope], 2)
    ones, slopes = solved(restricted(gramian, chosen), both).unbind(2)
    s, r, q = (ones * chosen).sum(1), (slopes * chosen).sum(1), (slopes * chosen * slope).sum(1)
    t = (r * r - s * (q - radius * radius)).sqrt()
    return (((t + r) / s)[:, None] * ones - slopes) / t[:, None]


_TOLERANCE = 1e-6
"""A face on which the conditions hold to this is taken for the one of the solution."""


def _derivatives(gramian: Tensor, slope: Tensor, radius: Tensor) -> Derivatives:
    """Of the function with √(|g_w|² + aim) for |g_w|: where |g_w| is zero, Newton steps on the kink lead nowhere."""

    def derivatives(x: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        product = x @ gramian
        norm = ((x * product).sum(-1, keepdim=True).clamp(min=0.0) + aim).sqrt()
        direction = product / norm
        curvature = gramian - direction[..., :, None] * direction[..., None, :]
        return slope + radius * direction, radius / norm[..., None] * curvature

    return derivatives


def cagrad(c: float, *, norm_eps: float = 1e-4, iterations: int = ITERATIONS, at: str = "parameters") -> Rule:
    """Conflict-averse descent: within c |g₀| of the mean gradient g₀, the d with the largest min_i g_i · d.

    d = g₀ + c |g₀| g_w / |g_w|, with w as `worst` finds it. With c < 1 it converges to a minimum of the mean loss; with
    c = 0 it is the mean. Solved exactly up to 8 losses, by an interior point method beyond.

    Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021, arXiv:2110.14048.

    Args:
        c: the radius; at least 0.
        norm_eps: where |g_w| is less than this, for gradients whose squared norms sum to 1, the merged gradient is
            zero, as in TorchJD: there hardly anything improves all losses any more, or one loss's gradient is 1e4 times
            as small as another's. 0 leaves only the first.
        iterations: of the interior point method.
        at: "parameters", or "activations" (see `Rule`).
    """
    refuse(
        "cagrad",
        number_problem("c", c, lambda value: value >= 0, "at least 0"),
        number_problem("norm_eps", norm_eps, lambda value: value >= 0, "at least 0"),
        whole_problem("iterations", iterations, 1),
    )
    return Rule(_CAGrad(c, norm_eps, iterations), name="cagrad", at=at)
