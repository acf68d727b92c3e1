"""Errors of torch that are typically met keep their text and type, and get one line: which losses, why, what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.gradients.explained import MARK

ENGINES = ["routed", "toggle", "reference"]
PLAIN = ["routed", "toggle"]
ROUTES = {"cls": ["encoder", "head"], "adv": {"encoder": -0.5}}

SECOND = "Trying to backward through the graph a second time"
IN_PLACE = "one of the variables needed for gradient computation has been modified by an inplace operation"


def model():
    return nn.ModuleDict({"encoder": nn.Linear(3, 3), "head": nn.Linear(3, 1), "still": nn.Linear(3, 3)})


def losses(m, x):
    h = torch.tanh(m["encoder"](x))
    return {"cls": m["head"](torch.sin(m["still"](h))).square().mean(), "adv": h.square().mean()}


def explained(error, text, *lines):
    """torch's text first, then exactly one line of ours that says all of this."""
    assert error.type is RuntimeError
    before, mark, ours = str(error.value).partition(MARK)
    assert text in before
    assert mark
    assert "\n" not in ours
    for line in lines:
        assert line in ours
    assert text in str(error.value.__cause__)
    assert MARK not in str(error.value.__cause__)


def step(f, engine="routed", **options):
    return ff.Step(model(), f, ROUTES, optimizer=ff.optim.sgd(0.1), engine=engine, **options)


def fails(made, call=None):
    """The error, after which the state is as it was and the step goes on."""
    state = made.init()
    before = {path: p.clone() for path, p in state.params.items()}
    with pytest.raises(RuntimeError) as caught:
        (call or made)(state, torch.randn(4, 3))
    assert all(torch.equal(state.params[path], p) for path, p in before.items())
    return caught


# --- ff.backward, in loops of one's own ------------------------------------------------------------------------------


def test_a_hidden_state_that_was_not_detached():
    m, hidden = model(), torch.zeros(4, 3)
    for turn in range(2):
        hidden = torch.tanh(m["encoder"](torch.randn(4, 3)) + hidden)
        found = {"cls": m["head"](hidden).square().mean(), "adv": m["encoder"](torch.randn(4, 3)).mean()}
        if turn:
            with pytest.raises(RuntimeError) as caught:
                ff.backward(found, ROUTES, m)
            explained(caught, SECOND, "walking the loss", "'cls'", "a hidden state", "h = h.detach()")
            return
        ff.backward(found, ROUTES, m)
    raise AssertionError("it was to fail")


def test_a_hidden_state_that_was_not_detached_across_an_optimizer_step():
    m, hidden = model(), torch.zeros(4, 3)
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    hidden = torch.tanh(m["encoder"](m["still"](torch.randn(4, 3))))
    ff.backward({"cls": m["head"](m["encoder"](torch.randn(4, 3))).mean(), "adv": None}, ROUTES, m)
    optimizer.step()
    found = {"cls": m["head"](m["encoder"](hidden)).mean(), "adv": m["still"](torch.randn(4, 3)).mean()}
    with pytest.raises(RuntimeError) as caught:
        ff.backward(found, {"cls": "*", "adv": "still"}, m)
    explained(caught, IN_PLACE, "'cls'", "an optimizer step came between", "keep h.detach()")


def test_two_backwards_of_one_graph():
    m = model()
    found = losses(m, torch.randn(4, 3))
    ff.backward({"cls": found["cls"], "adv": None}, ROUTES, m)
    before = {path: p.grad.clone() for path, p in m.named_parameters() if p.grad is not None}
    with pytest.raises(RuntimeError) as caught:
        ff.backward({"cls": None, "adv": found["adv"]}, ROUTES, m)
    explained(caught, SECOND, "walking the loss 'adv'", "another backward", "retain_graph=True")
    assert all(torch.equal(m.get_parameter(path).grad, gradient) for path, gradient in before.items())


def test_a_second_backward_after_an_optimizer_step():
    m = model()
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    found = losses(m, torch.randn(4, 3))
    found["cls"].backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError) as caught:
        ff.backward(found, ROUTES, m)
    explained(caught, IN_PLACE, "walking the loss", "'cls'", "do all backwards before optimizer.step()")


def test_only_the_losses_that_were_being_walked_are_named():
    m = model()
    walked = torch.tanh(m["encoder"](torch.randn(4, 3)))
    walked.sum().backward()
    fresh = m["head"](torch.randn(4, 3)).mean()
    routes = {"one": "head", "two": "encoder", "three": {"encoder": 0.5}}
    for hooked in (False, True):  # with a hook on the activation nothing is merged above it
        if hooked:
            walked.register_hook(lambda g: g)
        found = {"one": fresh, "two": walked.sin().sum(), "three": None}
        with pytest.raises(RuntimeError) as caught:
            ff.backward(found, routes, m)
        explained(caught, SECOND, "'two'")
        assert "'three'" not in str(caught.value)


# --- inside a Step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_inside_losses_that_frees_what_the_losses_need(engine):
    def frees(m, x):
        h = torch.tanh(m["encoder"](x))
        energy = h.square().sum()
        (slope,) = torch.autograd.grad(energy, h)
        return {"cls": (m["head"](h) * slope).mean(), "adv": energy}

    made = step(frees, engine)
    for call in (None, made.gradients, made.per_loss_gradients):
        explained(fails(made, call), SECOND, "walking the loss", "'adv'", "torch.autograd.grad", "create_graph=True")


@pytest.mark.parametrize("engine", PLAIN)
def test_an_activation_written_to(engine):
    def writes(m, x):
        h = torch.sigmoid(m["encoder"](x))
        found = {"cls": m["head"](h).square().mean(), "adv": h.square().mean()}
        h.add_(1.0)
        return found

    made = step(writes, engine)
    for call in (None, made.gradients, made.per_loss_gradients):
        explained(fails(made, call), IN_PLACE, "walking the loss", "write to no parameter or activation in place")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_second_walk_inside_losses(engine):
    def twice(m, x):
        w = torch.ones(3, requires_grad=True)
        energy = w.square().sum()
        for _ in range(2):
            torch.autograd.grad(energy, w)
        return losses(m, x)

    explained(
        fails(step(twice, engine)), SECOND, "inside `losses`, which computes the losses 'cls', 'adv': part of the"
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["detached", "requires_grad=False", "no_grad"])
def test_a_gradient_at_something_frozen(engine, where):
    def penalised(m, x):
        if where == "no_grad":
            with torch.no_grad():
                energy = m["encoder"](x).sum()
        elif where == "detached":
            energy = m["encoder"](x).detach().sum()
        else:
            energy = (torch.ones(3) * 2).sum()
        (slope,) = torch.autograd.grad(energy, m["encoder"].weight, create_graph=True)
        return losses(m, x) | {"adv": slope.square().sum()}

    explained(
        fails(step(penalised, engine)),
        "does not require grad",
        "inside `losses`, which computes the losses 'cls', 'adv': it differentiates at something that is frozen here",
        "Route the parameter",
    )


def test_a_single_loss():
    made = ff.Step(
        model(),
        lambda m, x: {"cls": torch.autograd.grad(torch.ones(()), m["head"].weight)},
        {"cls": "*"},
        optimizer=ff.optim.sgd(0.1),
    )
    explained(fails(made), "does not require grad", "inside `losses`, which computes the loss 'cls': it differ")


def test_functions_of_parameters_too():
    def f(params):
        energy = params["w"].square().sum()
        torch.autograd.grad(energy, params["w"])
        return {"a": energy, "b": params["v"].sum()}

    params = {"w": torch.randn(3), "v": torch.randn(3)}
    with pytest.raises(RuntimeError) as caught:
        ff.grad(f, {"a": "*", "b": "v"})(params)
    explained(caught, SECOND, "'a'")


def test_a_compiled_step():
    def frozen(m, x):
        (slope,) = torch.autograd.grad(torch.ones(()), m["head"].weight)
        return losses(m, x) | {"adv": slope.sum()}

    made = step(frozen, compile={"backend": "aot_eager"})
    explained(fails(made), "does not require grad", "inside `losses`, which computes the losses 'cls', 'adv'")


def test_verify():
    def frees(m, x):
        energy = torch.tanh(m["encoder"](x)).square().sum()
        torch.autograd.grad(energy, m["encoder"].weight)
        return losses(m, x) | {"adv": energy}

    explained(fails(step(frees), lambda state, x: ff.verify(step(frees), step(frees).init(), x)), SECOND, "'adv'")


# --- what torch.func cannot follow -----------------------------------------------------------------------------------


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * 2


def differentiates_at_a_copy(m, x):
    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(m["head"](m["encoder"](at)).sum(), at, create_graph=True)
    return losses(m, x) | {"adv": slope.square().sum()}


def runs_backward(m, x):
    w = torch.ones(3, requires_grad=True)
    w.square().sum().backward()
    return losses(m, x)


def keeps_a_gradient(m, x):
    h = m["encoder"](x)
    h.retain_grad()
    return {"cls": m["head"](h).mean(), "adv": h.mean()}


def writes_data(m, x):
    h = m["encoder"](x)
    h.data = h.data * 2
    return {"cls": m["head"](h).mean(), "adv": h.mean()}


def checkpoints(m, x):
    h = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(m["encoder"](x)), x, use_reentrant=False)
    return {"cls": m["head"](h).mean(), "adv": h.mean()}


def uses_an_old_function(m, x):
    h = OldStyle.apply(m["encoder"](x))
    return {"cls": m["head"](h).mean(), "adv": h.mean()}


def goes_through_numpy(m, x):
    h = m["encoder"](x)
    return {"cls": m["head"](h).mean(), "adv": h.mean() * float(h.detach().numpy().sum())}


def writes_to_what_it_captured(m, x):
    seen = torch.zeros(4, 3)
    torch.func.vjp(lambda y: seen.add_(y).sum(), x)
    return losses(m, x)


NOT_FOLLOWED = [
    differentiates_at_a_copy, runs_backward, keeps_a_gradient, writes_data, checkpoints, uses_an_old_function,
    goes_through_numpy,
]  # fmt: skip


@pytest.mark.parametrize("f", NOT_FOLLOWED)
def test_the_reference_engine_says_which_engine_follows_it_and_that_one_does(f):
    caught = fails(step(f, "reference"))
    ours = str(caught.value).partition(MARK)[2]
    assert "engine='reference' runs `losses` inside torch.func, which does not follow this" in ours
    assert "use engine='routed', which does" in ours
    assert MARK not in str(caught.value.__cause__)
    made = step(f)
    made(made.init(), torch.randn(4, 3))


@pytest.mark.parametrize("engine", PLAIN)
def test_errors_of_a_users_own_torch_func_are_left_alone(engine):
    caught = fails(step(writes_to_what_it_captured, engine))
    assert MARK not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_other_errors_are_left_alone(engine):
    class Own(RuntimeError):
        pass

    def raises(error):
        def f(m, x):
            raise error

        return f

    for error in (
        Own("does not require grad"),
        RuntimeError("shapes"),
        ValueError("does not require grad"),
        KeyError(),
    ):
        with pytest.raises(type(error)) as caught:
            step(raises(error), engine).gradients(step(losses).init(), torch.randn(4, 3))
        assert caught.value is error


def test_one_line_is_enough():
    """A backward inside `losses`, inside a Step."""
    inner = nn.Linear(3, 1)

    def nested(m, x):
        loss = inner(x).square().sum()
        loss.backward()
        ff.backward({"a": loss}, {"a": "*"}, inner)
        return losses(m, x)

    caught = fails(step(nested))
    assert str(caught.value).count(MARK) == 1
    explained(caught, SECOND, "walking the loss 'a'")
