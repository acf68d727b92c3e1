"""from_torch against the optimizers it wraps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from trajectories import assert_close, gradients, in_place_displacements, pure_displacements, start, torch_displacements

from funcfreeze.optim import adam, from_torch, linear_schedule, sgd

FORMS = [pure_displacements, in_place_displacements]
OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adagrad, {"lr_decay": 0.1}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adamax, {"foreach": True}),
    (torch.optim.ASGD, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adafactor, {}),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS, ids=lambda case: getattr(case, "__name__", ""))
def test_displacement_is_that_of_the_optimizer(form, optimizer, options):
    lr = 0.05
    expected = torch_displacements(partial(optimizer, lr=lr, **options), start(), gradients())
    assert_close(form(from_torch(optimizer, lr=lr, **options), start(), gradients()), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adafactor])
def test_rate_may_be_a_schedule(form, optimizer):
    schedule = linear_schedule(0.05, 0.01, 4)
    rates = [float(schedule(step)) for step in range(5)]
    expected = torch_displacements(partial(optimizer, lr=0.05), start(), gradients(), rates)
    assert_close(form(from_torch(optimizer, lr=schedule), start(), gradients()), expected)
    with pytest.raises(TypeError, match="lr is a schedule and must be told the step"):
        from_torch(optimizer, lr=schedule).update(gradients()[0], {}, start())


@pytest.mark.parametrize("form", FORMS)
def test_muon_takes_matrices(form):
    params = {"w": start()["a.weight"]}
    grads = [{"w": given["a.weight"]} for given in gradients()]
    expected = torch_displacements(partial(torch.optim.Muon, lr=0.1), params, grads)
    assert_close(form(from_torch(torch.optim.Muon, lr=0.1), params, grads), expected, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_sparse_adam(form):
    table = torch.ones(5, 2, dtype=torch.float64)
    grads = [
        {
            "t": torch.sparse_coo_tensor(
                torch.tensor([[1, step]]), torch.ones(2, 2).double(), (5, 2), check_invariants=True
            )
        }
        for step in range(4)
    ]
    expected = torch_displacements(partial(torch.optim.SparseAdam, lr=0.1), {"t": table}, grads)
    assert_close(form(from_torch(torch.optim.SparseAdam, lr=0.1), {"t": table}, grads), expected)


def test_state_is_what_the_optimizer_keeps():
    tx, params = from_torch(torch.optim.RAdam), start()
    state = tx.init(params)
    assert state == {path: {} for path in params}
    _, state = tx.update(gradients()[0], state, params)
    assert {path: list(entry) for path, entry in state.items() if entry} == {
        path: ["step", "exp_avg", "exp_avg_sq"] for path in gradients()[0]
    }


@pytest.mark.parametrize(
    ("given", "kwargs", "error", "text"),
    [
        (torch.optim.SGD([nn.Parameter(torch.ones(1))]), {}, TypeError, "got an instance of SGD; give the class"),
        (sgd(), {}, TypeError, "takes a torch.optim.Optimizer class, got Transform: "),
        ("sgd", {}, TypeError, "takes a torch.optim.Optimizer class, got str: 'sgd'"),
        (nn.Linear, {}, TypeError, "takes a torch.optim.Optimizer class, got type: <class "),
        (torch.optim.lr_scheduler.StepLR, {}, TypeError, "StepLR'>; for schedulers there is ff.schedules.from_torch"),
        (torch.optim.LBFGS, {}, ValueError, r"from_torch\(LBFGS\): its step\(\) needs a closure"),
        (torch.optim.SGD, {"beta": 1}, TypeError, "unexpected keyword argument 'beta'"),
        (torch.optim.SGD, {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ],
)
def test_construction_errors(given, kwargs, error, text):
    with pytest.raises(error, match=text) as raised:
        from_torch(given, **kwargs)
    if kwargs:
        assert raised.value.__notes__ == [f"in from_torch(SGD), built with {'='.join(map(str, *kwargs.items()))}"]


class Plain(torch.optim.Optimizer):
    """Descent with what a subclass does beside it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "count": 0, "sum": torch.zeros(())})

    def beside(self, group):
        pass

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad)
                param.grad.zero_()
                kept = self.state[param]
                kept["count"] = kept.get("count", 0) + 1
                kept["history"] = [*kept.get("history", []), param.clone()]
                kept["note"] = None
            self.beside(group)


class Counting(Plain):
    def beside(self, group):
        group["count"] += 1
        group["sum"].add_(1)
        group["new"] = 1


class Global(Plain):
    def beside(self, group):
        self.state["global"]["count"] = 1


class Failing(Plain):
    def beside(self, group):
        raise RuntimeError("out of luck")


def test_numbers_and_lists_in_the_state():
    tx, params = from_torch(Plain), {"w": torch.ones(1)}
    state = tx.init(params)
    for step in range(3):
        grads = {"w": torch.ones(1)}
        before = {path: {**entry} for path, entry in state.items()}
        _, after = tx.update(grads, state, params)
        assert torch.equal(grads["w"], torch.ones(1))
        assert state == before
        committed = tx.in_place(grads, state, params)()
        for entry in (after["w"], committed["w"]):
            assert (entry["count"], len(entry["history"]), entry["note"]) == (step + 1, step + 1, None)
        state = committed
    assert torch.allclose(params["w"], torch.tensor([0.7]))


def test_state_beside_the_parameters_is_refused():
    params = {"w": torch.ones(1)}
    for tx, text in (
        (from_torch(Counting), r"from_torch\(Counting\): its step\(\) changed the options count, sum, new of the"),
        (from_torch(Global), r"from_torch\(Global\): its step\(\) keeps state under global, which is no parameter"),
    ):
        for form in (tx.update, tx.in_place):
            with pytest.raises(ValueError, match=text):
                form({"w": torch.ones(1)}, tx.init(params), params)
    assert torch.equal(params["w"], torch.ones(1))


def test_an_exception_leaves_everything_as_it_was():
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    tx = from_torch(Failing)
    with pytest.raises(RuntimeError, match="out of luck") as raised:
        tx.in_place({"a": torch.ones(1), "b": torch.ones(1)}, tx.init(params), params)
    assert raised.value.__notes__ == ["in from_torch(Failing), for the parameters a, b"]
    assert all(torch.equal(param, torch.ones(1)) for param in params.values())


def test_sparse_gradients_that_the_optimizer_refuses():
    grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (5, 2), check_invariants=True)
    params = {"in.table": torch.ones(5, 2), "w": torch.ones(2)}
    tx = from_torch(torch.optim.RMSprop)
    with pytest.raises(ValueError, match=r"from_torch\(RMSprop\): its step\(\) failed \(RMSprop does not") as raised:
        tx.update({"in.table": grad, "w": torch.ones(2)}, tx.init(params), params)
    assert "are sparse:\n  in.table: layout torch.sparse_coo\npartition them" in str(raised.value)


def test_the_same_as_the_native_transform():
    native = pure_displacements(adam(0.05, weight_decay=0.1), start(), gradients())
    assert_close(
        pure_displacements(from_torch(torch.optim.Adam, lr=0.05, weight_decay=0.1), start(), gradients()), native
    )
