"""What was checked at the last step is not checked again, and never taken for granted when it has changed."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import funcfreeze as ff
from funcfreeze.optim.unchanged import Checked

MAKERS = {
    "adam": lambda: ff.optim.adam(0.1, weight_decay=0.1),
    "adamw": lambda: ff.optim.adamw(0.1, amsgrad=True),
    "rmsprop": lambda: ff.optim.rmsprop(0.1, momentum=0.9, centered=True),
    "sgd": lambda: ff.optim.sgd(0.1, momentum=0.9),
    "schedule": lambda: ff.optim.adam(ff.optim.linear_schedule(0.1, 0.0, 5)),
    "chain": lambda: ff.optim.chain(ff.optim.clip_by_global_norm(0.5), ff.optim.adam(0.1)),
}


def fresh():
    return {"a": torch.randn(3, 4), "b": torch.randn(4), "c": torch.randn(2, 2)}


class Pair:
    """A transform in place beside its pure form, on the same numbers."""

    def __init__(self, make):
        self.tx, self.pure = make(), make()
        self.params = fresh()
        self.copies = {path: p.clone() for path, p in self.params.items()}
        self.state, self.kept = self.tx.init(self.params), self.pure.init(self.copies)
        self.turn = 0

    def step(self, paths="abc", grads=None):
        grads = grads or {path: torch.randn_like(self.params[path]) for path in paths}
        step = torch.tensor(self.turn)
        self.turn += 1
        own = {path: grad.to_dense() if grad.is_sparse else grad.clone() for path, grad in grads.items()}
        self.state = self.tx.in_place(grads, self.state, self.params, step=step)()
        updates, self.kept = self.pure.update(own, self.kept, self.copies, step=step)
        self.copies = ff.apply_updates(self.copies, updates)
        for path, parameter in self.params.items():
            torch.testing.assert_close(parameter, self.copies[path], rtol=1e-10, atol=1e-12, msg=path)


@pytest.fixture(params=MAKERS)
def pair(request):
    made = Pair(MAKERS[request.param])
    made.step()
    made.step()
    return made


def test_sets_of_gradients_that_come_and_go(pair):
    for paths in ("abc", "ab", "c", "abc", "b", "ab", "a", "ac", "bc", "cb", "bca", "abc"):
        pair.step(paths)


def test_a_gradient_in_another_memory_order(pair):
    for _ in range(2):
        grads = {path: torch.randn_like(p) for path, p in pair.params.items()}
        grads["a"] = torch.randn(4, 3).T
        pair.step(grads=grads)
        pair.step(grads={**grads, "b": torch.randn(()).expand(4)})
        pair.step()


def test_a_gradient_that_is_a_parameter(pair):
    grads = {path: torch.randn_like(p) for path, p in pair.params.items()}
    pair.params["b"].data, pair.copies["b"] = pair.params["b"].data.clone(), pair.copies["b"].clone()
    pair.step(grads={**grads, "b": pair.params["b"]})
    pair.step()


def test_a_parameter_whose_memory_was_exchanged(pair):
    new = torch.randn(4, 3).T
    pair.params["a"].data = new.clone(memory_format=torch.preserve_format)
    assert pair.params["a"].stride() != (4, 1)
    pair.copies["a"] = new.clone()
    for _ in range(3):
        pair.step()


def test_a_parameter_and_moments_laid_out_anew_in_the_same_memory():
    for exchange in (lambda p: p.t_(), lambda p: setattr(p, "data", p.data.t())):
        pair = Pair(lambda: ff.optim.adam(0.1))
        pair.params["c"] = torch.randn(3, 3)
        pair.copies["c"] = pair.params["c"].clone()
        pair.state, pair.kept = pair.tx.init(pair.params), pair.pure.init(pair.copies)
        pair.step()
        pair.step()
        exchange(pair.params["c"])
        pair.copies["c"] = pair.params["c"].clone()
        pair.step()
        pair.step()


def test_other_tensors_under_the_same_paths(pair):
    for _ in range(3):
        pair.params = {path: p.clone() for path, p in pair.params.items()}
        pair.step()
        pair.state = copy.deepcopy(pair.state)
        pair.step()


def test_a_state_that_no_longer_fits_is_found_under_the_same_dict():
    tx, params = ff.optim.adam(0.1), fresh()
    state = tx.init(params)
    grads = {path: torch.randn_like(p) for path, p in params.items()}
    for _ in range(3):
        state = tx.in_place(grads, state, params)()
    before = {path: p.clone() for path, p in params.items()}
    state["a"]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"a: exp_avg has shape \(5,\) .* expected \(3, 4\)"):
        tx.in_place(grads, state, params)
    assert all(torch.equal(before[path], p) for path, p in params.items())


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(3, 4, dtype=torch.float32)])
def test_a_gradient_that_does_not_fit_is_found_after_ones_that_did(wrong):
    tx, params = ff.optim.adam(0.1), fresh()
    state = tx.init(params)
    for _ in range(3):
        state = tx.in_place({path: torch.randn_like(p) for path, p in params.items()}, state, params)()
    with pytest.raises(ValueError, match="a: the gradient has"):
        tx.in_place({path: wrong if path == "a" else torch.randn_like(p) for path, p in params.items()}, state, params)


def test_a_sparse_gradient_after_dense_ones():
    for make in (lambda: ff.optim.sgd(0.1), lambda: ff.optim.sgd(0.1, momentum=0.5)):
        both = Pair(make)
        both.step()
        both.step()
        sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.randn(1, 4), (3, 4), check_invariants=True)
        both.step(grads={"a": sparse, "b": torch.randn(4), "c": torch.randn(2, 2)})
        both.step()
    tx, params = ff.optim.adam(0.1), fresh()
    state = tx.init(params)
    state = tx.in_place({"a": torch.randn(3, 4)}, state, params)()
    with pytest.raises(ValueError, match="takes no such sparse gradients"):
        tx.in_place({"a": sparse}, state, params)


def test_two_states_by_turns_under_one_transform():
    tx = ff.optim.adam(0.1)
    one, other = Pair(lambda: tx), Pair(lambda: tx)
    for _ in range(3):
        one.step()
        other.step()


def test_nothing_is_kept_alive_and_what_is_gone_does_not_count():
    tensors = [torch.randn(3) for _ in range(2)]
    grad = torch.randn(3)
    checked = Checked(tensors[:1], tensors[1:], [grad])
    assert checked.holds(tensors[:1], tensors[1:], [grad])
    held = tensors[0]
    del tensors[1]
    gc.collect()
    assert not checked.holds([held], [], [grad])
    assert checked._gone


def test_parameters_of_two_dtypes():
    both = Pair(lambda: ff.optim.adam(0.1))
    both.params["b"] = both.params["b"].float()
    both.copies["b"] = both.params["b"].clone()
    both.state, both.kept = both.tx.init(both.params), both.pure.init(both.copies)
    for _ in range(3):
        grads = {path: torch.randn_like(p) for path, p in both.params.items()}
        both.state = both.tx.in_place(grads, both.state, both.params)()
        updates, both.kept = both.pure.update(grads, both.kept, both.copies)
        both.copies = ff.apply_updates(both.copies, updates)
    for path, parameter in both.params.items():
        torch.testing.assert_close(parameter, both.copies[path])
