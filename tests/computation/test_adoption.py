"""Another Step's state taken over: what fits is kept, the rest starts afresh, and both are told."""

from __future__ import annotations

import optree
import pytest
import torch
from torch import nn, optim

import funcfreeze as ff

ROUTES = {"task": "*", "small": {"encoder": -0.1}}


def network(out=2, width=6):
    encoder = nn.Sequential(nn.Linear(4, width, bias=False), nn.BatchNorm1d(width), nn.Tanh())
    return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(width, out)})


def losses(model, batch):
    h = model["encoder"](batch)
    return {"task": model["head"](h).square().mean(), "small": h.abs().mean()}


def make(model=None, optimizer=None, routes=ROUTES, **options):
    return ff.Step(model or network(), losses, routes, optimizer=optimizer or ff.optim.adamw(1e-2), **options)


def trained(step, number=3):
    state = step.init()
    for _ in range(number):
        state, _ = step(state, torch.randn(8, 4))
    return state


def test_the_same_step_keeps_everything():
    one, other = make(), make()
    state, adoption = other.adopt(before := trained(one))
    assert not adoption.afresh
    assert not adoption.left
    assert all(map(torch.equal, optree.tree_leaves(state), optree.tree_leaves(before)))
    expected, _ = make(donate=False)(state, batch := torch.randn(8, 4))
    after, _ = other(state, batch)
    assert all(map(torch.equal, optree.tree_leaves(after), optree.tree_leaves(expected)))
    with pytest.raises(RuntimeError, match="spent"):
        _ = before.params


def test_another_head():
    state = trained(make())
    values = {path: p.clone() for path, p in state.params.items()}
    model = network(out=5)
    adopted, adoption = make(model).adopt(state)
    assert torch.equal(adopted.params["encoder.0.weight"], values["encoder.0.weight"])
    assert torch.equal(adopted.params["head.weight"], model["head"].weight)
    assert float(adopted.optimizer["encoder.0.weight"]["step"]) == 3
    assert float(adopted.optimizer["head.weight"]["step"]) == 0
    assert int(adopted.step) == 3
    assert adoption.afresh == (
        "params.head.weight: the state has shape (2, 6), the Step (5, 6)",
        "params.head.bias: the state has shape (2,), the Step (5,)",
        "optimizer.head.weight: the state keeps step, exp_avg, exp_avg_sq, the Step step, exp_avg, exp_avg_sq, "
        "of other shapes or in more digits",
        "optimizer.head.bias: the state keeps step, exp_avg, exp_avg_sq, the Step step, exp_avg, exp_avg_sq, "
        "of other shapes or in more digits",
    )
    assert "4 start afresh:" in str(adoption)
    adopted, _ = make(model)(adopted, torch.randn(8, 4))
    assert float(adopted.optimizer["encoder.0.weight"]["step"]) == 4
    assert float(adopted.optimizer["head.weight"]["step"]) == 1


def test_a_step_never_writes_to_the_module_through_an_adopted_state():
    model = network(out=5)
    kept = [p.detach().clone() for p in model.parameters()]
    step = make(model)
    state, _ = step.adopt(trained(make()))
    for _ in range(3):
        state, _ = step(state, torch.randn(8, 4))
    assert all(map(torch.equal, kept, model.parameters()))


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        (ff.optim.chain(ff.optim.clip_by_global_norm(1.0), ff.optim.adam(1e-3)), True),
        (ff.optim.partition({"encoder": ff.optim.adam(1e-3), "head": ff.optim.adamw(1e-3)}), True),
        (ff.optim.from_torch(optim.Adam), True),
        (ff.optim.from_torch(optim.Adagrad), False),
        (ff.optim.sgd(1e-3, momentum=0.9), False),
        (ff.optim.adam(1e-3, amsgrad=True), False),
    ],
)
def test_another_optimizer(optimizer, kept):
    step = make(optimizer=optimizer)
    state, adoption = step.adopt(trained(make()))
    names = [name for name in adoption.kept if name.startswith("optimizer.")]
    assert len(names) == (5 if kept else 0)
    assert len(adoption.afresh) == (0 if kept else 5)
    state, _ = step(state, torch.randn(8, 4))
    for param in state.params.values():
        assert param.isfinite().all()


def test_what_the_new_optimizer_does_not_keep_is_left():
    _, adoption = make(optimizer=ff.optim.sgd(0.1)).adopt(trained(make()))
    assert adoption.left == tuple(f"optimizer.{path}" for path, _ in network().named_parameters())


def test_other_routes():
    state = trained(make(routes={"task": "head", "small": "encoder"}))
    adopted, adoption = make(routes={"task": "head", "small": "head"}).adopt(state)
    assert {name.removeprefix("optimizer.") for name in adoption.left} == {
        "encoder.0.weight",
        "encoder.1.weight",
        "encoder.1.bias",
    }
    assert adopted.optimizer.keys() == {"head.weight", "head.bias"}


def test_a_loss_scale_and_precision():
    scaled = trained(make(loss_scale=ff.LossScale(8.0)))
    state, adoption = make(network().double(), loss_scale=ff.LossScale(2.0)).adopt(scaled)
    assert "optimizer.loss_scale" in adoption.kept
    assert float(state.optimizer["loss_scale"]["scale"]) == 8.0
    narrow, adoption = make(network().float(), loss_scale=ff.LossScale(2.0)).adopt(state)
    assert narrow.params["head.weight"].dtype == torch.float32
    assert any("in more digits" in line for line in adoption.afresh)


def test_ties_that_come_and_go():
    class Two(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            if tied:
                self.b.weight = self.a.weight

    def loss(model, x):
        return {"l": model.b(model.a(x)).square().mean()}

    tied, free = (
        ff.Step(Two(is_tied), loss, {"l": "*"}, optimizer=ff.optim.sgd(0.1, momentum=0.9)) for is_tied in (True, False)
    )
    state, _ = tied(tied.init(), torch.randn(4, 3))
    apart, adoption = free.adopt(state)
    assert torch.equal(apart.params["a.weight"], apart.params["b.weight"])
    assert {"params.a.weight", "params.b.weight"} <= set(adoption.kept)
    apart, _ = free(apart, torch.randn(4, 3))
    assert not torch.equal(apart.params["a.weight"], apart.params["b.weight"])
    together, adoption = tied.adopt(apart)
    assert torch.equal(together.params["b.weight"], apart.params["a.weight"])
    assert "params.b.weight" in adoption.left


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match="no parameter of this State is one of the Step's, by path and shape"):
        make(network(out=7, width=9)).adopt(trained(make()))
    with pytest.raises(TypeError, match="adopt\\(state\\) takes another Step's State, got dict"):
        make().adopt({})
    step = make()
    step(state := step.init(), torch.randn(8, 4))
    with pytest.raises(RuntimeError, match="spent"):
        step.adopt(state)


def test_a_frozen_tensor_that_is_tied_by_other_names():
    class Old(nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.a.weight = frozen

    class New(nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3)
            self.c.weight = frozen
            self.a = nn.Module()
            self.a.weight = frozen

    frozen = nn.Parameter(torch.randn(3, 3))
    old = ff.Step(Old(frozen), lambda m, x: {"l": m.b(m.a(x)).square().mean()}, {"l": "b"}, optimizer=ff.optim.sgd(0.1))
    new = ff.Step(New(frozen), lambda m, x: {"l": m.b(m.c(x)).square().mean()}, {"l": "*"}, optimizer=ff.optim.sgd(0.1))
    before = frozen.detach().clone()
    state, _ = new.adopt(old.init())
    state, _ = new(state, torch.randn(4, 3))
    assert not torch.equal(state.params["a.weight"], before)
    assert torch.equal(frozen, before)


def test_what_a_chain_keeps_twice():
    both = ff.optim.chain(ff.optim.sgd(1.0, momentum=0.9), ff.optim.sgd(0.1, momentum=0.5))
    one = make(optimizer=both)
    state = trained(one)
    expected, _ = make(optimizer=both, donate=False)(state, batch := torch.randn(8, 4))
    adopted, adoption = make(optimizer=both).adopt(state)
    found, _ = make(optimizer=both)(adopted, batch)
    assert not adoption.afresh
    assert all(map(torch.equal, optree.tree_leaves(found.params), optree.tree_leaves(expected.params)))
    _, adoption = make(optimizer=ff.optim.sgd(0.1, momentum=0.5)).adopt(found)
    assert all("kept in several places" in line for line in adoption.afresh)
    assert len(adoption.afresh) == 5


def test_a_transform_of_ones_own():
    def update(grads, state, params, *, step=None):
        mean = {path: 0.9 * kept + grads.get(path, 0) for path, kept in state["mean"].items()}
        return {path: -0.1 * mean[path] for path in grads}, {"mean": mean}

    own = ff.optim.Transform(lambda params: {"mean": {path: torch.zeros_like(p) for path, p in params.items()}}, update)
    state = trained(make(optimizer=own))
    kept = {path: tensor.clone() for path, tensor in state.optimizer["mean"].items()}
    adopted, adoption = make(optimizer=own).adopt(state)
    assert not adoption.afresh
    assert [name for name in adoption.kept if name.startswith("optimizer")] == [
        "optimizer: 5 tensors that it keeps otherwise than by parameter and name"
    ]
    assert all(torch.equal(adopted.optimizer["mean"][path], tensor) for path, tensor in kept.items())
    _, adoption = make(optimizer=ff.optim.adam(1e-3)).adopt(adopted)
    assert "optimizer: 5 tensors that it keeps otherwise than by parameter and name" in adoption.left
    _, adoption = make(optimizer=own).adopt(trained(make()))
    assert "optimizer: 5 tensors that it keeps otherwise than by parameter and name" in adoption.afresh


def test_a_loss_scale_that_only_one_has():
    _, adoption = make().adopt(trained(make(loss_scale=ff.LossScale(8.0))))
    assert adoption.left == ("optimizer.loss_scale",)
    assert len(adoption.kept) == 13
    state, adoption = make(loss_scale=ff.LossScale(4.0)).adopt(trained(make()))
    assert adoption.afresh == ("optimizer.loss_scale: the state has none",)
    assert float(state.optimizer["loss_scale"]["scale"]) == 4.0
    assert float(state.optimizer["optimizer"]["head.bias"]["step"]) == 3


def test_nothing_is_said_to_be_kept_for_what_no_loss_may_update():
    routes = {"task": "head", "small": "encoder.1"}
    _, adoption = make(routes=routes).adopt(trained(make(routes=routes)))
    kept = {name.removeprefix("optimizer.") for name in adoption.kept if name.startswith("optimizer")}
    assert kept == {"head.weight", "head.bias", "encoder.1.weight", "encoder.1.bias"}
