"""Steps that share one State: their optimizers keep the same things, or the error says what each keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.computation.structure import looks_like


def model():
    return nn.ModuleDict({"gen": nn.Linear(2, 2), "disc": nn.Linear(2, 1)})


def losses(m, x):
    score = m["disc"](m["gen"](x)).mean()
    return {"d": score.square(), "g": -score}


def steps(first, second, scales=(None, None), **options):
    """Two Steps over one model, as a GAN has them."""
    m = model()
    built = zip((first, second), ("disc", "gen"), ("d", "g"), scales, strict=True)
    return [
        ff.Step(m, lambda m, x, k=k: {k: losses(m, x)[k]}, {k: part}, optimizer=tx, loss_scale=scale, **options)
        for tx, part, k, scale in built
    ]


adam, sgd, clip = ff.optim.adam(1e-3), ff.optim.sgd(0.1), ff.optim.clip_by_global_norm(1.0)
halves = ff.optim.partition({"gen": ff.optim.adam(1e-3), "disc": ff.optim.adam(2e-3)})
clipped = ff.optim.chain(clip, adam)


@pytest.mark.parametrize(
    ("first", "second", "own", "other"),
    [
        (adam, clipped, "chain(stateless, adam)", "adam"),
        (clipped, adam, "adam", "chain(stateless, adam)"),
        (halves, adam, "adam", "partition({'gen': nothing, 'disc': adam})"),
        (adam, halves, "partition({'gen': adam, 'disc': nothing})", "adam"),
        (adam, ff.optim.chain(adam, clip), "chain(adam, stateless)", "adam"),
        (clipped, ff.optim.chain(adam, clip), "chain(adam, stateless)", "chain(stateless, adam)"),
        (clipped, ff.optim.chain(clip, clip, adam), "chain(stateless, stateless, adam)", "chain(stateless, adam)"),
        (clipped, halves, "partition({'gen': adam, 'disc': nothing})", "chain(stateless, adam)"),
        (halves, clipped, "chain(stateless, adam)", "partition({'gen': nothing, 'disc': adam})"),
    ],
)
def test_differently_built_optimizers_are_named_on_both_sides(first, second, own, other):
    one, two = steps(first, second)
    state, _ = one(one.init(), torch.randn(3, 2))
    for call in (two, two.gradients, two.per_loss_gradients):
        with pytest.raises(ValueError, match="this State is of another model or optimizer than the Step") as caught:
            call(state, torch.randn(3, 2))
        assert (
            f"Steps that share a State need optimizers of one structure: this Step's is {own}, the State's was made by "
            f"{other}. Build all of them in one way, each with its own rates and other numbers"
        ) in str(caught.value)
    one(state, torch.randn(3, 2))


@pytest.mark.parametrize(
    ("first", "second", "own", "other"),
    [
        (adam, ff.optim.adam(1e-3, amsgrad=True), "adam with amsgrad", "adam"),
        (sgd, adam, "adam", "sgd without momentum"),
        (ff.optim.sgd(0.1, momentum=0.9), adam, "adam", "sgd with momentum"),
        (adam, ff.optim.sgd(0.1, momentum=0.9, dampening=0.1), "sgd with momentum and dampening", "adam"),
        (ff.optim.rmsprop(), adam, "adam", "rmsprop"),
        (adam, ff.optim.rmsprop(momentum=0.9), "rmsprop with momentum", "adam"),
        (adam, ff.optim.rmsprop(centered=True), "centered rmsprop", "adam"),
        (ff.optim.rmsprop(centered=True, momentum=0.9), adam, "adam", "centered rmsprop with momentum"),
    ],
)
def test_over_the_same_parameters_too(first, second, own, other):
    m, routes = model(), {"d": "*", "g": "gen"}
    one, two = (ff.Step(m, losses, routes, optimizer=tx) for tx in (first, second))
    state, _ = one(one.init(), torch.randn(3, 2))
    with pytest.raises(ValueError, match="this Step's is") as caught:
        two(state, torch.randn(3, 2))
    assert f"this Step's is {own}, the State's was made by {other}." in str(caught.value)


@pytest.mark.parametrize("second", [sgd, ff.optim.from_torch(torch.optim.SGD, lr=0.1)])
def test_one_that_keeps_nothing_at_the_start_says_so_when_it_meets_what_it_does_not_keep(second):
    m, routes = model(), {"d": "*", "g": "gen"}
    one, two = (ff.Step(m, losses, routes, optimizer=tx) for tx in (adam, second))
    state, _ = one(one.init(), torch.randn(3, 2))
    if second is not sgd:
        two(state, torch.randn(3, 2))  # torch's own optimizers ignore what they do not know
        return
    with pytest.raises(
        ValueError, match="the state has step, exp_avg, exp_avg_sq; sgd with these options keeps"
    ) as caught:
        two(state, torch.randn(3, 2))
    assert "Steps that share a State need optimizers of one structure" in str(caught.value)


def test_a_loss_scale_on_one_side():
    one, two = steps(adam, adam, scales=(ff.LossScale(), None))
    with pytest.raises(ValueError, match=r"this Step's is adam, the State's was made by adam under a loss scale\."):
        two(one.init(), torch.randn(3, 2))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (adam, ff.optim.adam(5e-2, betas=(0.5, 0.999))),
        (adam, ff.optim.adamw(5e-2)),
        (clipped, ff.optim.chain(ff.optim.clip_by_global_norm(9.0), ff.optim.adamw(5e-2))),
        (halves, halves),
        (ff.optim.sgd(0.1, momentum=0.9), ff.optim.sgd(0.2, momentum=0.5, weight_decay=0.1)),
    ],
)
def test_one_structure_with_other_numbers_is_right(first, second):
    one, two = steps(first, second)
    apart = one.init(), two.init()
    state = one.init()
    for _ in range(3):
        x = torch.randn(3, 2)
        state, _ = one(state, x)
        state, _ = two(state, x)
    assert int(state.step) == 6
    assert not any(torch.equal(p, apart[0].params[path]) for path, p in state.params.items())


def test_another_model_with_the_same_optimizer_is_no_matter_of_optimizers():
    one = ff.Step(nn.Linear(2, 1), lambda m, x: {"a": m(x).sum()}, {"a": "*"}, optimizer=adam)
    two = ff.Step({"m": nn.Linear(2, 1)}, lambda m, x: {"a": m["m"](x).sum()}, {"a": "*"}, optimizer=adam)
    with pytest.raises(ValueError, match="this State is of another model") as caught:
        two(one.init(), torch.randn(3, 2))
    assert "of one structure" not in str(caught.value)


def test_what_the_structure_tells():
    entry = {"step": 0, "exp_avg": 0, "exp_avg_sq": 0}
    assert looks_like({"weight": {"weight": entry}, "bias": {"bias": {}}}, ["weight", "bias"]) == (
        "partition({'weight': adam, 'bias': sgd without momentum})"
    )
    assert looks_like({"w": {"sum": 0, "rate": 1}}, ["w"]) == "a transform that keeps sum, rate"
    assert looks_like({"v": {}, "w": entry}, ["v", "w"]) == "sgd without momentum and adam"
    assert looks_like(3, ["w"]) == "a transform that keeps a int"
