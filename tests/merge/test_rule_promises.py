"""What each merge rule promises of itself, on random gradients, of which some depend on one another or are zero."""

from __future__ import annotations

import math
import re

import pytest
import torch
from rule_meetings import KINDS, meeting, merged, rows_of, weights

import funcfreeze as ff
from funcfreeze.merge.deciding import decided
from funcfreeze.merge.draws import draws
from funcfreeze.merge.graddrop import dropped
from funcfreeze.merge.rows import Rows

COUNTS = (2, 3, 5, 8, 10)
KIND = pytest.mark.parametrize("kind", KINDS)


def matrices(kind, counts=COUNTS):
    return [KINDS[kind](count) for count in counts]


def of_all_kinds(counts=COUNTS):
    return [matrix for kind in KINDS for matrix in matrices(kind, counts)]


def independent(count):
    """Gradients of which none is nearly made of the others."""
    q, _ = torch.linalg.qr(torch.randn(2 * count, count))
    return (torch.randn(count, count) / math.sqrt(count) + 2 * torch.eye(count)) @ q.T


def close(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=found.dtype), rtol=tolerance, atol=tolerance)


# sum and mean


def test_sum_and_mean():
    for matrix in of_all_kinds():
        close(merged(ff.merge.sum(), matrix), matrix.sum(0), 1e-13)
        close(merged(ff.merge.mean(), matrix), matrix.mean(0), 1e-13)
        assert torch.equal(weights(ff.merge.sum(), matrix), torch.ones(len(matrix)))


# UPGrad


@KIND
@pytest.mark.parametrize("regularization", [1e-4, 1e-2])
def test_upgrad_conflicts_with_none_to_its_regularization(kind, regularization):
    """With v the weights of a projection (G + ε) v ≥ 0, so that G v ≥ -ε v; ε is in units of the trace."""
    for matrix in matrices(kind):
        rule = ff.merge.upgrad(regularization=regularization)
        w, trace = weights(rule, matrix), matrix.square().sum()
        assert (w >= 1 / len(matrix)).all()
        improved = matrix @ merged(rule, matrix)
        assert (improved >= -trace * (regularization * w + 1e-12)).all()


def test_upgrad_conflicts_with_none_at_all():
    for count in COUNTS:
        for _ in range(5):
            matrix = independent(count) - 0.5 * independent(count).mean(0)
            improved = matrix @ merged(ff.merge.upgrad(regularization=0.0), matrix)
            assert improved.min() >= -1e-11 * matrix.square().sum()


def test_upgrad_of_gradients_without_conflict_is_their_mean():
    for count in COUNTS:
        matrix = torch.rand(count, 6)
        close(merged(ff.merge.upgrad(), matrix), matrix.mean(0))


# MGDA


def of_the_simplex(number, count):
    """Convex combinations: inside, near the edges and at the corners."""
    raw = torch.rand(number, count).log().neg() ** (1 + 5 * torch.rand(number, 1))
    return torch.cat([raw / raw.sum(1, keepdim=True), torch.eye(count)])


@KIND
def test_mgda_is_the_shortest_of_the_hull(kind):
    for matrix in matrices(kind):
        w, d, size = weights(ff.merge.mgda(), matrix), merged(ff.merge.mgda(), matrix), matrix.norm()
        assert (w >= 0).all()
        close(w.sum(), 1.0, 1e-12)
        slack = (1e-12 if len(matrix) <= 8 else 1e-10) * size  # of an interior point method |d|² is exact where d is 0
        assert d.norm() <= (of_the_simplex(3000, len(matrix)) @ matrix).norm(dim=1).min() + slack
        assert (matrix @ d - d.square().sum()).min() >= -1e-12 * size**2


def test_mgda_is_zero_where_nothing_improves_all():
    for count in COUNTS:
        half = torch.randn(count, 3 * count)
        matrix = torch.cat([half, -(torch.rand(count) @ half)[None]])
        assert merged(ff.merge.mgda(), matrix).norm() <= 1e-7 * matrix.norm()


# IMTL-G


@pytest.mark.parametrize("zeros", [0, 2])
def test_imtl_g_is_equally_steep_for_all(zeros):
    for count in COUNTS:
        matrix = independent(count) * 10 ** (2 * torch.rand(count, 1) - 1)
        whole = torch.cat([matrix, torch.zeros(zeros, matrix.shape[1])])[torch.randperm(count + zeros)]
        w, d = weights(ff.merge.imtl_g(), whole), merged(ff.merge.imtl_g(), whole)
        close(w.sum(), 1.0)
        steepness = (whole @ d / whole.norm(dim=1))[whole.any(1)]
        assert (steepness - steepness.mean()).abs().max() <= 1e-10 * steepness.mean().abs()


def test_imtl_g_is_zero_where_weights_cannot_sum_to_one():
    g = torch.randn(7)
    assert not merged(ff.merge.imtl_g(), torch.stack([g, -g])).any()


# PCGrad


@pytest.mark.parametrize("order", ["random", "declared"])
def test_pcgrad_conflicts_with_neither_of_two(order):
    for step, matrix in enumerate(of_all_kinds([2] * 5)):
        d = merged(ff.merge.pcgrad(order=order), matrix, step=step)
        assert (matrix @ d >= -1e-14 * matrix.norm() ** 2).all()
        if matrix[0] @ matrix[1] >= 0:
            close(d, matrix.sum(0), 1e-14)


def test_pcgrad_of_gradients_without_conflict_is_their_sum():
    for count in COUNTS:
        matrix = torch.rand(count, 6)
        close(merged(ff.merge.pcgrad(), matrix), matrix.sum(0))


def test_pcgrad_by_hand():
    """Algorithm 1 in vectors, in the declared order."""
    for count in COUNTS:
        matrix = torch.randn(count, count + 1)
        total = torch.zeros(count + 1)
        for i in range(count):
            g = matrix[i].clone()
            for j in range(count):
                if j != i and g @ matrix[j] < 0:
                    g -= (g @ matrix[j]) / matrix[j].square().sum() * matrix[j]
            total += g
        close(merged(ff.merge.pcgrad(order="declared"), matrix), total)


def test_pcgrads_order_is_a_function_of_step_and_seed():
    matrix = torch.randn(6, 3)
    found = {
        (seed, step): merged(ff.merge.pcgrad(seed=seed), matrix, step=step) for seed in (0, 1) for step in range(6)
    }
    again = merged(ff.merge.pcgrad(seed=1), matrix, step=4)
    assert torch.equal(found[1, 4], again)
    assert len({tuple(d.tolist()) for d in found.values()}) > 6


# CAGrad


@KIND
@pytest.mark.parametrize("c", [0.3, 0.9, 1.5])
def test_cagrad_is_the_best_for_the_worst_inside_its_ball(kind, c):
    for matrix in matrices(kind):
        mean, d, size = matrix.mean(0), merged(ff.merge.cagrad(c), matrix), matrix.norm()
        moved = torch.randn(2000, matrix.shape[1])
        others = mean + c * mean.norm() * moved / moved.norm(dim=1, keepdim=True) * torch.rand(2000, 1) ** 0.2
        best = (matrix @ others.T).amin(0).max()
        if d.any():
            # of inner products that cancel, |g₀|² is known to rounding
            radius = c * (mean.square().sum() + 1e-15 * size**2).sqrt()
            assert (d - mean).norm() <= radius * (1 + 1e-9)
            slack = size * (radius - c * mean.norm()) if d.any() else 0.0
            assert (matrix @ d).min() >= best - 1e-10 * size * mean.norm() - 1e-14 * size**2 - slack
        else:  # there is g_w with |g_w| < 1e-4: then min g_i · d ≤ g_w · d for all d of the ball
            assert best <= 1e-4 * (1 + c) * size * mean.norm()


def test_cagrad_without_a_ball_is_the_mean():
    for matrix in of_all_kinds():
        close(merged(ff.merge.cagrad(0.0), matrix), matrix.mean(0), 1e-13)
        close(merged(ff.merge.cagrad(0), matrix), matrix.mean(0), 1e-13)


# Aligned-MTL


LENGTHS = {
    "min": lambda values: values.min(),
    "median": lambda values: values.sort().values[(len(values) - 1) // 2],
    "rmse": lambda values: values.mean(),
}


@pytest.mark.parametrize("scale", LENGTHS)
def test_aligned_gradients_have_condition_one(scale):
    """From the decomposition of the matrix itself: J = U S Vᵀ becomes √σ U Vᵀ, of which the rule gives the mean."""
    for matrix in of_all_kinds():
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        known = s > 1e-9 * s.max()
        if not matrix.any():
            assert not merged(ff.merge.aligned_mtl(scale=scale), matrix).any()
            continue
        aligned = LENGTHS[scale](s[known].square()).sqrt() * u[:, known] @ v[known]
        values = torch.linalg.svdvals(aligned)[: int(known.sum())]
        close(values.max() / values.min(), 1.0, 1e-12)
        found, wanted = merged(ff.merge.aligned_mtl(scale=scale), matrix), aligned.mean(0)
        bound = 1e-13 * (s.max() / s[known].min()) ** 2
        assert (found - wanted).norm() <= max(1e-10, bound) * wanted.norm() + 1e-14 * s.max()


@pytest.mark.parametrize("width", [50, 20_000])
@pytest.mark.parametrize("rule", [ff.merge.imtl_g(), *(ff.merge.aligned_mtl(scale=s) for s in LENGTHS)], ids=str)
def test_gradients_that_depend_on_others_but_for_their_rounding(rule, width):
    """A loss that is a sum of two others, as everybody computes it: in float32, of small and of large parameters."""
    for _ in range(3):
        exact = torch.randn(3, width)
        exact[:2] = exact[:2].float().double()
        exact[2] = 0.3 * exact[0] + 0.7 * exact[1]
        wanted = aligned_or_impartial(rule, exact)
        found, _, _ = decided(rule, "here", meeting_of([[row.float()] for row in exact]))
        assert (found[0] - wanted).norm() <= 1e-5 * wanted.norm()


def meeting_of(gradients, unit=None):
    shown = meeting(torch.ones(len(gradients), 2))
    return type(shown)(shown.losses, shown.places, shown.number, shown.values, shown.step, {}, Rows(gradients, unit))


def aligned_or_impartial(rule, matrix):
    """From the decomposition of a matrix whose rank is 2."""
    u, s, v = (part[..., :2] if part.ndim == 1 else part for part in torch.linalg.svd(matrix, full_matrices=False))
    u, v = u[:, :2], v[:2]
    if rule.name == "imtl_g":
        w = u @ ((u.T @ matrix.norm(dim=1)) / s.square())
        return w @ matrix / w.sum()
    scale = rule.options.get("scale", "min")
    return LENGTHS[scale](s.square()).sqrt() * (u @ v).mean(0)


# GradDrop


def test_graddrop_keeps_one_sign_of_every_element():
    for count in COUNTS:
        matrix = torch.randn(count, 40)
        d = merged(ff.merge.graddrop(), matrix, step=count)
        positive, negative = matrix.clamp(min=0.0).sum(0), matrix.clamp(max=0.0).sum(0)
        kept = torch.where(d > 0, positive, negative)
        close(d, kept, 1e-14)
        assert (d > 0).any()
        assert (d < 0).any()


def test_graddrop_keeps_all_where_all_agree():
    """Also for the draws at the ends; 1 - 2⁻²⁵ would be 1 in float32."""
    matrix = torch.rand(4, 3, dtype=torch.float32) + 0.1
    signed = matrix * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float32)
    largest = torch.tensor(1 - 2**-24, dtype=torch.float32)
    for drawn in (torch.zeros(3, dtype=torch.float32), largest.expand(3)):
        assert torch.equal(dropped(signed, drawn, 0.0), signed.sum(0))


def test_graddrop_is_the_sum_on_average():
    """The chance of plus is p / (p + n), where p and n add up what is positive and negative: p - n on average."""
    matrix, number = torch.randn(4, 8), 2000
    matrix[:, 0] = matrix[:, 0].abs()
    drop = ff.merge.graddrop(seed=3).decide
    found = torch.stack([drop(meeting(matrix, step=step)) for step in range(number)])
    p, n = matrix.clamp(min=0.0).sum(0), matrix.clamp(max=0.0).neg().sum(0)
    chance = p / (p + n)
    spread = (p + n) * (chance * (1 - chance)).sqrt() / math.sqrt(number)
    assert ((found.mean(0) - matrix.sum(0)).abs() <= 5.5 * spread + 1e-12).all()
    assert ((found > 0).double().mean(0) - chance).abs().max() <= 5.5 * 0.5 / math.sqrt(number)


def test_graddrop_lets_through_what_it_is_told():
    matrix = torch.randn(5, 30)
    nothing, some, all_of_it = (merged(ff.merge.graddrop(leak=leak), matrix, step=2) for leak in (0.0, 0.3, 1.0))
    close(all_of_it, matrix.sum(0), 1e-13)
    close(some, 0.3 * matrix.sum(0) + 0.7 * nothing, 1e-13)


# GradNorm


def learned_by_hand(kept, firsts, norms, values, alpha, lr):
    """One step of the paper's rule in plain numbers, for those present: loss -> norm, loss -> value."""
    for loss, value in values.items():
        firsts.setdefault(loss, value)
    ratios = {loss: values[loss] / firsts[loss] if firsts[loss] else 1.0 for loss in values}
    mean_ratio = sum(ratios.values()) / len(ratios)
    mean_norm = sum(kept[loss] * norms[loss] for loss in values) / len(values)
    total = sum(kept[loss] for loss in values)
    new = {}
    for loss in values:
        target = mean_norm * (ratios[loss] / mean_ratio if mean_ratio > 0 else 1.0) ** alpha
        apart = kept[loss] * norms[loss] - target
        new[loss] = max(kept[loss] - lr * math.copysign(1.0, apart) * norms[loss], 1e-4)
    scale = total / sum(new.values())
    return {**kept, **{loss: weight * scale for loss, weight in new.items()}}


PRESENT = [(0, 1, 2, 3), (0, 1, 2, 3), (0, 2), (1, 2, 3), (2,), (0, 1, 2, 3), (1, 3), (0, 1, 3), (0, 1, 2, 3)]
"""The losses that are there, step by step; where one is alone nothing meets."""


@pytest.mark.parametrize(("alpha", "lr"), [(1.5, 0.025), (0.5, 0.01), (0.0, 0.1)])
def test_gradnorm_by_hand_with_absent_losses(alpha, lr):
    rule = ff.merge.gradnorm(alpha=alpha, lr=lr)
    state = rule.init(4)
    kept, firsts = dict.fromkeys(range(4), 1.0), {}
    for present in PRESENT:
        matrix = torch.randn(len(present), 12) * 10 ** torch.rand(len(present), 1)
        values = 0.1 + torch.rand(len(present))
        shown = meeting(matrix, values=values, state=state, places=present, number=4)
        _, given, state = decided(rule, "here", shown)
        if len(present) == 1:
            assert given == 1
            continue
        close(given, [kept[loss] for loss in present], 1e-12)
        norms = dict(zip(present, matrix.norm(dim=1).tolist(), strict=True))
        kept = learned_by_hand(kept, firsts, norms, dict(zip(present, values.tolist(), strict=True)), alpha, lr)
        close(state["weights"], [*kept.values()], 1e-12)
        close(state["weights"].sum(), 4.0, 1e-12)


def test_gradnorm_moves_the_right_way():
    """Where all losses have come equally far, the longest gradient gets less weight, and the shortest more."""
    rule = ff.merge.gradnorm()
    matrix = torch.eye(3) * torch.tensor([1.0, 3.0, 9.0])[:, None]
    state = rule.init(3)
    for _ in range(20):
        _, _, state = decided(rule, "here", meeting(matrix, state=state))
    assert state["weights"][0] > 1 > state["weights"][2]
    # a loss that lags behind gets more
    even, state = torch.eye(3), rule.init(3)
    for values in ([1.0, 1.0, 1.0], [1.0, 0.5, 0.5]):
        _, _, state = decided(rule, "here", meeting(even, values=torch.tensor(values), state=state))
    assert state["weights"][0] > max(state["weights"][1:])


@pytest.mark.parametrize("values", [[[0.0, 1.0], [0.5, 0.5]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
def test_gradnorm_of_losses_that_are_zero(values):
    """One that began at zero has not moved, and where all are zero they have come equally far."""
    rule, matrix = ff.merge.gradnorm(), torch.randn(2, 5)
    state, kept, firsts, norms = rule.init(2), {0: 1.0, 1: 1.0}, {}, dict(enumerate(matrix.norm(dim=1).tolist()))
    for one in values:
        _, _, state = decided(rule, "here", meeting(matrix, values=torch.tensor(one), state=state))
        kept = learned_by_hand(kept, firsts, norms, dict(enumerate(one)), 1.5, 0.025)
        close(state["weights"], [*kept.values()], 1e-12)


# DWA


@pytest.mark.parametrize(("period", "temperature"), [(1, 2.0), (3, 2.0), (4, 0.5)])
def test_dwa_by_hand(period, temperature):
    """The paper's formula over means of so many steps: w_k(t) = K softmax(L_k(t-1) / L_k(t-2) / T)."""
    rule = ff.merge.dwa(period, temperature=temperature)
    state, means, here = rule.init(3), [], []
    for step in range(5 * period + 2):
        values = 0.1 + torch.rand(3)
        w, state = weights_and_state(rule, values, state)
        if len(means) < 2:
            close(w, [1.0, 1.0, 1.0], 1e-14)
        else:
            raised = [math.exp(last / before / temperature) for last, before in zip(means[-1], means[-2], strict=True)]
            close(w, [3 * one / sum(raised) for one in raised], 1e-12)
        here.append(values.tolist())
        if (step + 1) % period == 0:
            means.append([sum(column) / period for column in zip(*here, strict=True)])
            here = []


def weights_and_state(rule, values, state, places=None, number=None):
    matrix = torch.randn(len(values), 4)
    _, w, state = decided(rule, "here", meeting(matrix, values=values, state=state, places=places, number=number))
    return w, state


def test_dwa_with_absent_losses():
    """A loss's mean is over the steps at which it was there; through a period without it, its last mean stays."""
    rule = ff.merge.dwa(2)
    state = rule.init(3)
    for values, places in (
        ([4.0, 1.0, 8.0], (0, 1, 2)),  # the first period: means 4, 2, 8
        ([3.0, 8.0], (1, 2)),
        ([2.0, 1.0], (0, 1)),  # the second: 1, 1, and the third loss keeps 8
        ([0.0, 1.0], (0, 1)),
    ):
        w, state = weights_and_state(rule, torch.tensor(values), state, places, 3)
        close(w, [1.0] * len(places), 1e-14)
    w, state = weights_and_state(rule, torch.ones(3), state, (0, 1, 2), 3)
    raised = [math.exp(rate / 2) for rate in (1 / 4, 1 / 2, 8 / 8)]
    close(w, [3 * one / sum(raised) for one in raised], 1e-12)
    w, state = weights_and_state(rule, torch.ones(2), state, (1, 2), 3)
    close(w, [2 * one / sum(raised[1:]) for one in raised[1:]], 1e-12)


# draws


NUMBER = 100_000
CPU = torch.device("cpu")


def drawn(seed, step, number=NUMBER):
    return draws(seed, torch.tensor(step), number, CPU)


def test_draws_are_uniform(seed):
    for step in (0, 1, 10**6):
        found = drawn(seed, step)
        assert found.dtype == torch.float64
        assert found.min() >= 0
        assert found.float().max() < 1
        assert abs(found.mean() - 0.5) <= 5.5 / math.sqrt(12 * NUMBER)
        assert abs(found.var() - 1 / 12) <= 5.5 / math.sqrt(180 * NUMBER)
        counted = (found * 256).floor().long().bincount(minlength=256).double()
        assert (counted - NUMBER / 256).square().sum() / (
            NUMBER / 256
        ) <= 402.7  # exceeded once in 1e8, with 255 degrees of freedom


def test_draws_of_neighbours_do_not_depend_on_each_other(seed):
    here = drawn(seed, 7)
    others = {
        "the next step": drawn(seed, 8),
        "the next seed": drawn(seed + 1, 7),
        "both": drawn(seed + 1, 6),
        "the next position": here.roll(1),
        "the next but one": here.roll(2),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([here, other]))[0, 1]
        assert abs(correlation) <= 5.5 / math.sqrt(NUMBER), name
    # one position through many steps, which is what an element of a gradient sees
    through = torch.stack([drawn(seed, step, 2) for step in range(4000)])
    assert (through.mean(0) - 0.5).abs().max() <= 5.5 / math.sqrt(12 * 4000)
    for position in range(2):
        series = through[:, position]
        assert abs(torch.corrcoef(torch.stack([series[1:], series[:-1]]))[0, 1]) <= 5.5 / math.sqrt(4000)


def test_draws_are_a_function_of_seed_and_step(seed):
    assert torch.equal(drawn(seed, 3, 50), drawn(seed, 3, 50))
    assert torch.equal(drawn(seed, 3, 50), drawn(seed, 3, 80)[:50])
    assert torch.equal(draws(seed, torch.tensor(3, dtype=torch.int32), 50, CPU), drawn(seed, 3, 50))
    some = {tuple(drawn(s, step, 4).tolist()) for s in (-5, -1, 0, 1, seed + 2, 2**31) for step in range(20)}
    assert len(some) == 6 * 20


# what holds for all of them


STATEFUL = {"gradnorm": ff.merge.gradnorm(), "dwa": ff.merge.dwa(3)}
BLIND = {"sum": ff.merge.sum(), "mean": ff.merge.mean()}
ALIKE = {
    "mgda": ff.merge.mgda(),
    "imtl_g": ff.merge.imtl_g(),
    "cagrad": ff.merge.cagrad(0.4),
    "upgrad": ff.merge.upgrad(),
    **{f"aligned_mtl {scale}": ff.merge.aligned_mtl(scale=scale) for scale in LENGTHS},
}
ORDERED = {"pcgrad": ff.merge.pcgrad(), "pcgrad declared": ff.merge.pcgrad(order="declared")}
DRAWN = {"graddrop": ff.merge.graddrop(leak=0.2)}
ALL = {**BLIND, **ALIKE, **ORDERED, **DRAWN, **STATEFUL}


def begun(rule, count):
    """A state that has come some way."""
    if rule.init is None:
        return {}
    state = rule.init(count)
    for step in range(4):
        shown = meeting(torch.randn(count, 9), step=step, values=0.1 + torch.rand(count), state=state)
        _, _, state = decided(rule, "here", shown)
    return state


@pytest.mark.parametrize("name", ALL)
def test_twice_as_long_gradients_merge_to_twice_as_much(name):
    rule = ALL[name]
    for count in COUNTS:
        for matrix in (independent(count), independent(count) * 10 ** (2 * torch.rand(count, 1) - 1)):
            state = begun(rule, count)
            wanted = merged(rule, matrix, state=state)
            for factor in (1e-30, 1e-6, 0.3, 1e6, 1e30):
                found = merged(rule, matrix * factor, state=state) / factor
                assert (found - wanted).norm() <= 1e-9 * wanted.norm() + 1e-13 * matrix.norm(), (count, factor)


@pytest.mark.parametrize("name", [*BLIND, *ALIKE, *STATEFUL])
def test_the_order_of_losses_does_not_matter(name):
    rule = ALL[name]
    for count in COUNTS:
        matrix, values, state = independent(count), 0.1 + torch.rand(count), begun(rule, count)
        order = torch.randperm(count)
        moved = {key: kept[order] if kept.ndim else kept for key, kept in state.items()}
        wanted = weights(rule, matrix, values=values, state=state)
        found = weights(rule, matrix[order], values=values[order], state=moved)
        close(found, wanted[order], 1e-9)


def test_the_order_of_losses_does_not_matter_to_graddrop():
    for count in COUNTS:
        matrix = torch.randn(count, 20)
        close(merged(DRAWN["graddrop"], matrix[torch.randperm(count)]), merged(DRAWN["graddrop"], matrix), 1e-13)


@pytest.mark.parametrize("name", ALL)
def test_of_zeros_comes_zero(name):
    for count in COUNTS:
        assert torch.equal(merged(ALL[name], torch.zeros(count, 5), state=begun(ALL[name], count)), torch.zeros(5))


@pytest.mark.parametrize("name", ALL)
def test_of_what_is_finite_comes_nothing_else(name):
    for matrix in of_all_kinds((2, 4, 9)):
        state = begun(ALL[name], len(matrix))
        _, _, after = decided(ALL[name], "here", meeting(matrix, state=state))
        assert merged(ALL[name], matrix, state=state).isfinite().all()
        assert all(kept.isfinite().all() for kept in after.values())


@pytest.mark.parametrize("name", ALL)
def test_one_loss_alone_keeps_its_gradient(name):
    rule, matrix = ALL[name], torch.randn(1, 6)
    state = begun(rule, 3)
    _, _, after = decided(rule, "here", meeting(matrix, state=state, places=(1,), number=3))
    assert torch.equal(merged(rule, matrix, state=state, places=(1,), number=3), matrix[0])
    assert after == state  # which has the same tensors


@pytest.mark.parametrize("name", ALL)
def test_torchs_default_dtype_does_not_matter(name):
    for count in (3, 9):
        matrix = independent(count)
        state = begun(ALL[name], count)
        wanted = merged(ALL[name], matrix, state=state)
        torch.set_default_dtype(torch.float32)
        found = merged(ALL[name], matrix, state=state)
        torch.set_default_dtype(torch.float64)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ALL)
def test_a_unit_is_taken_out_and_put_back(name):
    """What a loss scale multiplies all gradients with is none of a rule's business."""
    rule, matrix = ALL[name], torch.randn(4, 6)
    if rule.init is None:
        plain, _, _ = decided(rule, "here", meeting_of([[row] for row in matrix]))
        shown = meeting_of([[row * 1024] for row in matrix], torch.tensor(1024.0))
        scaled, _, _ = decided(rule, "here", shown)
        close(scaled[0] / 1024, plain[0], 1e-12)
        close(shown.gramian, matrix @ matrix.T, 1e-12)
        close(shown.norms, matrix.norm(dim=1), 1e-12)


def test_what_a_meeting_shows():
    matrix = torch.randn(3, 7)
    shown = meeting(matrix, places=(0, 2, 3), number=5)
    assert torch.equal(shown.matrix, matrix)
    close(shown.gramian, matrix @ matrix.T, 1e-13)
    close(rows_of(matrix).gramian, shown.gramian, 1e-15)
    kept = torch.arange(5.0)
    assert torch.equal(shown.taken(kept), torch.tensor([0.0, 2.0, 3.0]))
    assert torch.equal(shown.put(kept, torch.tensor([7.0, 8.0, 9.0])), torch.tensor([7.0, 1.0, 8.0, 9.0, 4.0]))


# what is no option


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ff.merge.cagrad(-0.1), "merge.cagrad: c must be at least 0, got -0.1"),
        (lambda: ff.merge.cagrad(math.inf), "merge.cagrad: c must be at least 0, got inf"),
        (lambda: ff.merge.cagrad(True), "merge.cagrad: c must be at least 0, got True"),
        (
            lambda: ff.merge.cagrad("x", norm_eps=-1, iterations=0),
            "merge.cagrad: c must be at least 0, got 'x'; norm_eps must be at least 0, got -1; iterations must be an "
            "int of at least 1, got 0",
        ),
        (lambda: ff.merge.upgrad(regularization=-1), "merge.upgrad: regularization must be at least 0, got -1"),
        (lambda: ff.merge.mgda(iterations=2.5), "merge.mgda: iterations must be an int of at least 1, got 2.5"),
        (lambda: ff.merge.aligned_mtl(scale="max"), "scale is one of 'min', 'median', 'rmse', got 'max'"),
        (lambda: ff.merge.pcgrad(order="any", seed=0.5), "order is 'random' or 'declared', got 'any'; seed must be an"),
        (lambda: ff.merge.graddrop(leak=1.5), "merge.graddrop: leak must be from 0 to 1, got 1.5"),
        (lambda: ff.merge.graddrop(seed=None), "merge.graddrop: seed must be an int, got None"),
        (lambda: ff.merge.gradnorm(alpha=-1, lr=0), "alpha must be at least 0, got -1; lr must be above 0, got 0"),
        (lambda: ff.merge.dwa(0, temperature=0), "period must be an int of at least 1, got 0; temperature must be abo"),
        (lambda: ff.merge.mgda(at="outputs"), "a rule's `at` is 'parameters' or 'activations', got 'outputs'"),
    ],
)
def test_what_is_no_option(make, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        make()


def test_the_matrix_in_pieces(monkeypatch):
    """Leaves of all sizes and kinds, some without a gradient of one loss: the pieces side by side are the matrix."""
    shapes = [(3,), (2, 3), (), (40,), (7, 5), (2,), (1,), (33,)]
    rows = [
        [torch.randn(shape, dtype=torch.complex128 if len(shape) == 2 else None) for shape in shapes] for _ in "abc"
    ]
    rows[0][3] = rows[1][4] = rows[2][0] = None
    for row in rows:
        row[5] = None
    for unit in (None, torch.tensor(8.0)):
        for piece in (1, 8, 16, 10_000):
            monkeypatch.setattr("funcfreeze.merge.rows.PIECE", piece)
            found = [*Rows(rows, unit).pieces()]
            assert max(part.shape[1] for part in found) <= max(piece, 1)
            torch.testing.assert_close(torch.cat(found, 1), Rows(rows, unit).stacked(), rtol=0, atol=0)


def test_graddrop_draws_the_same_in_pieces(monkeypatch):
    matrix = torch.randn(4, 1_000)
    whole = merged(ff.merge.graddrop(seed=3), matrix, step=5)
    monkeypatch.setattr("funcfreeze.merge.rows.PIECE", 64)
    torch.testing.assert_close(merged(ff.merge.graddrop(seed=3), matrix, step=5), whole, rtol=0, atol=0)
