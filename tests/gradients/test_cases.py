"""Computations that broke simpler forms of the routed engine, and all that torch can put into a graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

import funcfreeze as ff
from laws import assert_law, assert_step_law


def params(**shapes):
    return {name: torch.randn(shape) * 0.5 for name, shape in shapes.items()}


def two_level(layer):
    """Two losses that meet at `layer`'s output, over a trunk that both may update, with a skip past the layer.

    The first loss's region ends at two nodes, one of which can be reached from the other through `layer`.
    """

    def losses(p):
        x = torch.linspace(-1, 1, 12).reshape(3, 4)
        trunk = torch.tanh(x @ p["trunk"])
        middle = layer(torch.tanh(trunk @ p["middle"]))
        head = torch.tanh(middle @ p["head"]) * trunk
        return {"a": (head @ p["head"]).square().sum(), "b": (middle * trunk).sin().sum()}

    shapes = dict.fromkeys(("trunk", "middle", "head"), (4, 4))
    return losses, params(**shapes), {"a": dict.fromkeys(shapes, 1.0), "b": {"trunk": -0.3, "middle": -0.3}}


class Normalising(torch.autograd.Function):
    """NaN if it is run on zeros."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * (cotangent.norm() / cotangent.norm())


class InfTimes(torch.autograd.Function):
    """0 · inf if it is run on zeros."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, cotangent):
        return torch.where(cotangent == 0, cotangent * float("inf"), cotangent)


class Unmaterialised(torch.autograd.Function):
    """Raises if it is run on None."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x * 1.0

    @staticmethod
    def backward(ctx, cotangent):
        return 2.0 * cotangent


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2.0, x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, first, second):
        return first * 2.0 + second


class NoneForFirst(torch.autograd.Function):
    """Delivers no gradient for its first input: untouched, not zero."""

    @staticmethod
    def forward(x, y):
        return x + y

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return None, cotangent


def negative(g):
    return -0.5 * g


def clamp(g):
    return g.clamp(-0.05, 0.05)


@pytest.mark.parametrize("function", [Normalising, InfTimes, Unmaterialised])
def test_functions_between_two_exits_of_one_call(function):
    assert_law("routed", *two_level(function.apply))


@pytest.mark.parametrize("on_losses", [False, True])
@pytest.mark.parametrize("functions", [1, 2, 3])
def test_losses_that_meet_at_functions(functions, on_losses):
    """The later call starts at a Function's node, which before torch 2.13 the nodes above it alone keep alive."""

    def layer(h):
        for _ in range(functions):
            h = Unmaterialised.apply(h)
        return h

    def losses(p):
        h = layer(torch.tanh(torch.linspace(-1, 1, 12).reshape(3, 4) @ p["trunk"]))
        both = {"a": (h @ p["a"]).square().sum(), "b": (h @ p["b"]).sin().sum()}
        return {name: layer(loss) for name, loss in both.items()} if on_losses else both

    table = {"a": {"trunk": 0.5, "a": 1.0}, "b": {"trunk": -0.3, "b": 1.0}}
    assert_law("routed", losses, params(trunk=(4, 4), a=(4, 4), b=(4, 4)), table)


@pytest.mark.parametrize("hook", [negative, clamp])
@pytest.mark.parametrize("engine", ["routed", "toggle"])
def test_hooks_at_a_cut(engine, hook):
    def layer(h):
        h.register_hook(hook)
        return h

    assert_law(engine, *two_level(layer))


def test_a_hook_below_a_stop():
    def losses(p):
        h = torch.tanh(p["trunk"] * 2.0)
        h.register_hook(lambda g: g * 2.0)  # a TypeError if it is run on None
        top = torch.tanh(h @ p["middle"])
        return {"a": (top * h @ p["head"]).sum(), "b": (top @ h).sum()}

    table = {"a": {"trunk": 1.0, "middle": 1.0, "head": 1.0}, "b": {"trunk": 1.0, "middle": 1.0}}
    assert_law("routed", losses, params(trunk=(4, 4), middle=(4, 4), head=(4, 4)), table)


def test_hooks_run_once_for_every_loss():
    calls = []

    def layer(h):
        h.register_hook(lambda g: calls.append(float(g.sum())))
        return h

    losses, p, table = two_level(layer)
    ff.grad(losses, table)(p)
    routed = sorted(calls)
    calls.clear()
    ff.grad(losses, table, engine="toggle")(p)
    assert len(calls) == 2
    assert routed == pytest.approx(sorted(calls))


def test_hooks_on_nodes_are_unknown_and_keep_everything_apart():
    def layer(h):
        h.grad_fn.register_prehook(lambda gs: (gs[0].clamp(-0.05, 0.05),))
        return h

    assert_law("routed", *two_level(layer))


def test_the_reference_refuses_hooks_it_would_not_run():
    losses, p, table = two_level(lambda h: h.register_hook(negative) and h)
    with pytest.raises(RuntimeError, match="does not run hooks on activations; use engine='routed'"):
        ff.grad(losses, table, engine="reference")(p)


def test_registering_hooks_is_as_before_after_a_step():
    register, make = torch.Tensor.register_hook, RemovableHandle.__init__
    losses, p, table = two_level(lambda h: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ff.grad(losses, table)(p)
    assert torch.Tensor.register_hook is register
    assert RemovableHandle.__init__ is make


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_a_function_that_delivers_none_leaves_its_input_untouched(engine):
    def losses(p):
        return {"a": NoneForFirst.apply(p["x"], p["y"]).sum()}

    p = params(x=(3,), y=(3,))
    table = {"a": {"x": 1.0, "y": 1.0}}
    assert_law(engine, losses, p, table)
    assert ff.grad(losses, table, engine=engine)(p)["x"] is None


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_a_loss_that_is_a_parameter(engine):
    def losses(p):
        return {"a": p["x"], "b": p["x"] * p["y"], "c": p["y"]}

    table = {"a": {"x": 2.0}, "b": {"x": 1.0, "y": -1.0}, "c": {"x": 1.0, "y": 0.5}}
    assert_law(engine, losses, params(x=(), y=()), table)


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_losses_from_one_node_and_from_each_other(engine):
    def losses(p):
        many = (p["w"] @ p["v"]).tanh().unbind()
        return {"a": many[0], "b": many[1], "c": many[0] * many[1], "d": many[2], "e": many[1]}

    table = {
        "a": {"w": 1.0, "v": 1.0},
        "b": {"w": 1.0},
        "c": {"w": -0.5, "v": 2.0},
        "d": {"w": 1.0, "v": 1.0},
        "e": {"v": 1.0},
    }
    assert_law(engine, losses, params(w=(3, 4), v=(4,)), table)


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_an_infinite_derivative_stays_with_its_loss(engine):
    def losses(p):
        return {"a": torch.sqrt(p["x"] * 0.0).sum() * p["y"].sum(), "b": p["x"].sum() + p["y"].sum()}

    p = params(x=(3,), y=(3,))
    assert_law(engine, losses, p, {"a": {"y": 1.0}, "b": {"x": 1.0, "y": 1.0}})
    assert ff.grad(losses, {"a": "y", "b": "*"}, engine=engine)(p)["x"].isfinite().all()


def test_gradient_penalty():
    """WGAN-GP: a gradient inside the loss, differentiated again."""

    def losses(p):
        x = torch.linspace(-1, 1, 8).reshape(2, 4).requires_grad_()
        score = torch.tanh(x @ p["critic"]) @ p["out"]
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return {"critic": score.mean() + ((slope.norm(dim=1) - 1) ** 2).mean(), "adv": -score.mean()}

    table = {"critic": {"critic": 1.0, "out": 1.0}, "adv": {"critic": 0.1}}
    assert_law("routed", losses, params(critic=(4, 4), out=(4, 1)), table)


def test_transforms_inside_the_loss():
    def losses(p):
        def f(x):
            return torch.tanh(p["w"] @ x)

        x = torch.linspace(-1, 1, 3)
        jacobian = torch.func.jacrev(f)(x)
        _, tangent = torch.func.jvp(f, (x,), (torch.ones(3),))
        every = torch.func.vmap(f)(torch.eye(3))
        return {"a": jacobian.square().sum() + tangent.sum(), "b": every.square().sum()}

    assert_law("routed", losses, params(w=(3, 3), unused=(2,)), {"a": {"w": 1.0}, "b": {"w": 0.5, "unused": 1.0}})


def test_saved_tensor_hooks():
    def losses(p):
        with torch.autograd.graph.save_on_cpu():
            h = torch.tanh(p["w"] @ p["v"])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
            h = h * h
        return {"a": h.sum(), "b": (h * p["v"]).sum()}

    assert_law("routed", losses, params(w=(3, 3), v=(3,)), {"a": {"w": 1.0}, "b": {"w": 1.0, "v": 1.0}})


def test_functions_of_many_kinds():
    def losses(p):
        first, second = TwoOutputs.apply(p["w"] @ p["v"])
        return {"a": first.sum() + second.prod(), "b": (second * p["v"]).sum()}

    assert_law("routed", losses, params(w=(3, 3), v=(3,)), {"a": {"w": 1.0, "v": 1.0}, "b": {"w": 2.0}})


@torch.library.custom_op("funcfreeze_tests::twice_sine", mutates_args=())
def twice_sine(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.sin()


@twice_sine.register_fake
def _(x):
    return torch.empty_like(x)


twice_sine.register_autograd(
    lambda ctx, g: 2 * g * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_custom_operators():
    assert_law("routed", *two_level(twice_sine))


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_complex_parameters(engine):
    def losses(p):
        h = p["c"] * torch.complex(p["re"], p["re"].sin())
        return {"a": h.abs().square().sum(), "b": h.real.sum()}

    p = {"c": torch.randn(3, dtype=torch.complex128), "re": torch.randn(3)}
    assert_law(engine, losses, p, {"a": {"c": 1.0}, "b": {"c": -0.5, "re": 1.0}})


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_views_and_writes_into_them(engine):
    def losses(p):
        h = p["w"].clone()
        h[0] = p["v"]
        h[:, 1].mul_(2.0)
        left, right = h.split([1, 2], dim=1)
        _, s, _ = torch.linalg.svd(h + 3 * torch.eye(3))
        return {"a": (left.sum() * right).sum(), "b": s.sum(), "c": torch.cat([h, h]).square().sum()}

    table = {"a": {"w": 1.0, "v": 1.0}, "b": {"w": 1.0}, "c": {"v": 0.5, "w": 0.5}}
    assert_law(engine, losses, params(w=(3, 3), v=(3,)), table)


def test_a_very_deep_graph():
    def losses(p):
        h = p["w"]
        for _ in range(20_000):
            h = h * 1.0001
        return {"a": h.sum(), "b": h.sin().sum()}

    assert_law("routed", losses, params(w=(2,), v=(2,)), {"a": {"w": 1.0}, "b": {"w": 1.0, "v": 1.0}}, tolerance=1e-9)


def test_sparse_and_dense_gradients_on_one_weight():
    def losses(p):
        tokens = torch.tensor([0, 2, 2])
        return {
            "sparse": F.embedding(tokens, p["table"], sparse=True).sum(),
            "dense": p["table"].square().sum(),
            "more": F.embedding(tokens, p["table"], sparse=True).square().sum(),
        }

    p = params(table=(4, 3))
    whole = {"table": 1.0}
    assert_law("routed", losses, p, {"sparse": whole, "dense": whole, "more": {"table": 0.5}})
    only_sparse = ff.grad(
        lambda q: {name: loss for name, loss in losses(q).items() if name != "dense"}, {"sparse": "*", "more": "*"}
    )(p)
    assert only_sparse["table"].is_sparse


def test_jagged_nested_tensors():
    def losses(p):
        rows = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
        h = torch.tanh(rows @ p["w"])
        return {"a": h.values().sum(), "b": (h * h).values().sum()}

    assert_law("routed", losses, params(w=(3, 3)), {"a": {"w": 1.0}, "b": {"w": -0.1}})


def test_autocast_is_near():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).float()
    x = torch.randn(16, 8).float()

    def losses(m, batch):
        with torch.autocast("cpu", torch.bfloat16):
            h = m[0](batch)
            return {"a": m[2](m[1](h)).float().square().mean(), "b": h.float().square().mean()}

    assert_step_law(model, losses, {"a": "*", "b": "0"}, x, tolerance=2e-2)


def test_a_compiled_trunk():
    model = nn.ModuleDict({"trunk": nn.Linear(4, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
    compiled = torch.compile(lambda trunk, x: torch.tanh(trunk(x)), backend="aot_eager")

    def losses(m, batch):
        h = compiled(m["trunk"], batch)
        return {"a": m["a"](h).sum(), "b": (m["b"](h) * h).sum()}

    assert_step_law(model, losses, {"a": ["trunk", "a"], "b": ["trunk", "b"]}, torch.randn(3, 4))


def test_reentrant_checkpointing_is_refused():
    def losses(p):
        h = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(x @ p["w"]), p["w"] * 1.0, use_reentrant=True)
        return {"a": h.sum()}

    with pytest.raises(RuntimeError, match=r"reentrant activation checkpointing.*use_reentrant=False"):
        ff.grad(losses, {"a": "*"})(params(w=(3, 3)))


def test_checkpointing_recomputes_once_for_every_call_that_visits_it():
    forwards = []

    def block(h, w):
        forwards.append(1)
        return torch.tanh(h @ w)

    def losses(p):
        h = torch.utils.checkpoint.checkpoint(block, torch.eye(3), p["first"], use_reentrant=False)
        h = torch.utils.checkpoint.checkpoint(block, h, p["second"], use_reentrant=False)
        return {"a": (h @ p["head"]).sum(), "b": h.square().sum()}

    p = params(first=(3, 3), second=(3, 3), head=(3, 3))
    table = {"a": dict.fromkeys(p, 1.0), "b": {"first": 1.0, "second": 1.0}}
    assert_law("routed", losses, p, table)
    forwards.clear()
    ff.grad(losses, table)(p)
    assert len(forwards) == 4  # two blocks, each once forward and once again for the shared walk


@pytest.mark.filterwarnings("ignore:.*nested.*:UserWarning")
def test_strided_nested_tensors_are_pointed_to_jagged_ones():
    def losses(p):
        rows = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
        h = torch.tanh(F.linear(rows, p["w"]))
        return {"a": torch.nested.to_padded_tensor(h, 0.0).sum()}

    with pytest.raises(NotImplementedError, match="strided nested tensors .* make them with layout=torch.jagged"):
        ff.grad(losses, {"a": "*"})(params(w=(3, 3)))
