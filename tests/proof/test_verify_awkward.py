"""`verify` runs wherever the step runs, and never says ok to what it did not follow."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import funcfreeze as ff


def verified(step, *batches, steps=5):
    """A report after a few steps, so that models are met as training leaves them."""
    state = step.init()
    for batch in batches:
        state, _ = step(state, batch)
    return ff.verify(step, state, batches[-1], steps=steps)


@pytest.mark.parametrize("engine", ["routed", "toggle"])
@pytest.mark.parametrize("routes", [{"a": "*", "b": ["b", "block.2"]}, {"a": "a", "b": "block.0"}])
def test_a_checkpointed_block_that_a_loss_may_update_in_part(engine, routes):
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.ModuleDict({"block": block, "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})

    def losses(m, x):
        h = checkpoint(m["block"], x, use_reentrant=False)
        return {"a": m["a"](h).square().mean(), "b": m["b"](h).mean()}

    x = torch.randn(3, 4)
    step = ff.Step(model, losses, routes, optimizer=ff.optim.sgd(0.1), engine=engine)
    eager = copy.deepcopy(step.module)
    named, found = dict(eager.named_parameters()), losses(eager, x)
    want: dict = {}
    for row in step.plan.rows:
        for loss in row.weights:
            (g,) = torch.autograd.grad(found[loss], [named[row.path]], retain_graph=True, allow_unused=True)
            if g is not None:
                want[row.path] = want.get(row.path, 0) + g
    got = step.gradients(step.init(), x)
    assert got.keys() == want.keys()
    for path, gradient in want.items():
        torch.testing.assert_close(got[path], gradient, rtol=1e-10, atol=1e-12)
    assert verified(step, x, x).ok


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(3, 3)

    def forward(self, x):
        p = self.router(x).softmax(-1)
        self.l_aux = p.mean(0).square().sum()
        return x * p


@pytest.mark.filterwarnings("ignore:.*(spectral|weight)_norm.*:FutureWarning")  # the old ones are what is meant
@pytest.mark.parametrize(
    "make",
    [Experts, lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), lambda: nn.utils.weight_norm(nn.Linear(3, 3))],
)
def test_models_that_keep_a_tensor_of_their_graph(make):
    model = {"layer": make(), "head": nn.Linear(3, 1)}

    def losses(m, x):
        h = m["layer"](x)
        aux = m["layer"].l_aux if isinstance(m["layer"], Experts) else m["layer"].weight.square().sum()
        return {"a": m["head"](h).square().mean(), "aux": aux}

    step = ff.Step(model, losses, {"a": "*", "aux": {"layer": 0.1}}, optimizer=ff.optim.sgd(0.1))
    report = verified(step, torch.randn(2, 3), torch.randn(2, 3))
    assert report.ok, report


def test_an_eager_forward_of_the_users_may_have_left_its_graph():
    model = Experts()
    model(torch.randn(2, 3))
    assert model.l_aux.requires_grad
    step = ff.Step(model, lambda m, x: {"a": m(x).mean()}, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    assert ff.verify(step, step.init(), torch.randn(2, 3)).ok
    assert model.l_aux.requires_grad


class Recurrent(nn.Module):
    def __init__(self, detach):
        super().__init__()
        self.cell, self.a, self.b = nn.GRU(2, 2), nn.Linear(2, 1), nn.Linear(2, 1)
        self.hidden, self.detach, self.forwards = None, detach, 0

    def forward(self, x):
        out, hidden = self.cell(x, self.hidden)
        self.hidden = hidden.detach() if self.detach else hidden
        self.forwards += 1
        return out * (1.0 + 0.1 * self.forwards)


@pytest.mark.parametrize("detach", [True, False])
def test_both_sides_see_the_same_number_of_forwards(detach):
    model, xs = Recurrent(detach), torch.randn(3, 5, 3, 2)

    def losses(m, x):
        h = m(x)
        return {"a": m.a(h).square().mean(), "b": m.b(h).square().mean()}

    step = ff.Step(model, losses, {"a": ["cell", "a"], "b": "b"}, optimizer=ff.optim.sgd(0.1))
    report = verified(step, *xs)
    assert report.ok, report
    assert model.forwards == len(xs)


def test_generators_and_locks_on_the_model():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.generator, self.lock = nn.Linear(3, 2), torch.Generator().manual_seed(3), threading.Lock()

        def forward(self, x):
            with self.lock:
                return self.lin(x + torch.randn(x.shape, generator=self.generator))

    step = ff.Step(Noisy(), lambda m, x: {"a": m(x).square().mean()}, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    state = step.init()
    before = step.module.generator.get_state()
    report = ff.verify(step, state, torch.randn(4, 3))
    assert report.ok, report
    assert torch.equal(before, step.module.generator.get_state())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.bn, self.head = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.bn(self.lin(x))))


def test_a_parameter_by_another_way_is_the_steps_own_error():
    net = Net()
    held = [net.lin.weight]
    step = ff.Step(
        net,
        lambda m, x: {"a": m(x).mean(), "b": sum(p.square().sum() for p in held)},
        {"a": "*", "b": "lin"},
        optimizer=ff.optim.sgd(0.1),
    )
    with pytest.raises(RuntimeError, match=r"loss 'b' uses parameter lin\.weight by another way"):
        ff.verify(step, step.init(), torch.randn(4, 3))


@pytest.mark.parametrize(
    "read",
    [
        lambda net: net.lin.weight.square().sum(),
        lambda net: net.lin.weight.detach().norm(),
        lambda net: net.bn.running_var.sum(),
    ],
)
def test_the_module_in_a_closure_is_right_in_the_step_and_not_followed_by_verify(read):
    net, x = Net(), torch.randn(4, 3)
    step = ff.Step(
        net,
        lambda m, x: {"a": m(x).square().mean(), "b": m.lin(x).square().mean() * read(net)},
        {"a": "*", "b": "lin"},
        optimizer=ff.optim.sgd(0.1),
    )
    state, _ = step(step.init(), x)
    report = ff.verify(step, state, x)
    assert not report.ok
    assert "is used in a forward on a copy of it; does `losses` use the model it is given?" in str(report)


def test_a_hook_that_holds_the_model_itself_is_named_as_the_cause():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.acts = nn.Linear(3, 2), {}
            self.lin.register_forward_hook(lambda module, args, out: self.acts.update(h=out))

        def forward(self, x):
            return self.lin(x)

    def losses(m, x):
        y = m(x)
        return {"a": y.square().mean(), "b": m.acts["h"].abs().mean()}

    step = ff.Step(Hooked(), losses, {"a": "*", "b": "*"}, optimizer=ff.optim.sgd(0.1))
    state, _ = step(step.init(), torch.randn(4, 3))
    with pytest.raises(RuntimeError, match=r"though the step runs: .*\n?Does a hook, a closure or an attribute hold"):
        ff.verify(step, state, torch.randn(4, 3))
