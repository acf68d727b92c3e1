"""What a forward leaves on its modules: kept through a step, without its graph; as it was before after `gradients`."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.model.attributes import attributes_kept, let_go_of_graphs


class Keeps(nn.Module):
    """Leaves its activations in every place people leave them."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.acts, self.history, self.recent = {}, [], deque(maxlen=4)
        self.ordered, self.default, self.nested = OrderedDict(), defaultdict(list), {"deep": [{}]}
        self.hidden = None
        self.calls, self.names = 0, set()
        self.plain = torch.zeros(3)

    def forward(self, x):
        h = torch.tanh(self.lin(x))
        self.hidden = h
        self.pair = (h, [h.sum()])
        self.acts["h"] = h
        self.history.append(h.mean())
        self.recent.append(h)
        self.ordered["h"] = h
        self.default["h"].append(h)
        self.nested["deep"][0]["h"] = h
        self.calls += 1
        self.names.add(self.calls)
        self.plain.add_(1.0)
        return h


def losses(model, x):
    h = model(x)
    return {"a": h.square().mean(), "b": h.mean()}


def step_of(model, engine="routed"):
    return ff.Step(model, losses, {"a": "*", "b": "lin.bias"}, optimizer=ff.optim.sgd(0.1), engine=engine)


def kept_by(model):
    yield from [model.hidden, model.pair[0], model.pair[1][0], model.acts["h"], model.ordered["h"]]
    yield from [*model.history, *model.recent, *model.default["h"], model.nested["deep"][0]["h"]]


@pytest.mark.parametrize("engine", ["routed", "toggle"])
def test_a_step_leaves_values_without_their_graph(engine):
    model, x = Keeps(), torch.randn(4, 3)
    containers = [model.acts, model.history, model.recent, model.ordered, model.default, model.nested]
    step = step_of(model, engine)
    state, metrics = step(step.init(), x)
    assert all(tensor.grad_fn is None for tensor in kept_by(model))
    torch.testing.assert_close(model.hidden.mean(), metrics["b"])
    now = [model.acts, model.history, model.recent, model.ordered, model.default, model.nested]
    assert all(one is other for one, other in zip(containers, now, strict=True))
    assert model.calls == 1
    state, _ = step(state, x)
    assert len(model.history) == 2
    assert model.names == {1, 2}


def test_nothing_of_the_graph_is_alive_after_a_step():
    alive = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            saved = x.clone()
            ctx.save_for_backward(saved)
            alive.append(weakref.ref(saved))
            return x * 1.0

        @staticmethod
        def backward(ctx, cotangent):
            return cotangent

    class Model(Keeps):
        def forward(self, x):
            return super().forward(Noted.apply(self.lin(x)))

    step = step_of(Model())
    state = step.init()
    for _ in range(3):
        state, _ = step(state, torch.randn(4, 3))
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_an_undetached_hidden_state_is_truncated_backpropagation(engine):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.hidden = nn.GRU(2, 2), None

        def forward(self, x):
            out, self.hidden = self.cell(x, self.hidden)
            return out

    model, xs = Recurrent(), torch.randn(3, 5, 1, 2)
    eager = copy.deepcopy(model)
    losses = lambda m, x: {"a": m(x).square().mean()}  # noqa: E731
    step = ff.Step(model, losses, {"a": "*"}, optimizer=ff.optim.sgd(0.1), engine=engine)
    state = step.init()
    for x in xs:
        eager.hidden = None if eager.hidden is None else eager.hidden.detach()
        found = torch.autograd.grad(eager(x).square().mean(), list(eager.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(eager.parameters(), found, strict=True):
                parameter -= 0.1 * gradient
        state, _ = step(state, x)
    for path, parameter in eager.named_parameters():
        torch.testing.assert_close(state.params[path], parameter.detach(), rtol=1e-12, atol=1e-14)
    assert ff.verify(step, state, xs[0]).ok


@pytest.mark.parametrize("engine", ["routed", "toggle"])
def test_gradients_leave_attributes_as_they_were(engine):
    model, x = Keeps(), torch.randn(4, 3)
    step = step_of(model, engine)
    state, _ = step(step.init(), x)

    def everything():
        names = model.__dict__.keys() - nn.Module().__dict__.keys()
        return {name: copy.deepcopy(model.__dict__[name]) for name in names}

    before = everything()
    containers = {id(model.acts), id(model.history), id(model.nested["deep"][0])}
    step.gradients(state, x)
    step.per_loss_gradients(state, x)
    ff.verify(step, state, x)
    after = everything()
    assert str(before) == str(after)
    assert containers == {id(model.acts), id(model.history), id(model.nested["deep"][0])}


def test_attributes_that_come_and_go_are_as_before():
    model = nn.Linear(2, 2)
    model.gone, model.list = 3, [1, [2, (3, torch.ones(2))]]

    def changing():
        with attributes_kept([*model.modules()]):
            del model.gone
            model.new = 4
            model.list[1][1][1].mul_(5)
            model.list[1].clear()
            model.list = None
            model.training = False
            raise KeyError

    with pytest.raises(KeyError):
        changing()
    assert model.gone == 3
    assert not hasattr(model, "new")
    assert model.training
    assert str(model.list) == str([1, [2, (3, torch.ones(2))]])


def test_what_has_no_graph_is_left_alone():
    model = nn.Linear(2, 2)
    model.plain, model.pair = torch.ones(2), (torch.ones(2), [3])
    plain, pair = model.plain, model.pair
    let_go_of_graphs([model], 0)
    assert model.plain is plain
    assert model.pair is pair


def test_a_large_container_and_one_that_holds_itself_are_left_alone():
    model, graph = nn.Linear(2, 2), torch.ones(2, requires_grad=True) * 2
    model.vocabulary = {str(index): index for index in range(5000)} | {"graph": graph}
    model.loop = [graph]
    model.loop.append(model.loop)
    let_go_of_graphs([model], 0)
    assert model.vocabulary["graph"] is graph
    assert model.loop[0].grad_fn is None
    assert model.loop[1] is model.loop


def test_a_graph_that_was_made_outside_of_the_step_is_not_cut_off():
    model, outer = nn.Linear(3, 3), torch.randn(3, 3, requires_grad=True)
    model.adapted = outer * 2
    step = ff.Step(model, lambda m, x: {"a": (m(x) @ m.adapted).mean()}, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    state = step.init()
    for _ in range(2):
        state, _ = step(state, torch.randn(4, 3))
    assert model.adapted.requires_grad
    model.adapted.sum().backward()
    assert torch.equal(outer.grad, torch.full((3, 3), 2.0))


def test_a_hidden_state_kept_elsewhere_without_detaching_is_an_error():
    model, hidden = nn.ModuleDict({"cell": nn.GRUCell(4, 5), "out": nn.Linear(5, 1)}), [torch.zeros(6, 5)]

    def forgetting(m, x):
        hidden[0] = m["cell"](x, hidden[0])
        return {"a": m["out"](hidden[0]).square().mean()}

    step = ff.Step(model, forgetting, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    state, _ = step(step.init(), torch.randn(6, 4))
    with pytest.raises(RuntimeError, match=r"loss 'a' hangs on the graph of an earlier step, .*keep h.detach\(\)"):
        step(state, torch.randn(6, 4))


def test_leaves_made_of_the_parameters_in_this_forward_are_no_earlier_step():
    model, x = nn.Linear(3, 1), torch.randn(5, 3)

    def first_order(m, x):
        w = m.weight.detach().requires_grad_()
        (g,) = torch.autograd.grad((x @ w.T).square().mean(), w, create_graph=True)
        return {"a": (x @ (w - 0.1 * g).T).square().mean() + m(x).mean()}

    step = ff.Step(model, first_order, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    state = step.init()
    for _ in range(2):
        got = step.gradients(state, x)
        torch.testing.assert_close(got["weight"], x.mean(0, keepdim=True))
        state, _ = step(state, x)
