"""`losses` that take gradients themselves: at parameters with a route, and at others when `differentiable` says so."""

from __future__ import annotations

import copy

import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff
from counts import multiply_adds


def vqgan():
    return nn.ModuleDict({"enc": nn.Linear(3, 3), "last": nn.Linear(3, 3), "disc": nn.Linear(3, 1)})


def adaptive(model, x):
    """An adaptive weight: the ratio of two gradient norms at the last layer, as VQGAN has it."""
    y = model["last"](model["enc"](x))
    rec, adv = (y - x).abs().mean(), -model["disc"](y).mean()
    one, two = (torch.autograd.grad(loss, model["last"].weight, retain_graph=True)[0].norm() for loss in (rec, adv))
    return {"ae": rec + (one / (two + 1e-4)).detach() * adv}


def by_backward(model, x):
    y = model["last"](model["enc"](x))
    loss = y.square().mean()
    loss.backward(inputs=[model["last"].weight], retain_graph=True)
    size = model["last"].weight.grad.norm()
    model["last"].weight.grad = None
    return {"ae": loss * size.detach()}


def with_a_dict(model, x):
    loss = model["last"](model["enc"](x)).square().mean()
    found = torch.autograd.grad(loss, list(model["last"].parameters()), create_graph=True)
    return {"ae": loss + sum(g.square().sum() for g in found)}


@pytest.mark.parametrize("f", [adaptive, by_backward, with_a_dict])
@pytest.mark.parametrize("engine", ["routed", "toggle"])
def test_right_with_differentiable(f, engine):
    model, x = vqgan(), torch.randn(4, 3)
    eager = copy.deepcopy(model)
    loss = f(eager, x)["ae"]
    want = torch.autograd.grad(loss, list(eager["enc"].parameters()))
    for selection in ("last", ["last.weight", "last.bias"], ff.path("*") - "enc", "*"):
        step = ff.Step(model, f, {"ae": "enc"}, optimizer=ff.optim.sgd(0.1), engine=engine, differentiable=selection)
        state = step.init()
        got = step.gradients(state, x)
        assert set(got) == {"enc.weight", "enc.bias"}
        torch.testing.assert_close([got["enc.weight"], got["enc.bias"]], list(want), rtol=1e-12, atol=1e-14)
        held = {path: tensor.clone() for path, tensor in state.params.items()}
        after, metrics = step(state, x)
        torch.testing.assert_close(metrics["ae"], loss.detach())
        assert all(torch.equal(held[path], after.params[path]) for path in held if not path.startswith("enc"))
        assert ff.verify(step, after, x).ok
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("f", [adaptive, by_backward])
@pytest.mark.parametrize("engine", ["routed", "toggle"])
def test_without_it_the_error_names_parameter_and_cure(f, engine):
    model, x = vqgan(), torch.randn(4, 3)
    step = ff.Step(model, f, {"ae": "enc"}, optimizer=ff.optim.sgd(0.1), engine=engine)
    state = step.init()
    before = [leaf.clone() for leaf in optree.tree_leaves(state)]
    with pytest.raises(RuntimeError) as caught:
        step(state, x)
    text = str(caught.value)
    assert text.startswith(("One of the differentiated Tensors does not require grad", "can't retain_grad on Tensor"))
    assert "`losses` takes a gradient itself, at last.weight, which no loss may update" in text
    assert "differentiable='last.weight'" in text
    assert all(map(torch.equal, before, optree.tree_leaves(state)))


def test_several_are_named_and_strangers_are_not():
    model, x = vqgan(), torch.randn(4, 3)
    step = ff.Step(model, with_a_dict, {"ae": "enc"}, optimizer=ff.optim.sgd(0.1))
    with pytest.raises(
        RuntimeError, match=r"at last\.weight, last\.bias.*differentiable=\['last.weight', 'last.bias'\]"
    ):
        step(step.init(), x)

    def at_the_input(model, x):
        loss = model["enc"](x).mean()
        torch.autograd.grad(loss, x)
        return {"ae": loss}

    step = ff.Step(model, at_the_input, {"ae": "enc"}, optimizer=ff.optim.sgd(0.1))
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        step(step.init(), x)
    assert "differentiable" not in str(caught.value)


@pytest.mark.parametrize("selection", ["encoder", ["last", "nothing.here"]])
def test_a_wrong_selection(selection):
    with pytest.raises(ff.RouteError, match=r"differentiable: .* matches no parameter"):
        ff.Step(vqgan(), adaptive, {"ae": "enc"}, optimizer=ff.optim.sgd(0.1), differentiable=selection)


def test_what_is_frozen_for_good_cannot_be_asked_for():
    model = vqgan()
    model["last"].requires_grad_(False)
    with pytest.raises(ff.RouteError, match=r"differentiable: path\('last'\) names only frozen parameters"):
        ff.Step(model, adaptive, {"ae": "enc"}, optimizer=ff.optim.sgd(0.1), differentiable="last")


def test_freezing_by_having_no_route_costs_nothing():
    """Counted: no weight gradient of the frozen body, and nothing saved for one."""
    body = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    model, x = nn.ModuleDict({"head": nn.Linear(16, 16), "body": body}), torch.randn(8, 16)

    def losses(m, x):
        return {"a": m["body"](m["head"](x)).square().mean()}

    saved: list[int] = []

    def pack(tensor):
        saved[-1] += tensor.numel()
        return tensor

    counts = []
    for selection in (None, "body"):
        step = ff.Step(model, losses, {"a": "head"}, optimizer=ff.optim.sgd(0.1), differentiable=selection)
        state = step.init()
        counts.append(multiply_adds(lambda step=step, state=state: step.gradients(state, x)))
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step.gradients(state, x)
    assert counts[0] == counts[1] == 8 * 16 * 16 * (7 + 6 + 1)  # forward, through the body, the head's own
    assert saved[1] - saved[0] == 6 * 8 * 16  # the inputs of the body's layers, of which the plain step keeps none


@pytest.mark.parametrize("engine", ["routed", "toggle"])
def test_a_whole_backward_inside_leaves_no_trace(engine):
    model, x = vqgan(), torch.randn(4, 3)

    def losses(m, x):
        y = m["last"](m["enc"](x))
        loss = (y - x).square().mean()
        loss.backward(retain_graph=True)
        return {"a": loss, "b": y.mean()}

    step = ff.Step(model, losses, {"a": "*", "b": "enc"}, optimizer=ff.optim.sgd(0.1), engine=engine)
    got = step.gradients(step.init(), x)
    eager = copy.deepcopy(model)
    y = eager["last"](eager["enc"](x))
    total = (y - x).square().mean()
    for path, parameter in eager.named_parameters():
        if path.startswith("disc"):
            continue
        wanted = torch.autograd.grad(total + (y.mean() if path.startswith("enc") else 0), parameter, retain_graph=True)
        torch.testing.assert_close(got[path], wanted[0], rtol=1e-10, atol=1e-12)
    assert ff.verify(step, step.init(), x).ok
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_a_merge_rule_of_ones_own_by_gradients_inside(compile):
    model, x = vqgan(), torch.randn(4, 3)

    def merged(m, x):
        h = m["enc"](x)
        losses = {"one": m["last"](h).square().mean(), "two": m["disc"](h).mean()}
        trunk = list(m["enc"].parameters())
        one, two = (torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses.values())
        chosen = [a + torch.where((a * b).sum() >= 0, 1.0, 0.0) * b for a, b in zip(one, two, strict=True)]
        return {**losses, "trunk": sum((g.detach() * p).sum() for g, p in zip(chosen, trunk, strict=True))}

    routes = {"one": "last", "two": "disc", "trunk": "enc"}
    step = ff.Step(model, merged, routes, optimizer=ff.optim.sgd(0.1), compile=compile)
    state, _ = step(step.init(), x)
    h = model["enc"](x)
    trunk, found = list(model["enc"].parameters()), (model["last"](h).square().mean(), model["disc"](h).mean())
    one, two = (torch.autograd.grad(loss, trunk, retain_graph=True) for loss in found)
    for (path, parameter), a, b in zip(model["enc"].named_parameters(prefix="enc"), one, two, strict=True):
        wanted = parameter.detach() - 0.1 * (a + b if (a * b).sum() >= 0 else a)
        torch.testing.assert_close(state.params[path], wanted, rtol=1e-10, atol=1e-12)
