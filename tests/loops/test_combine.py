"""`ff.combine` against the recipe, in the loops that people have: the gradients, and what hangs on them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from test_backward import ROUTES, Net, losses, recipe
from torch import nn
from torch.nn.utils import clip_grad_norm_

import funcfreeze as ff
from counts import multiply_adds


def pair():
    net = Net()
    return net, copy.deepcopy(net)


def grads(net):
    return {path: p.grad for path, p in net.named_parameters()}


def same(found, wanted, factor=1.0):
    assert found.keys() == wanted.keys()
    for path, gradient in wanted.items():
        if gradient is None:
            assert found[path] is None, path
        else:
            torch.testing.assert_close(found[path], factor * gradient, rtol=1e-9, atol=1e-12)


def test_gradients_and_value():
    ours, theirs = pair()
    for _ in range(3):
        x = torch.randn(6, 4)
        found = losses(ours, x)
        loss = ff.combine(found, ROUTES, ours)
        assert loss.item() == pytest.approx(sum(each.item() for each in found.values()))
        assert (loss.ndim, loss.dtype) == (0, torch.float64)
        loss.backward()
        recipe(theirs, x)
        same(grads(ours), grads(theirs))
        assert ours.unused.weight.grad is None


def test_accumulation_clipping_and_an_optimizer():
    ours, theirs = pair()
    start = copy.deepcopy(ours.state_dict())
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=0.1) for net in (ours, theirs)]
    plan = ff.plan(ours, ROUTES)
    for _ in range(5):
        for _ in range(2):
            x = torch.randn(6, 4)
            (ff.combine(losses(ours, x), plan, ours) / 2).backward()
            before = {path: None if p.grad is None else p.grad.clone() for path, p in theirs.named_parameters()}
            theirs.zero_grad()
            recipe(theirs, x)
            for path, p in theirs.named_parameters():
                if p.grad is not None:
                    p.grad = p.grad / 2 + (0 if before[path] is None else before[path])
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    moved = [{path: p - start[path] for path, p in net.named_parameters()} for net in (ours, theirs)]
    same(*moved)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_cotangent_multiplies_all(in_place):
    ours, theirs = pair()
    x = torch.randn(6, 4)
    loss = ff.combine(losses(ours, x), ROUTES, ours)
    if in_place:
        loss *= 1024.0
    else:
        loss = loss * 1024.0
    loss.backward()
    recipe(theirs, x)
    same(grads(ours), grads(theirs), 1024.0)


def test_a_term_on_parameters_alone_may_be_added():
    ours, theirs = pair()
    x = torch.randn(6, 4)
    (ff.combine(losses(ours, x), ROUTES, ours) + 0.1 * ours.encoder[0].weight.square().sum()).backward()
    recipe(theirs, x)
    theirs.encoder[0].weight.grad += 0.2 * theirs.encoder[0].weight.detach()
    same(grads(ours), grads(theirs))


def test_a_further_loss_on_the_same_forward_is_an_error_and_never_a_wrong_number():
    net, _ = pair()
    found = losses(net, torch.randn(6, 4))
    loss = ff.combine(found, ROUTES, net) + found["cls"].exp()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_autograd_grad_and_backward_of_some_inputs():
    ours, theirs = pair()
    x = torch.randn(6, 4)
    recipe(theirs, x)
    wanted = {path: p.grad for path, p in theirs.named_parameters() if p.grad is not None}
    inputs = [p for path, p in ours.named_parameters() if path in wanted]
    found = torch.autograd.grad(ff.combine(losses(ours, x), ROUTES, ours), inputs)
    same(dict(zip(wanted, found, strict=True)), wanted)
    assert all(gradient is None for gradient in grads(ours).values())
    ff.combine(losses(ours, x), ROUTES, ours).backward(inputs=[ours.cls.weight])
    torch.testing.assert_close(ours.cls.weight.grad, wanted["cls.weight"], rtol=1e-9, atol=1e-12)
    assert ours.dom.weight.grad is None


def test_a_retained_graph_and_a_second_backward():
    ours, theirs = pair()
    x = torch.randn(6, 4)
    loss = ff.combine(losses(ours, x), ROUTES, ours)
    loss.backward(retain_graph=True)
    loss.backward()
    recipe(theirs, x)
    same(grads(ours), grads(theirs), 2.0)
    with pytest.raises(RuntimeError, match=r"combined loss a second time; pass retain_graph=True"):
        loss.backward()


def test_gradients_of_gradients():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(5, 3)
    routes = {"a": "*", "b": {"0": -0.5}}

    def found():
        out = net(x)
        return {"a": out.square().mean(), "b": out.exp().mean()}

    first = torch.autograd.grad(ff.combine(found(), routes, net), [*net.parameters()], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [*net.parameters()])
    params = [*net.parameters()]
    by_hand_a = torch.autograd.grad(found()["a"], params, create_graph=True)
    by_hand_b = torch.autograd.grad(found()["b"], params[:2], create_graph=True)
    merged = [a - 0.5 * b for a, b in zip(by_hand_a[:2], by_hand_b, strict=True)] + [*by_hand_a[2:]]
    wanted = torch.autograd.grad(sum(g.square().sum() for g in merged), params)
    for one, other in zip(second, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_hooks_on_parameters_run_once_on_the_merged_gradient():
    net, _ = pair()
    ran, after = [], []
    for path, parameter in net.named_parameters():
        parameter.register_hook(lambda g, path=path: ran.append((path, g.clone())))
        parameter.register_post_accumulate_grad_hook(lambda p, path=path: after.append(path))
    net.encoder[0].weight.register_hook(lambda g: g * 2)
    ff.combine(losses(net, torch.randn(6, 4)), ROUTES, net).backward()
    touched = [path for path, p in net.named_parameters() if p.grad is not None]
    assert sorted(path for path, _ in ran) == sorted(after) == sorted(touched)
    factor = {"encoder.0.weight": 2.0}
    same({p: net.get_parameter(p).grad for p, _ in ran}, {p: factor.get(p, 1.0) * g for p, g in ran})


def clipped(g):
    return g.clamp(-0.01, 0.01)


def test_a_penalty_on_its_own_gradient_may_be_added():
    ours, theirs = pair()
    x = torch.randn(6, 4)
    everything = dict.fromkeys(ROUTES, "*")
    for net in (ours, theirs):
        found = losses(net, x)
        loss = ff.combine(found, everything, net) if net is ours else sum(found.values())
        gradients = torch.autograd.grad(loss, list(net.parameters()), create_graph=True, allow_unused=True)
        penalty = sum(gradient.square().sum() for gradient in gradients if gradient is not None)
        (loss + 0.1 * penalty).backward()
    same(grads(ours), grads(theirs))


def test_a_hook_that_is_removed_in_the_backward_stays_removed():
    net = Net()
    parameter = next(net.parameters())
    calls = []
    handle = parameter.register_hook(lambda gradient: calls.append(1))

    class Removing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            handle.remove()
            return gradient

    found = {name: Removing.apply(loss) for name, loss in losses(net, torch.randn(6, 4)).items()}
    ff.combine(found, ROUTES, net).backward()
    assert not parameter._backward_hooks
    assert not calls


@pytest.mark.parametrize("step", [1.5, -1, True, torch.tensor(1.0), torch.tensor([1])])
def test_a_count_of_steps_is_a_whole_number(step):
    net = Net()
    with pytest.raises(TypeError, match="step= is the number of steps taken so far, an int or a 0-d integer tensor"):
        ff.combine(losses(net, torch.randn(6, 4)), ROUTES, net, step=step)


@pytest.mark.parametrize("when", ["in the forward", "after combine"])
def test_hooks_on_activations_run_as_for_each_loss_alone(when):
    ours, theirs = pair()
    x = torch.randn(6, 4)
    for turn in range(3):  # the first call of a process does not trust the graph; later ones do
        h = ours.encoder(x)
        if when == "in the forward" and turn == 2:
            h.register_hook(clipped)
        out = {"a": ours.cls(h).square().sum(), "b": ours.dom(h).square().sum()}
        loss = ff.combine(out, {"a": "*", "b": "*"}, ours)
        if when == "after combine" and turn == 2:
            h.register_hook(clipped)
        ours.zero_grad()
        loss.backward()
    for name in ("cls", "dom"):
        h = theirs.encoder(x)
        h.register_hook(clipped)
        getattr(theirs, name)(h).square().sum().backward()
    same(grads(ours), grads(theirs))


def test_no_more_work_than_backward():
    ours, theirs = pair()
    x = torch.randn(6, 4)

    def combined():
        ff.combine(losses(ours, x), ROUTES, ours).backward()

    def backward():
        ff.backward(losses(theirs, x), ROUTES, theirs)

    for run in (combined, backward):
        run()
        run()
    assert multiply_adds(combined) == multiply_adds(backward)


def test_absent_losses():
    net, _ = pair()
    found = losses(net, torch.randn(6, 4))
    ff.combine({**found, "cls": None}, ROUTES, net).backward()
    assert net.dom.weight.grad is not None
    net.zero_grad()
    nothing = ff.combine({"cls": None, "dom": None}, ROUTES, net)
    assert nothing.item() == 0.0
    assert nothing.requires_grad
    nothing.backward()
    assert all(gradient is None for gradient in grads(net).values())


def test_without_grad_mode_it_is_the_sum():
    net, _ = pair()
    with torch.no_grad():
        found = losses(net, torch.randn(6, 4))
        loss = ff.combine(found, ROUTES, net)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(sum(each.item() for each in found.values()))


def test_what_is_no_parameter_of_the_model_gets_the_gradient_of_the_sum():
    net, other = nn.Linear(3, 2), nn.Linear(4, 3)
    x = torch.randn(5, 4, requires_grad=True)
    results = []
    for ours in (True, False):
        out = net(other(x))
        found = {"a": out.square().sum(), "b": out.exp().sum()}
        for tensor in (x, *other.parameters(), *net.parameters()):
            tensor.grad = None
        if ours:
            ff.combine(found, {"a": "*", "b": {"weight": -0.5}}, net).backward()
        else:
            sum(found.values()).backward()
        results.append([tensor.grad for tensor in (x, *other.parameters())])
    for one, by_sum in zip(*results, strict=True):
        torch.testing.assert_close(one, by_sum)


def test_weights_that_are_schedules():
    net = nn.Linear(3, 1)
    routes = {"a": ff.Route("*", weight=lambda step: 0.1 * step)}
    x = torch.randn(5, 3)
    with pytest.raises(TypeError, match="is a schedule of the step, and there is no step here"):
        ff.combine({"a": net(x).sum()}, routes, net)
    ff.combine({"a": net(x).sum()}, routes, net, step=3).backward()
    torch.testing.assert_close(net.weight.grad, 0.3 * x.sum(0, keepdim=True))


def test_dtypes_and_half_precision_losses():
    net = nn.Linear(3, 1).bfloat16()
    out = net(torch.randn(5, 3).bfloat16())
    loss = ff.combine({"a": out.sum(), "b": out.float().mean()}, {"a": "*", "b": "*"}, net)
    assert loss.dtype == torch.float32
    loss.backward()
    assert net.weight.grad.dtype == torch.bfloat16


def test_a_grad_scaler():
    ours, theirs = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    x = torch.randn(6, 4)
    scaler.scale(ff.combine(losses(ours, x), ROUTES, ours)).backward()
    scaler.unscale_(optimizer)
    recipe(theirs, x)
    same(grads(ours), grads(theirs))


@pytest.mark.parametrize("given", ["another model", "a used-up graph", "a plan of another model", "no route"])
def test_bad_input_changes_nothing(given):
    net, other = Net(), nn.Linear(4, 1)
    found = losses(net, torch.randn(6, 4))
    routes, kind, message = ROUTES, ff.RouteError, "no parameter of this model is in the graph"
    if given == "another model":
        found = {name: other(torch.randn(2, 4)).sum() for name in found}
    elif given == "a used-up graph":
        ff.combine(found, ROUTES, net).backward()
        net.zero_grad()
        kind, message = RuntimeError, "a second time"
    elif given == "a plan of another model":
        routes, message = ff.plan(other, {"cls": "*", "dom": "*"}), "plan"
    else:
        routes, message = {"cls": "*"}, "loss 'dom' has no route"
    with pytest.raises(kind, match=message):
        ff.combine(found, routes, net).backward()
    assert all(gradient is None for gradient in grads(net).values())


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor.detach()  # an output that a node saves would keep the node


@pytest.mark.parametrize("retain", [False, True])
def test_the_graph_is_let_go_as_it_is_used_up(retain):
    """The combined loss that a loop still holds while the optimizer steps holds no activations."""
    net, _ = pair()
    kept = []

    def pack(tensor):
        kept.append(weakref.ref(found := Kept(tensor)))
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
        loss = ff.combine({"a": net.encoder(torch.randn(6, 4)).square().sum()}, {"a": "encoder"}, net)
    loss.backward(retain_graph=retain)
    gc.collect()
    assert len(kept) > 3
    assert any(seen() is not None for seen in kept) == retain
    del loss
    gc.collect()
    assert all(seen() is None for seen in kept)
