"""Batches go on where they were: in the same order, with the same draws, whoever makes them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import funcfreeze as ff
from funcfreeze.checkpoint import Batches


class Noisy(Dataset):
    """Draws from every global generator."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(())], dtype=torch.float64)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


WORKERS = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
LOADER = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork", "ignore:.*fork.*:DeprecationWarning")


def three_epochs(batches):
    return [batch for _ in range(3) for batch in batches]


@LOADER
@WORKERS
@pytest.mark.parametrize("stop", [0, 1, 5, 6, 9, 17])
def test_stopped_anywhere(stop, workers):
    wanted = three_epochs(Batches(Noisy(), 4, seed=2))
    assert len(wanted) == 18
    torch.rand(7)  # what else draws does not matter
    batches, seen = Batches(Noisy(), 4, seed=2, num_workers=workers), []
    while len(seen) < stop:
        for batch in batches:
            seen.append(batch)
            if len(seen) == stop:
                break
    other = Batches(Noisy(), 4, seed=2, num_workers=2 - workers if workers else 0)
    other.load_state_dict(batches.state_dict())
    while len(seen) < 18:
        seen += list(other)
    for one, expected in zip(seen, wanted, strict=True):
        assert torch.equal(one, expected)
    for epoch in range(3):
        assert sorted(int(index) for batch in wanted[6 * epoch : 6 * epoch + 6] for index in batch[:, 0]) == [
            *range(23)
        ]
    assert not torch.equal(wanted[0][:, 0], wanted[6][:, 0]), "every epoch has an order of its own"


def test_the_global_generators_stay_where_they_were():
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    list(Batches(Noisy(), 4))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


def test_in_order_and_without_the_last():
    batches = Batches(range(10), 4, shuffle=False, drop_last=True)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(batches) == 2


def test_other_batches_are_refused():
    batches = Batches(range(10), 4, seed=1)
    other = Batches(range(12), 5, seed=1, shuffle=False)
    with pytest.raises(ValueError, match="items was 10, is 12; batch_size was 4, is 5; shuffle was True, is False"):
        other.load_state_dict(batches.state_dict())
    assert (other.epoch, other.position) == (0, 0)
    for make, error, message in [
        (lambda: Batches(Stream(), 2), TypeError, "an iterable one decides its own order"),
        (lambda: Batches(range(3), 2, sampler=[0]), TypeError, "leave out sampler"),
        (lambda: Batches(range(3), 0), ValueError, "batch_size is a number of items, at least 1, got 0"),
        (lambda: Batches([], 2), ValueError, "no batch in Batches of 2: the data set has no items"),
        (lambda: Batches(range(3), 4, drop_last=True), ValueError, "its 3 items are left out by drop_last"),
    ]:
        with pytest.raises(error, match=message):
            make()


@LOADER
@WORKERS
def test_a_run_with_data(workers, tmp_path):
    """A script that starts and restarts, stopped in the middle of an epoch."""
    model = torch.nn.Linear(4, 1)

    def losses(model, x):
        return {"fit": (model(x) - x[:, :1]).square().mean()}

    def script(steps, folder):
        step = ff.Step(model, losses, {"fit": "*"}, optimizer=ff.optim.adam(0.1))
        batches = Batches(Noisy(), 4, seed=3, num_workers=workers)
        state, _ = ff.checkpoint.resume(folder, step, data=batches)
        while int(state.step) < steps:
            for batch in batches:
                state, _ = step(state, batch)
                if int(state.step) == steps:
                    break
        ff.checkpoint.save(folder, step, state, data=batches)
        return state

    wanted = script(16, tmp_path / "whole")
    script(9, tmp_path / "parts")
    found = script(16, tmp_path / "parts")
    assert all(torch.equal(found.params[path], tensor) for path, tensor in wanted.params.items())


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_torchdatas_loader_is_taken(tmp_path):
    from torchdata.stateful_dataloader import StatefulDataLoader as stateful

    step = ff.Step(torch.nn.Linear(1, 1), lambda m, x: {"l": m(x).mean()}, {"l": "*"}, optimizer=ff.optim.sgd(0.1))
    loader = stateful([torch.full((1,), float(i)) for i in range(10)], batch_size=2)
    walk = iter(loader)
    seen = [next(walk) for _ in range(2)]
    ff.checkpoint.save(tmp_path, step, step.init(), data=loader)
    rest = list(walk)
    other = stateful([torch.full((1,), float(i)) for i in range(10)], batch_size=2)
    ff.checkpoint.resume(tmp_path, step, data=other)
    assert len(seen) == 2
    assert all(torch.equal(one, two) for one, two in zip(other, rest, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated", "ignore:.*fork.*")
def test_torchdatas_position_is_of_so_many_workers(tmp_path):
    from torchdata.stateful_dataloader import StatefulDataLoader as stateful

    step = ff.Step(torch.nn.Linear(1, 1), lambda m, x: {"l": m(x).mean()}, {"l": "*"}, optimizer=ff.optim.sgd(0.1))
    items = [torch.full((1,), float(i)) for i in range(10)]
    loader = stateful(items, batch_size=2)
    next(iter(loader))
    ff.checkpoint.save(tmp_path, step, step.init(), data=loader)
    told = "the position is that of other data: batch_size was 2, is 5; len was 5, is 2; num_workers was 0, is 1"
    with pytest.raises(ValueError, match=told):
        ff.checkpoint.resume(tmp_path, step, data=stateful(items, batch_size=5, num_workers=1))
