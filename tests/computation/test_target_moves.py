"""When and how a target moves: decays, timing, statistics, steps that are skipped, in parts or in halves."""

from __future__ import annotations

import copy

import optree
import pytest
import torch

import funcfreeze as ff
from teacher import batches, by_hand, cloned, losses, make, network, same_bits
from twins import GRAPH, assert_moved_alike, averaged, tensors, twin_of

SLOW = pytest.mark.slow
RUNS = {
    "eager": {},
    "kept": {"donate": False},
    "reference": {"engine": "reference"},
    "toggle": {"engine": "toggle"},
    "compiled": {"compile": GRAPH},
    "compiled, kept": {"compile": GRAPH, "donate": False},
}
SOME_RUNS = [pytest.param(run, marks=SLOW if "compile" in run else ()) for run in RUNS.values()]
EAGER_AND_COMPILED = [{}, {"compile": GRAPH}]
EAGER_AND_SLOWLY_COMPILED = [{}, pytest.param({"compile": GRAPH}, marks=SLOW)]


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
@pytest.mark.parametrize("timing", [{"every": 3}, {"every": 2, "start": 3}, {"start": 2, "stop": 5}], ids=str)
def test_moves_are_at_the_counts_of_range(timing, run):
    wanted = {"start": 0, "stop": 9, "every": 1, **timing}
    step = make(average=ff.ema("online", 0.5, **timing), **run)
    state, moved = step.init(), []
    for number, x in enumerate(batches(9)):
        before = state.targets["teacher"]["0.weight"].clone()
        state, _ = step(state, x)
        after = state.targets["teacher"]["0.weight"]
        if not torch.equal(before, after):
            torch.testing.assert_close(after, 0.5 * before + 0.5 * state.params["online.0.weight"])
            moved.append(number)
    assert moved == [*range(wanted["start"], wanted["stop"], wanted["every"])]
    again = step.init().replace(step=torch.tensor(wanted["start"] + wanted["every"]))
    begun = again.targets["teacher"]["0.weight"].clone()
    again, _ = step(again, batches(1)[0])
    assert not torch.equal(again.targets["teacher"]["0.weight"], begun)


DECAYS = {
    "0": (0, lambda number: 0.0),
    "1": (1, lambda number: 1.0),
    "float": (0.3, lambda number: 0.3),
    "tensor": (torch.tensor(0.3, dtype=torch.float64), lambda number: 0.3),
    "schedule": (
        1 - ff.schedules.cosine(0.5, 0.0, 4),
        lambda number: 1 - 0.25 * (1 + torch.tensor(torch.pi * min(number, 4) / 4).cos()),
    ),
    "from a table": (ff.schedules.table([0.1, 0.9, 0.5, 0.2, 0.0]), lambda number: [0.1, 0.9, 0.5, 0.2, 0.0][number]),
    "function": (lambda count: 1 / (1 + count), lambda number: 1 / (1 + number)),
    "function of Python's": (lambda count: 0.25, lambda number: 0.25),
}


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
@pytest.mark.parametrize(("decay", "wanted"), DECAYS.values(), ids=DECAYS)
def test_decays(decay, wanted, run):
    model, given = network(), batches(5)
    start, plain = tensors(model), copy.deepcopy(model)
    step = make(model, average=ff.ema("online", decay), **run)
    state = step.init()
    torch.manual_seed(0)
    for x in given:
        state, _ = step(state, x)
    torch.manual_seed(0)
    twin = by_hand(plain, given, lambda number: float(wanted(number)))
    assert_moved_alike(tensors(model["online"]), state.targets["teacher"], tensors(twin))
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))
    assert step.traces == (1 if run else 0)


@pytest.mark.parametrize("run", EAGER_AND_COMPILED, ids=["eager", "compiled"])
def test_a_decay_that_somebody_changes_in_place(run):
    decay = torch.tensor(1.0)
    step = make(average=ff.ema("online", decay), **run)
    state = step.init()
    begun = state.targets["teacher"]["0.weight"].clone()
    state, _ = step(state, torch.randn(6, 4))
    assert torch.equal(state.targets["teacher"]["0.weight"], begun)
    decay.fill_(0.0)
    state, _ = step(state, torch.randn(6, 4))
    assert torch.equal(state.targets["teacher"]["0.weight"], state.params["online.0.weight"])


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_train_and_eval(run):
    """As the original is, part by part, at the call; or as was said."""
    model, x = network(), torch.randn(6, 4)
    for mode in (None, "train", "eval"):
        step = make(model, average=ff.ema("online", 0.8, mode=mode), **run)
        state = step.init()
        for flags in ("train", "norm in eval", "eval", "train"):
            model.train(flags != "eval")
            model["online"][1].train(flags == "train")
            twin = copy.deepcopy(model["online"])
            twin.load_state_dict(dict(state.targets["teacher"]))
            plain = copy.deepcopy(model)
            plain.load_state_dict({**state.params, **state.buffers})
            if mode is not None:
                twin.train(mode == "train")
            torch.manual_seed(0)
            wanted = losses(plain, x, targets={"teacher": twin})["fit"]
            torch.manual_seed(0)
            state, metrics = step(state, x)
            torch.testing.assert_close(metrics["fit"], wanted.detach())
            for path, buffer in twin.named_buffers():
                torch.testing.assert_close(state.targets["teacher"][path], buffer)
        model.train()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("buffers", ["own", "copied", "averaged"])
@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_statistics(run, buffers, mode):
    """At the steps at which it moves; at the others only by its own forward."""
    model, given = network(), batches(5)
    step = make(model, average=ff.ema("online", 0.8, buffers=buffers, mode=mode, every=2, start=1), **run)
    plain, state = copy.deepcopy(model), step.init()
    torch.manual_seed(0)
    for x in given:
        state, _ = step(state, x)
    torch.manual_seed(0)
    twin = twin_of(plain["online"]).train(mode == "train")
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for number, x in enumerate(given):
        optimizer.zero_grad()
        losses(plain, x, targets={"teacher": twin})["fit"].backward()
        optimizer.step()
        if number in (1, 3):
            averaged(twin, plain["online"], 0.8)
            for average, new in zip(twin.buffers(), plain["online"].buffers(), strict=True):
                if buffers == "averaged" and new.is_floating_point():
                    average.mul_(0.8).add_(new, alpha=0.2)
                elif buffers != "own":
                    average.copy_(new)
    assert_moved_alike(tensors(model["online"]), state.targets["teacher"], tensors(twin))


@pytest.mark.parametrize("scale", [None, ff.LossScale(2.0**4)], ids=["plain", "scaled"])
@pytest.mark.parametrize("run", SOME_RUNS, ids=RUNS)
def test_a_skipped_step_leaves_it_bit_identical(run, scale):
    """With its statistics, which its own forward has moved; a copy would be of what is not finite."""
    good, bad, last = batches(3)
    bad[0, 0] = torch.nan
    for average in (
        ff.ema("online", 0.5),
        ff.ema("online", torch.tensor(0.1), buffers="averaged"),
        ff.ema("online", 0),
    ):
        step = make(average=average, on_nonfinite="skip", loss_scale=scale, **run)
        state = step.init()
        state = state.replace(targets={"teacher": {path: t + 1 for path, t in state.targets["teacher"].items()}})
        state, _ = step(state, good)
        before = cloned(dict(state.targets["teacher"]))
        state, metrics = step(state, bad)
        assert bool(metrics["ff/skipped"])
        assert same_bits(before, state.targets["teacher"])
        state, _ = step(state, last)
        assert not torch.equal(before["0.weight"], state.targets["teacher"]["0.weight"])
        assert int(state.step) == 3


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_a_loss_scale_alone_skips_the_optimizer_as_a_grad_scaler_does(run):
    """People move the average in the line after `scaler.update()`, whatever became of the step."""

    def steep(model, x, *, targets):
        return {"fit": 1e290 * model["online"](x).square().mean()}

    step = make(losses=steep, average=ff.ema("online", 0.5), loss_scale=ff.LossScale(2.0**100), **run)
    state = step.init()
    begun = cloned(dict(state.params))
    state = state.replace(targets={"teacher": {path: t + 1 for path, t in state.targets["teacher"].items()}})
    state, metrics = step(state, torch.randn(6, 4))
    assert torch.isfinite(metrics["fit"])
    assert same_bits(begun, dict(state.params))
    torch.testing.assert_close(state.targets["teacher"]["0.weight"], begun["online.0.weight"] + 0.5)


def test_a_step_that_raises_leaves_it():
    step = make(on_nonfinite="raise")
    state, _ = step(step.init(), torch.randn(6, 4))
    before = cloned(state)
    with pytest.raises(FloatingPointError):
        step(state, torch.full((6, 4), torch.nan))
    assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves(state)))
    step(state, torch.randn(6, 4))


@pytest.mark.parametrize("run", EAGER_AND_COMPILED, ids=["eager", "compiled"])
def test_microbatches_move_it_once(run):
    """Its own statistics go through all parts, the average through one update."""
    model, given = network(), batches(4)
    start, plain = tensors(model), copy.deepcopy(model)
    step = make(model, average=ff.ema("online", 0.8, every=2), microbatches=3, **run)
    state = step.init()
    torch.manual_seed(0)
    for x in given:
        state, _ = step(state, x)
    torch.manual_seed(0)
    twin = by_hand(plain, given, moves=lambda number: number % 2 == 0, parts=3)
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))
    assert_moved_alike(tensors(model["online"]), state.targets["teacher"], tensors(twin))
    assert int(state.targets["teacher"]["1.num_batches_tracked"]) == 12


@pytest.mark.parametrize("run", EAGER_AND_COMPILED, ids=["eager", "compiled"])
def test_halves(run):
    """The first changes nothing; the second moves it, by whatever gradients it is given."""
    model, given = network(), batches(3)
    one, other = make(model, **run), make(copy.deepcopy(model))
    state, wanted = one.init(), other.init()
    torch.manual_seed(0)
    for x in given:
        wanted, _ = other(wanted, x)
    torch.manual_seed(0)
    for x in given:
        before = cloned(state)
        drawn = torch.get_rng_state()
        one.compute(state, x)
        one.gradients(state, x)
        one.per_loss_gradients(state, x)
        torch.set_rng_state(drawn)
        half = one.compute(state, x)
        assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves(state)))
        state, _ = one.apply_gradients(state, half)
    torch.testing.assert_close(dict(state.params), dict(wanted.params))
    torch.testing.assert_close(dict(state.targets["teacher"]), dict(wanted.targets["teacher"]))
    half = one.compute(state, given[0])
    half = half.replace(gradients={path: torch.zeros_like(g) for path, g in half.gradients.items()})
    plain = make(model, optimizer=ff.optim.sgd(0.1))
    begun = plain.init()
    first = begun.params["online.0.weight"].clone(), begun.targets["teacher"]["0.weight"].clone()
    half = plain.compute(begun, given[0])
    after, _ = plain.apply_gradients(begun, half.replace(gradients={"online.0.weight": torch.ones(6, 4)}))
    torch.testing.assert_close(after.targets["teacher"]["0.weight"], 0.8 * first[1] + 0.2 * (first[0] - 0.1))
