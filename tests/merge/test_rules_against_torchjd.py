"""Merge rules against TorchJD's aggregators; those that solve a program against its conditions for a solution, too.

The conditions of Karush, Kuhn and Tucker are written down here from the papers' formulas, for gradients whose squared
norms sum to one. TorchJD's own answers are as good as its solvers: a bound on the distance between two answers comes
from the program where there is one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rule_meetings import KINDS, meeting, merged, weights
from scipy.optimize import lsq_linear, nnls

import funcfreeze as ff
from funcfreeze.merge.draws import draws
from funcfreeze.merge.faces import MOST

pytest.importorskip("torchjd")
from torchjd import aggregation

FEW = tuple(range(1, 9))
MANY = (9, 13)
KIND = pytest.mark.parametrize("kind", KINDS)
RESIDUAL = 1e-10


def matrices(kind, counts=FEW, times=2):
    return [KINDS[kind](count) for count in counts for _ in range(times)]


def of_all_kinds(least=1):
    return [make(count) for make in KINDS.values() for count in (*FEW, *MANY) if count >= least]


def assert_near(found, wanted, matrix, tolerance=1e-10):
    """To so much of what is wanted; what cancels is rounding of the matrix."""
    bound = tolerance * wanted.norm() + 1e-14 * matrix.norm()
    assert (found - wanted).norm() <= bound, ((found - wanted).norm() / bound, matrix.shape)


def normalized(matrix):
    return matrix / matrix.norm() if matrix.any() else matrix


def condition(gramian):
    """Of what is not rounding."""
    values = torch.linalg.eigvalsh(gramian)
    values = values[values > 1e-12 * values.max()]
    return (values.max() / values.min()).item() if len(values) else 1.0


# rules with a formula


def test_sum_and_mean():
    for matrix in of_all_kinds():
        assert_near(merged(ff.merge.sum(), matrix), aggregation.Sum()(matrix), matrix)
        assert_near(merged(ff.merge.mean(), matrix), aggregation.Mean()(matrix), matrix)


def test_imtl_g():
    """Both get one Gramian: its rounding would be amplified by its condition, and by weights that cancel."""
    for matrix in of_all_kinds():
        gramian = meeting(matrix).gramian
        wanted = aggregation.IMTLG().gramian_weighting(gramian)
        found = weights(ff.merge.imtl_g(), matrix)
        if len(matrix) == 1:
            assert found == 1  # TorchJD gives a zero gradient the weight zero
            continue
        cancelled = wanted.abs().sum().clamp(min=1.0)  # they sum to one
        bound = max(1e-10, 1e-14 * condition(gramian) * cancelled.item())
        assert (found - wanted).abs().max() <= bound * wanted.abs().max(), (matrix.shape, bound)
        assert bound < 1e-4


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_mtl(scale):
    for matrix in of_all_kinds(least=2):
        gramian = meeting(matrix).gramian
        wanted = aggregation.AlignedMTL(scale_mode=scale).gramian_weighting(gramian)
        found = weights(ff.merge.aligned_mtl(scale=scale), matrix)
        bound = max(1e-10, 1e-14 * condition(gramian))
        assert (found - wanted).abs().max() <= bound * wanted.abs().max() + 1e-14, (matrix.shape, bound)
        assert bound < 1e-4


def test_well_conditioned_from_the_matrix_on():
    """Each takes the Gramian itself."""
    for count in (*FEW[1:], *MANY):
        q, _ = torch.linalg.qr(torch.randn(3 * count, count))
        matrix = (0.3 * torch.randn(count, count) / count**0.5 + torch.eye(count)) @ q.T  # singular values near 1
        assert_near(merged(ff.merge.imtl_g(), matrix), aggregation.IMTLG()(matrix), matrix)
        for scale in ("min", "median", "rmse"):
            rule = ff.merge.aligned_mtl(scale=scale)
            assert_near(merged(rule, matrix), aggregation.AlignedMTL(scale_mode=scale)(matrix), matrix)


@pytest.mark.parametrize("order", ["declared", "random"])
def test_pcgrad_in_the_same_order(order, monkeypatch, seed):
    for step, matrix in enumerate(of_all_kinds()):
        count = len(matrix)
        orders = torch.arange(count).expand(count, count)
        if order == "random":
            orders = draws(seed, torch.tensor(step), count * count, matrix.device).reshape(count, count).argsort(1)
        given = iter(orders)
        monkeypatch.setattr(torch, "randperm", lambda _, given=given: next(given))
        wanted = aggregation.PCGrad()(matrix)
        monkeypatch.undo()
        assert next(given, None) is None
        assert_near(merged(ff.merge.pcgrad(order=order, seed=seed), matrix, step=step), wanted, matrix)


@pytest.mark.parametrize("leak", [0.0, 0.3, 1.0])
def test_graddrop_by_the_same_draws(leak, monkeypatch, seed):
    for step, matrix in enumerate(of_all_kinds(least=2)):
        drawn = draws(seed, torch.tensor(step), matrix.shape[1], matrix.device)
        monkeypatch.setattr(torch, "rand", lambda *_, drawn=drawn, **__: drawn)
        wanted = aggregation.GradDrop(leak=torch.full((len(matrix),), leak))(matrix)
        monkeypatch.undo()
        assert_near(merged(ff.merge.graddrop(leak=leak, seed=seed), matrix, step=step), wanted, matrix)


# MGDA: min |Σ w_i g_i|², w ≥ 0, Σ w = 1


def mgda_residual(matrix, w):
    slopes = matrix @ (matrix.T @ w)
    level = w @ slopes
    return max((-w).max(), (level - slopes).max(), (w * (slopes - level)).abs().max(), (w.sum() - 1).abs()).item()


@KIND
@pytest.mark.parametrize("counts", [FEW[1:], MANY], ids=["few", "many"])
def test_mgda_solves_its_program(kind, counts):
    for matrix in matrices(kind, counts):
        w = weights(ff.merge.mgda(), matrix)
        assert mgda_residual(normalized(matrix), w) <= RESIDUAL, matrix.shape


@KIND
def test_mgda_is_no_longer_than_torchjds(kind):
    """Over a convex set |d|² - |d*|² ≥ |d - d*|², where d* is the shortest: so near is TorchJD's answer at least."""
    for count in (2, 3, 5, 8, 10):
        matrix = normalized(KINDS[kind](count))
        theirs = aggregation.MGDA(epsilon=1e-8, max_iters=400)(matrix)
        ours = merged(ff.merge.mgda(), matrix)
        longer = theirs.square().sum() - ours.square().sum()
        assert -1e-12 <= longer <= 1e-2
        assert (theirs - ours).square().sum() <= longer + 1e-12


# UPGrad: for every i min |Σ v_k g_k|² + ε |v|², v ≥ 0, v_i ≥ 1; the mean of the results


def projections_of(matrix, regularization):
    """The weights of every projection, (K, K), by least squares with bounds, which is another algorithm."""
    count = len(matrix)
    factor = np.linalg.cholesky((matrix @ matrix.T + regularization * torch.eye(count)).numpy())
    found = [lsq_linear(factor.T, -row, (0, np.inf), method="bvls", tol=1e-15, max_iter=1000).x for row in factor]
    return torch.tensor(np.array(found)) + torch.eye(count)


def upgrad_residual(matrix, regularization, projections):
    own = torch.eye(len(matrix))
    slopes = projections @ (matrix @ matrix.T + regularization * own)
    beyond = projections - own
    return max((-beyond).max(), (-slopes).max(), (beyond * slopes).abs().max()).item()


@KIND
@pytest.mark.parametrize("counts", [FEW[1:], MANY], ids=["few", "many"])
def test_upgrad_is_the_mean_of_what_projects(kind, counts):
    for matrix in map(normalized, matrices(kind, counts, 1)):
        wanted = projections_of(matrix, 1e-4)
        assert upgrad_residual(matrix, 1e-4, wanted) < RESIDUAL  # the oracle itself
        found = weights(ff.merge.upgrad(), matrix)
        # strictly convex with the regularization as its modulus: that far two answers with these residuals are apart
        torch.testing.assert_close(found, wanted.mean(0), rtol=1e-7, atol=1e-7)
        assert_near(merged(ff.merge.upgrad(), matrix), wanted.mean(0) @ matrix, matrix, 1e-8)


@KIND
@pytest.mark.parametrize("regularization", [0.0, 0.1])
@pytest.mark.parametrize("counts", [FEW[1:], MANY], ids=["few", "many"])
def test_upgrads_projections_solve_their_programs(kind, regularization, counts):
    from funcfreeze.merge.upgrad import projections

    for matrix in map(normalized, matrices(kind, counts, 1)):
        gramian = matrix @ matrix.T + regularization * torch.eye(len(matrix))
        found = projections(gramian)
        # without regularization a singular Gramian stops the interior point method short
        allowed = RESIDUAL if regularization or len(matrix) <= MOST else 1e-7
        assert upgrad_residual(matrix, regularization, found) <= allowed, matrix.shape


def test_upgrad_as_torchjd_adds_it_up():
    """TorchJD's aggregator, with the program solved here: quadprog may be missing."""
    for matrix in [make(count) for make in KINDS.values() for count in (1, 2, 4, 7)]:
        if matrix.norm() < 0.1:  # TorchJD takes it for zero
            continue

        def project(preferred, gramian, matrix=matrix):
            torch.testing.assert_close(gramian, matrix @ matrix.T)
            return preferred @ projections_of(normalized(matrix), 1e-4)

        assert_near(merged(ff.merge.upgrad(), matrix), aggregation.UPGrad(projector=project)(matrix), matrix, 1e-8)


def test_upgrad_as_quadprog_solves_it():
    pytest.importorskip("qpsolvers")
    pytest.importorskip("quadprog")
    for matrix in of_all_kinds():
        if matrix.norm() >= 0.1:
            assert_near(merged(ff.merge.upgrad(), matrix), aggregation.UPGrad()(matrix), matrix, 1e-7)


# CAGrad: min g₀ · g_w + c |g₀| |g_w|, w ≥ 0, Σ w = 1, where g_w = Σ w_i g_i


def cagrad_objective(matrix, c, w):
    mean, direction = matrix.mean(0), matrix.T @ w
    return (mean @ direction + c * mean.norm() * direction.norm()).item()


def cagrad_residual(matrix, c, w):
    mean, direction = matrix.mean(0), matrix.T @ w
    slopes = matrix @ (mean + c * mean.norm() * direction / direction.norm())
    level = w @ slopes
    return max((-w).max(), (level - slopes).max(), (w * (slopes - level)).abs().max(), (w.sum() - 1).abs()).item()


def shares_of(given):
    """The w, of which the weights are 1/K + a multiple; None where the merged gradient is zero."""
    beyond = given - 1 / len(given)
    return None if not given.any() else beyond / beyond.sum()


def assert_nothing_improves_all(matrix, c, norm_eps=1e-4):
    """That zero is due: it is in the hull, and no d in the ball improves the worst loss, but for what `norm_eps` says.

    The largest min_i g_i · d over the ball is the least of the program, so that any d bounds it from below.
    """
    cvxpy = pytest.importorskip("cvxpy")
    count, mean = len(matrix), matrix.mean(0)
    close, _ = nnls(np.vstack([matrix.T.numpy(), np.ones((1, count))]), np.eye(matrix.shape[1] + 1)[-1])
    close = torch.tensor(close / close.sum())
    assert (matrix.T @ close).norm() <= 1.01 * norm_eps
    d, worst = cvxpy.Variable(matrix.shape[1]), cvxpy.Variable()
    radius = c * mean.norm().item()
    ball = cvxpy.norm(d - mean.numpy(), 2) <= radius
    cvxpy.Problem(cvxpy.Maximize(worst), [matrix.numpy() @ d >= worst, ball]).solve(cvxpy.CLARABEL)
    moved = torch.tensor(d.value) - mean
    inside = mean + moved * min(1.0, radius / max(moved.norm().item(), 1e-300))
    assert (matrix @ inside).min() >= -(1 + c) * mean.norm() * norm_eps - 1e-9


RADII = (0.2, 0.9, 1.3)


INACCURATE = pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
"""cvxpy's, of a solver that stops early: what it leaves is looked at, and bounds how far the answers are apart."""


@KIND
@INACCURATE
@pytest.mark.parametrize("counts", [FEW[1:], MANY], ids=["few", "many"])
def test_cagrad_solves_its_program(kind, counts):
    for matrix in map(normalized, matrices(kind, counts, 1)):
        for c in RADII:
            w = shares_of(weights(ff.merge.cagrad(c), matrix))
            if w is not None:
                assert (matrix.T @ w).norm() >= 0.99e-4
                assert cagrad_residual(matrix, c, w) <= RESIDUAL, (matrix.shape, c)
            elif matrix.any():
                assert_nothing_improves_all(matrix, c)


@KIND
@INACCURATE
def test_cagrad_is_no_worse_than_torchjds(kind):
    """With d* = g₀ + r u*, r = c |g₀|, the conditions say d* · g_w ≥ f* for all w, so f(w) - f* ≥ r |g_w| |u - u*|²/2,
    and |d - d*| = r |u - u*| is bounded by how much TorchJD's solver leaves of the objective.
    """
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    for count in (2, 3, 5, 8, 10):
        matrix = normalized(KINDS[kind](count))
        for c in (0.4, 1.2):
            theirs = aggregation.CAGrad(c=c).gramian_weighting(matrix @ matrix.T)
            ours = weights(ff.merge.cagrad(c), matrix)
            w, their_w = shares_of(ours), shares_of(theirs)
            if w is None or their_w is None:
                # on the border of what is zero a solver's last digits decide
                lengths = [(matrix.T @ one).norm() for one in (w, their_w) if one is not None]
                assert all(0.9e-4 <= length <= 1.1e-4 for length in lengths)
                continue
            their_w = their_w.clamp(min=0.0) / their_w.clamp(min=0.0).sum()  # the solver leaves the simplex a little
            gap = cagrad_objective(matrix, c, their_w) - cagrad_objective(matrix, c, w)
            assert -1e-12 <= gap <= 1e-4
            radius, length = c * matrix.mean(0).norm(), (matrix.T @ their_w).norm()
            apart = (2 * radius * (gap + 1e-12) / length).sqrt()
            assert ((ours - theirs) @ matrix).norm() <= apart + 1e-6, (matrix.shape, c)


def test_many_more_losses():
    """Nothing ends at 14."""
    matrix = normalized(torch.randn(30, 45) + 0.3 * torch.randn(45))
    assert mgda_residual(matrix, weights(ff.merge.mgda(), matrix)) <= RESIDUAL
    assert cagrad_residual(matrix, 0.5, shares_of(weights(ff.merge.cagrad(0.5), matrix))) <= RESIDUAL
    wanted = projections_of(matrix, 1e-4).mean(0)
    torch.testing.assert_close(weights(ff.merge.upgrad(), matrix), wanted, rtol=1e-7, atol=1e-7)
