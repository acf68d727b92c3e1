"""Parameters and buffers that `losses` reaches by another way than the model it is given: named, never silently old."""

from __future__ import annotations

import copy

import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff

ENGINES = ["routed", "reference", "toggle"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.bn = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.bn(self.lin(x))))


ROUTES = {"task": "*", "penalty": "lin.weight"}


def by_list_on_the_module(model):
    model.weights = [model.lin.weight]
    return lambda m, x: {"task": m(x).square().mean(), "penalty": m.weights[0].square().sum()}


def by_closure(model):
    held = [p for name, p in model.named_parameters() if name == "lin.weight"]
    return lambda m, x: {"task": m(x).square().mean(), "penalty": sum(p.square().sum() for p in held)}


def by_param_groups(model):
    optimizer = torch.optim.SGD([model.lin.weight], 0.1)
    return lambda m, x: {
        "task": m(x).square().mean(),
        "penalty": sum(p.square().sum() for group in optimizer.param_groups for p in group["params"]),
    }


def by_bound_method(model):
    layer = copy.copy(model.lin)  # another module around the same parameters
    layer._parameters = dict(model.lin._parameters)
    return lambda m, x: {"task": m(x).square().mean(), "penalty": layer(x).square().mean()}


def by_a_graph_made_before(model):
    flat = torch.cat([p.flatten() for p in model.lin.parameters()])
    return lambda m, x: {"task": m(x).square().mean(), "penalty": flat.square().sum()}


WITH_A_GRADIENT = [by_list_on_the_module, by_closure, by_param_groups, by_bound_method]


@pytest.mark.parametrize("make", WITH_A_GRADIENT)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_parameter_in_the_graph_by_another_way(make, engine):
    model, x = Net(), torch.randn(5, 3)
    losses = make(model)
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adam(0.1), engine=engine)
    state = step.init()
    before = [leaf.clone() for leaf in optree.tree_leaves(state)]
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        step(state, x)
    text = str(caught.value)
    who = "`losses` reads" if engine == "reference" else "loss 'penalty' uses"
    assert f"{who} parameter lin.weight by another way than the model that `losses` is given" in text
    assert "its value is old and no gradient arrives" in text
    assert "model.get_parameter('lin.weight')" in text
    assert "funcfreeze.backward" in text
    assert all(map(torch.equal, before, optree.tree_leaves(state)))
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    for f in (step.gradients, step.per_loss_gradients):
        with pytest.raises(RuntimeError, match=r"parameter lin\.weight by another way"):
            f(state, x)


def test_a_graph_made_before_the_step():
    model, x = Net(), torch.randn(5, 3)
    step = ff.Step(model, by_a_graph_made_before(model), ROUTES, optimizer=ff.optim.sgd(0.1))
    with pytest.raises(RuntimeError, match=r"loss 'penalty' uses parameter lin\.weight by another way"):
        step(step.init(), x)


def test_what_backward_does_with_the_same_losses_is_right():
    model, x = Net(), torch.randn(5, 3)
    losses = by_list_on_the_module(model)
    ff.backward(losses(model, x), ROUTES, model)
    own = model.lin.weight.grad.clone()
    found = losses(model, x)
    want = sum(torch.autograd.grad(loss, model.lin.weight, retain_graph=True)[0] for loss in found.values())
    torch.testing.assert_close(own, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "read",
    [
        lambda p: p.detach().norm(),
        lambda p: p.data.norm(),
        lambda p: torch.tensor(float(p.abs().max())),
        lambda p: nn.utils.parameters_to_vector([p.detach()]).sum(),
    ],
)
def test_a_read_that_carries_no_gradient(read, engine):
    """An adaptive weight, or a metric, of the value that the parameter had when the Step was built."""
    model, x = Net(), torch.randn(5, 3)
    held = model.lin.weight

    def losses(m, x):
        with torch.no_grad():
            size = read(held)
        return {"task": m(x).square().mean() * size}, {"size": size}

    step = ff.Step(model, losses, {"task": "*"}, optimizer=ff.optim.sgd(0.1), engine=engine)
    with pytest.raises(RuntimeError, match=r"`losses` reads parameter lin\.weight by another way"):
        step(step.init(), x)


def test_a_use_that_begins_later_is_found_when_it_has_a_gradient():
    model, x, late = Net(), torch.randn(5, 3), [False]
    held = model.lin.weight
    step = ff.Step(
        model,
        lambda m, x: {"task": m(x).square().mean() + (held.square().sum() if late[0] else 0.0), "other": m(x).mean()},
        {"task": "*", "other": "head"},
        optimizer=ff.optim.sgd(0.1),
    )
    state, _ = step(step.init(), x)
    late[0] = True
    before = [leaf.clone() for leaf in optree.tree_leaves(state)]
    with pytest.raises(RuntimeError, match=r"loss 'task' uses parameter lin\.weight by another way"):
        step(state, x)
    assert all(map(torch.equal, before, optree.tree_leaves(state)))


def test_all_of_them_are_named_at_once():
    model, x = Net(), torch.randn(5, 3)
    held = list(model.parameters())
    step = ff.Step(
        model, lambda m, x: {"a": m(x).mean() + sum(p.sum() for p in held)}, {"a": "*"}, optimizer=ff.optim.sgd(0.1)
    )
    with pytest.raises(RuntimeError) as caught:
        step(step.init(), x)
    assert all(f"loss 'a' uses parameter {path} " in str(caught.value) for path, _ in model.named_parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_made_in_the_first_forward(engine):
    class Born(nn.Module):
        def __init__(self, placeholder):
            super().__init__()
            self.lin = nn.Linear(3, 2)
            if placeholder:
                self.late = nn.Identity()

        def forward(self, x):
            if not isinstance(getattr(self, "late", None), nn.Linear):
                self.late = nn.Linear(2, 1)
            return self.late(self.lin(x))

    for placeholder in (False, True):
        model, x = Born(placeholder), torch.randn(5, 3)
        step = ff.Step(
            model,
            lambda m, x: {"task": m(x).square().mean()},
            {"task": "*"},
            optimizer=ff.optim.sgd(0.1),
            engine=engine,
        )
        with pytest.raises(RuntimeError) as caught:
            step(step.init(), x)
        for path in ("late.weight", "late.bias"):
            assert f"the forward made a parameter, {path}, that was not there" in str(caught.value)
        assert "run one batch through the model first" in str(caught.value)
        again = ff.Step(model, lambda m, x: {"task": m(x).square().mean()}, {"task": "*"}, optimizer=ff.optim.sgd(0.1))
        state, _ = again(again.init(), x)
        assert "late.weight" in state.params


def test_a_module_without_parameters_may_be_made_in_the_forward():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 2)

        def forward(self, x):
            self.act = nn.Tanh()
            return self.act(self.lin(x))

    step = ff.Step(Lazy(), lambda m, x: {"a": m(x).mean()}, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    state, _ = step(step.init(), torch.randn(5, 3))
    step(state, torch.randn(5, 3))


def test_a_buffer_that_changes_by_another_way():
    for write in (False, True):
        model, x = Net(), torch.randn(5, 3)
        held = model.bn.running_mean

        def losses(m, x, held=held, write=write):
            if write:
                held.mul_(0.9)
            return {"task": m(x).square().mean() + held.sum()}

        step = ff.Step(model, losses, {"task": "*"}, optimizer=ff.optim.sgd(0.1))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"uses buffer bn\.running_mean by another way.*get_buffer"):
            step(step.init(), x)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- what looks alike and is right ----------------------------------------------------------------------------------


def test_the_module_itself_may_be_reached_in_any_way():
    model, x = Net(), torch.randn(5, 3)

    class Trainer:
        def __init__(self):
            self.net = model
            self.layers = [model.lin]

        def losses(self, _, x):
            return {"task": self.net(x).square().mean(), "penalty": self.layers[0].weight.square().sum()}

    def plainly(m, x):
        return {"task": m(x).square().mean(), "penalty": m.lin.weight.square().sum()}

    found = []
    for losses in (Trainer().losses, plainly):
        step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1))
        state = step.init()
        for _ in range(2):
            state, _ = step(state, x)
        found.append(state.params)
    assert all(torch.equal(found[0][path], found[1][path]) for path in found[0])


def test_parameters_no_loss_may_update_and_constant_buffers_may_be_read_in_any_way():
    class Masked(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(3))
            self.alias = self.mask

        def forward(self, x):
            return self.head(self.lin(x) * self.alias)

    model, x = Masked(), torch.randn(5, 3)
    frozen = model.head.weight
    step = ff.Step(
        model,
        lambda m, x: {"task": m(x).square().mean() + (m.lin(x) @ frozen.T).square().mean()},
        {"task": "lin"},
        optimizer=ff.optim.sgd(0.1),
    )
    got = step.gradients(step.init(), x)
    loss = model(x).square().mean() + (model.lin(x) @ model.head.weight.T).square().mean()
    want = torch.autograd.grad(loss, list(model.lin.parameters()))
    torch.testing.assert_close([got["lin.weight"], got["lin.bias"]], list(want), rtol=1e-12, atol=1e-12)
    other = step.init().replace(params={**step.init().params, "head.weight": torch.randn(1, 3)})
    with pytest.raises(RuntimeError, match=r"loss 'task' uses parameter head\.weight by another way"):
        step(other, x)


@pytest.mark.parametrize("engine", ENGINES)
def test_teachers_anchors_and_inputs_that_require_grad_are_no_parameters(engine):
    model, x = Net().eval(), torch.randn(5, 3)
    teacher = copy.deepcopy(model)
    anchor = [p.detach().clone() for p in model.parameters()]

    def losses(m, x):
        near = sum((p - a).square().sum() for p, a in zip(m.parameters(), anchor, strict=True))
        return {"task": (m(x) - teacher(x)).square().mean() + near + m(x).mean()}

    step = ff.Step(model, losses, {"task": "*"}, optimizer=ff.optim.sgd(0.1), engine=engine)
    state = step.init()
    for _ in range(2):
        state, _ = step(state, x)
    assert all(p.grad is None for p in teacher.parameters())


def test_adopted_storage_is_the_state_itself():
    model, x = Net(), torch.randn(5, 3)
    held = model.lin.weight
    step = ff.Step(
        model, lambda m, x: {"a": m(x).mean() * float(held.detach().norm())}, {"a": "*"}, optimizer=ff.optim.sgd(0.1)
    )
    step(step.init(copy=False), x)  # the value is the state's, and no gradient is asked for
    in_graph = ff.Step(model, lambda m, x: {"a": m(x).mean() * held.norm()}, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    with pytest.raises(RuntimeError, match=r"loss 'a' uses parameter lin\.weight by another way"):
        in_graph(in_graph.init(copy=False), x)
