"""Loops that differentiate through `ff.grad`, written as people write them, beside autograd's `create_graph=True`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import funcfreeze as ff

ENGINES = ["routed", "reference"]


class Task:
    """A network with a body and a head, its inner losses and routes, and data to adapt on and to be judged by."""

    routes = {"fit": "*", "small": {"body": -0.2}}  # noqa: RUF012

    def __init__(self):
        self.net = nn.ModuleDict({"body": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
        self.support = torch.randn(6, 3), torch.randn(6, 2)
        self.query = torch.randn(5, 3), torch.randn(5, 2)

    @property
    def params(self):
        return dict(self.net.named_parameters())

    def losses(self, params, batch):
        x, y = batch
        h = torch.tanh(F.linear(x, params["body.weight"], params["body.bias"]))
        out = F.linear(h, params["head.weight"], params["head.bias"])
        return {"fit": (out - y).square().mean(), "small": h.square().mean() + params["head.bias"].sum()}

    def judged(self, params):
        return self.losses(params, self.query)["fit"]

    def by_hand(self, params, batch=None):
        """The inner gradients by autograd, with a graph."""
        losses = self.losses(params, self.support if batch is None else batch)
        fit = torch.autograd.grad(losses["fit"], list(params.values()), create_graph=True)
        grads = dict(zip(params, fit, strict=True))
        for path, small in zip(
            ("body.weight", "body.bias"),
            torch.autograd.grad(losses["small"], [params["body.weight"], params["body.bias"]], create_graph=True),
            strict=True,
        ):
            grads[path] = grads[path] - 0.2 * small
        return grads


def adapted(params, gradients, rates, steps):
    """The inner loop: gradient descent, with a learned rate for every parameter."""
    for _ in range(steps):
        grads = gradients(params)
        params = {
            path: p if grads.get(path) is None else p - rates.get(path, 0.1) * grads[path] for path, p in params.items()
        }
    return params


def assert_equal(found, expected):
    assert len(found) == len(expected) > 0
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_numbers_whose_meta_gradient_is_known(engine):
    """First order would be 1.3656, 0.4097: what was returned before gradients carried a graph."""

    def net(p, x):
        return torch.tanh(x * p["body"]) * p["head"]

    inner = ff.grad(lambda p: {"task": (net(p, 1.0) - 0.3) ** 2}, {"task": "head"}, engine=engine)

    def outer(p):
        return (net({**p, "head": p["head"] - 0.5 * inner(p)["head"]}, -0.4) - 0.7) ** 2

    params = {"body": torch.tensor(0.5), "head": torch.tensor(2.0)}
    leaves = [value.clone().requires_grad_() for value in params.values()]
    found = [
        torch.autograd.grad(outer(dict(zip(params, leaves, strict=True))), leaves),
        ff.grad(lambda p: {"meta": outer(p)}, {"meta": "*"}, engine=engine)(params).values(),
        torch.func.grad(outer)(params).values(),
    ]
    for gradients in found:
        assert_equal(list(gradients), [torch.tensor(0.8667410194534424), torch.tensor(0.3221901006237627)])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_maml_with_learned_rates(engine, steps):
    task = Task()
    inner = ff.grad(task.losses, task.routes, engine=engine)
    rates = {path: torch.rand((), requires_grad=True) for path in task.params}
    at = [*task.params.values(), *rates.values()]
    expected = torch.autograd.grad(task.judged(adapted(task.params, task.by_hand, rates, steps)), at)
    ours = lambda p: inner(p, task.support)  # noqa: E731
    assert_equal(torch.autograd.grad(task.judged(adapted(task.params, ours, rates, steps)), at), expected)
    task.judged(adapted(task.params, ours, rates, steps)).backward()
    assert_equal([tensor.grad for tensor in at], expected)
    meta = ff.grad(
        lambda given: {"meta": task.judged(adapted(given["params"], ours, given["rates"], steps))}, {"meta": "*"}
    )
    detached = {path: p.detach() for path, p in task.params.items()}, {path: r.detach() for path, r in rates.items()}
    grads = meta(dict(zip(("params", "rates"), detached, strict=True)))
    assert_equal([*grads["params"].values(), *grads["rates"].values()], expected)
    assert not any(gradient.requires_grad for gradient in grads["params"].values())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_inner_loop_on_the_head_only(engine):
    """ANIL: the head's inner gradient depends on the body, which the outer loop learns."""
    task = Task()
    inner = ff.grad(lambda p: {"fit": task.losses(p, task.support)["fit"]}, {"fit": "head"}, engine=engine)

    def by_hand(params):
        head = ["head.weight", "head.bias"]
        loss = task.losses(params, task.support)["fit"]
        return dict(zip(head, torch.autograd.grad(loss, [params[p] for p in head], create_graph=True), strict=True))

    outer = [task.judged(adapted(task.params, gradients, {}, 3)) for gradients in (inner, by_hand)]
    assert_equal(*(torch.autograd.grad(loss, list(task.params.values())) for loss in outer))
    assert inner(task.params)["body.weight"] is None


def test_first_order_maml_is_asked_for():
    """By no_grad around the inner gradient, or by detaching it."""
    task = Task()
    inner = ff.grad(task.losses, task.routes)

    def first_order(params):
        with torch.no_grad():
            return inner(params, task.support)

    def cut(params):
        return {path: gradient.detach() for path, gradient in task.by_hand(params).items()}

    outer = [task.judged(adapted(task.params, gradients, {}, 2)) for gradients in (first_order, cut)]
    assert_equal(*(torch.autograd.grad(loss, list(task.params.values())) for loss in outer))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "clipped"])
def test_inner_optimizers_can_be_differentiated_through(optimizer):
    task = Task()
    rate = torch.tensor(0.1, requires_grad=True)
    tx = {
        "sgd": ff.optim.sgd(rate, momentum=0.9),
        "adam": ff.optim.adam(rate),
        "clipped": ff.optim.chain(ff.optim.clip_by_global_norm(0.1), ff.optim.sgd(rate)),
    }[optimizer]

    def unrolled(gradients):
        params, state = task.params, tx.init(task.params)
        for _ in range(2):
            updates, state = tx.update(gradients(params), state, params)
            params = ff.apply_updates(params, updates)
        return torch.autograd.grad(task.judged(params), [*task.params.values(), rate])

    inner = ff.grad(task.losses, task.routes)
    assert_equal(unrolled(lambda p: inner(p, task.support)), unrolled(task.by_hand))


def test_a_module_called_with_adapted_parameters():
    """`functional_call` in the losses, BatchNorm and dropout in the module, one mask for all."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(8, 3)
    params, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def losses(p):
        out = functional_call(net, (p, {path: buffer.clone() for path, buffer in buffers.items()}), (x,))
        return {"fit": out.square().mean()}

    def by_hand(p):
        return dict(zip(p, torch.autograd.grad(losses(p)["fit"], list(p.values()), create_graph=True), strict=True))

    found = []
    for gradients in (ff.grad(losses, {"fit": "*"}), by_hand):
        torch.manual_seed(7)
        outer = losses(adapted(params, gradients, {}, 2))["fit"]
        found.append(torch.autograd.grad(outer, list(params.values())))
    assert_equal(*found)


@pytest.mark.parametrize("where", ["in the losses", "around a step"])
def test_checkpointing(where):
    task = Task()

    def losses(params, batch):
        if where == "in the losses":
            return checkpoint(task.losses, params, batch, use_reentrant=False)
        return task.losses(params, batch)

    inner = ff.grad(losses, task.routes)

    def step(params):
        return adapted(params, lambda p: inner(p, task.support), {}, 1)

    params = task.params
    for _ in range(2):
        params = step(params) if where == "in the losses" else checkpoint(step, params, use_reentrant=False)
    expected = task.judged(adapted(task.params, task.by_hand, {}, 2))
    assert_equal(*(torch.autograd.grad(loss, list(task.params.values())) for loss in (task.judged(params), expected)))


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_a_step_whose_loss_adapts_first(engine):
    """The outer loop is a `Step`, or `ff.backward`."""
    task = Task()
    inner = ff.grad(task.losses, task.routes)

    def losses(model, _):
        params = dict(model.named_parameters())
        return {"meta": task.judged(adapted(params, lambda p: inner(p, task.support), {}, 2))}

    expected = torch.autograd.grad(task.judged(adapted(task.params, task.by_hand, {}, 2)), list(task.params.values()))
    step = ff.Step(task.net, losses, {"meta": "*"}, optimizer=ff.optim.sgd(0.1), engine=engine)
    assert_equal(list(step.gradients(step.init(), None).values()), expected)
    ff.backward(losses(task.net, None), {"meta": "*"}, task.net)
    assert_equal([p.grad for p in task.params.values()], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch.func.jvp itself calls it
@pytest.mark.parametrize("engine", ENGINES)
def test_products_with_the_derivative_of_the_merged_gradient(engine):
    """From the left, reverse over reverse; from the right, forward over reverse. It need not be symmetric."""
    task = Task()
    f = ff.grad(task.losses, task.routes, engine=engine)
    params, vectors = list(task.params.values()), [torch.randn_like(p) for p in task.params.values()]

    def from_left(gradients):
        return torch.autograd.grad(list(gradients.values()), params, vectors)

    assert_equal(from_left(f(task.params, task.support)), from_left(task.by_hand(task.params)))
    direction = dict(zip(task.params, vectors, strict=True))
    _, from_right = torch.func.jvp(
        lambda p: f(p, task.support), ({k: p.detach() for k, p in task.params.items()},), (direction,)
    )
    gradients = list(task.by_hand(task.params).values())
    left = [torch.zeros_like(gradient, requires_grad=True) for gradient in gradients]
    products = torch.autograd.grad(gradients, params, left, create_graph=True)
    assert_equal(list(from_right.values()), torch.autograd.grad(products, left, vectors))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_penalty_on_the_merged_gradient(engine):
    """Its size among the losses of an outer `ff.grad`, beside the losses that it is made of."""
    task = Task()
    inner = ff.grad_and_value(task.losses, task.routes, engine=engine)

    def penalised(params):
        grads, values = inner(params, task.support)
        return {"fit": values["fit"], "flat": sum(gradient.square().sum() for gradient in grads.values()).sqrt()}

    routes = {"fit": "*", "flat": {"body": 0.5, "head.weight": -1.0}}
    grads = ff.grad(penalised, routes)({path: p.detach() for path, p in task.params.items()})
    params = task.params
    flat = sum(gradient.square().sum() for gradient in task.by_hand(params).values()).sqrt()
    slopes = dict(zip(params, torch.autograd.grad(flat, list(params.values())), strict=True))
    fit = torch.autograd.grad(task.losses(params, task.support)["fit"], list(params.values()))
    weights = {"body.weight": 0.5, "body.bias": 0.5, "head.weight": -1.0, "head.bias": 0.0}
    wanted = [g + weights[path] * slopes[path] for path, g in zip(params, fit, strict=True)]
    assert_equal([grads[path] for path in params], wanted)


def test_hyperparameters_of_a_bilevel_problem():
    """A learned weight of a loss and learned data, as arguments: through the steps, and by the implicit function."""
    x, y, target = torch.randn(6, 3), torch.randn(6), torch.randn(3)

    def losses(p, strength, inputs):
        return {"fit": (inputs @ p["w"] - y).square().mean(), "decay": strength.exp() * p["w"].square().sum()}

    strength, inputs = torch.zeros((), requires_grad=True), x.clone().requires_grad_()
    f = ff.grad(losses, {"fit": "*", "decay": "*"})

    def solution(strength, inputs):
        return torch.linalg.solve(inputs.T @ inputs / 6 + strength.exp() * torch.eye(3), inputs.T @ y / 6)

    expected = torch.autograd.grad((solution(strength, inputs) - target).square().sum(), [strength, inputs])

    # implicit: ∂w/∂h = -(∂g/∂w)⁻¹ ∂g/∂h, with products only
    w = solution(strength, inputs).detach().requires_grad_()
    slope = f({"w": w}, strength, inputs)["w"]
    assert slope.abs().max() < 1e-12
    hessian = torch.stack([torch.autograd.grad(s, w, retain_graph=True)[0] for s in slope])
    adjoint = torch.linalg.solve(hessian, -2 * (w - target)).detach()
    assert_equal(torch.autograd.grad(slope, [strength, inputs], adjoint), expected)

    # unrolled: the fixed point of descent is the solution
    params = {"w": torch.zeros(3)}
    for _ in range(400):
        params = {"w": params["w"] - 0.1 * f(params, strength, inputs)["w"]}
    unrolled = torch.autograd.grad((params["w"] - target).square().sum(), [strength, inputs])
    for got, wanted in zip(unrolled, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


class Alive(torch.autograd.Function):
    """The identity; counts the graphs that hold a node of it."""

    count = 0

    class Token:
        def __init__(self):
            Alive.count += 1

        def __del__(self):
            Alive.count -= 1

    @staticmethod
    def forward(ctx, x):
        ctx.token = Alive.Token()
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent


def loop_over_parameters(steps, *, computing, updating):
    """A functional loop over `nn.Parameter`s; after every step the graphs alive, and whether parameters carry one."""
    net = nn.Linear(3, 2)
    tx, params, x = ff.optim.adamw(1e-2), dict(net.named_parameters()), torch.randn(5, 3)

    def losses(p):
        return {"fit": Alive.apply(F.linear(x, p["weight"], p["bias"])).square().mean()}

    f, state, seen = ff.grad_and_value(losses, {"fit": "*"}), tx.init(params), []
    for _ in range(steps):
        with torch.set_grad_enabled(computing):
            grads, _ = f(params)
        with torch.set_grad_enabled(updating):
            updates, state = tx.update(grads, state, params)
            params = ff.apply_updates(params, updates)
        seen.append((Alive.count, any(p.grad_fn is not None for p in params.values())))
    return seen


def test_a_loop_under_no_grad_keeps_no_graph():
    assert loop_over_parameters(100, computing=False, updating=False) == [(0, False)] * 100


def test_a_loop_that_updates_under_no_grad_keeps_none_but_the_first_gradients():
    """The gradients at the `nn.Parameter`s themselves carry a graph, until the next ones take their place."""
    assert loop_over_parameters(100, computing=True, updating=False) == [(1, False), *[(0, False)] * 99]


def test_a_loop_outside_of_no_grad_can_be_differentiated_and_so_keeps_every_step():
    """As the docstring says: one more graph a step."""
    assert loop_over_parameters(20, computing=True, updating=True) == [(step + 1, True) for step in range(20)]
