"""`ff.backward` against the recipe it replaces, in an eager loop."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 5))
        self.cls, self.dom, self.unused = nn.Linear(5, 3), nn.Linear(5, 2), nn.Linear(2, 2)
        self.hook = None

    def forward(self, x):
        h = self.encoder(x)
        if self.hook:
            h.register_hook(self.hook)
        return self.cls(h), self.dom(h + self.cls(h).sum())


def losses(net, x):
    cls, dom = net(x)
    return {
        "cls": F.cross_entropy(cls, torch.arange(len(x)) % 3),
        "dom": F.cross_entropy(dom, torch.arange(len(x)) % 2),
    }


ROUTES = {"cls": ["encoder", "cls"], "dom": {"dom": 1.0, "encoder": -0.1, "cls": 0.5}}


def recipe(net, x):
    """Toggle, backward, toggle, backward; a weight multiplies the gradient."""
    found = losses(net, x)
    for loss, weight, allowed in (
        ("cls", 1.0, ("encoder", "cls")),
        ("dom", 1.0, ("dom",)),
        ("dom", -0.1, ("encoder",)),
        ("dom", 0.5, ("cls",)),
    ):
        held = {path: p.grad for path, p in net.named_parameters()}
        for path, p in net.named_parameters():
            p.requires_grad_(path.split(".")[0] in allowed)
            p.grad = None
        found[loss].backward(retain_graph=True)
        for path, p in net.named_parameters():
            p.requires_grad_(True)
            new = None if p.grad is None else weight * p.grad
            p.grad = held[path] if new is None else (new if held[path] is None else held[path] + new)


@pytest.mark.parametrize("hook", [None, lambda g: -0.5 * g, lambda g: g.clamp(-0.01, 0.01)])
def test_equals_the_recipe_over_several_steps(hook):
    ours, theirs = Net(), None
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours.state_dict())
    for net in (ours, theirs):
        net.hook = hook
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.1) for net in (ours, theirs)]
    for _ in range(4):
        x = torch.randn(6, 4)
        for optimizer in optimizers:
            optimizer.zero_grad()
        ff.backward(losses(ours, x), ROUTES, ours)
        recipe(theirs, x)
        for (path, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), path
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    assert ours.unused.weight.grad is None
    for path, value in ours.state_dict().items():
        torch.testing.assert_close(value - start[path], theirs.state_dict()[path] - start[path], rtol=1e-9, atol=1e-11)


def test_gradients_accumulate():
    net, x = Net(), torch.randn(6, 4)
    ff.backward(losses(net, x), ROUTES, net)
    once = {path: p.grad.clone() for path, p in net.named_parameters() if p.grad is not None}
    pointer = net.cls.weight.grad.data_ptr()
    net.eval(), net.train()
    ff.backward(losses(net, x), ROUTES, net)
    for path, gradient in once.items():
        torch.testing.assert_close(net.get_parameter(path).grad, 2 * gradient)
    assert net.cls.weight.grad.data_ptr() == pointer


def test_gradients_have_memory_of_their_own():
    net = nn.ParameterDict({"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(3))})
    ff.backward({"l": (net["a"] + net["b"]).sum()}, {"l": "*"}, net)
    net["a"].grad.mul_(5)
    assert torch.equal(net["b"].grad, torch.ones(3))


def test_a_plan_needs_no_resolving():
    net, x = Net(), torch.randn(6, 4)
    plan = ff.Step(net, losses, ROUTES, optimizer=ff.optim.sgd(0.1)).plan
    ff.backward(losses(net, x), plan, net)
    assert net.dom.weight.grad is not None


def test_an_absent_loss_and_gradient_scaling():
    net, x = Net(), torch.randn(6, 4)
    found = losses(net, x)
    ff.backward({"cls": 1024.0 * found["cls"], "dom": None}, ROUTES, net)
    assert net.dom.weight.grad is None
    (expected,) = torch.autograd.grad(losses(net, x)["cls"], net.cls.bias)
    torch.testing.assert_close(net.cls.bias.grad / 1024, expected)


def test_hooks_of_parameters_run():
    ran = []
    net, x = Net(), torch.randn(6, 4)
    net.cls.bias.register_hook(lambda g: g * 0)
    net.cls.weight.register_post_accumulate_grad_hook(lambda p: ran.append(p.grad is not None))
    ff.backward(losses(net, x), ROUTES, net)
    assert torch.equal(net.cls.bias.grad, torch.zeros(3))
    assert ran == [True]


def test_losses_are_merged_once_no_hook_can_be_on_the_graph(monkeypatch):
    """The first call of a thread cannot know; the next one can; after a registration it cannot again."""
    module = importlib.import_module("funcfreeze.loops.backward")  # the attribute of that name is the function
    known = []
    planned = module.planned_backward
    monkeypatch.setattr(
        module,
        "planned_backward",
        lambda graph, *rest: known.append(graph.structure.hooked) or planned(graph, *rest),
    )
    net, x = Net(), torch.randn(6, 4)
    early = losses(net, x)
    ff.backward(losses(net, x), ROUTES, net)
    ff.backward(losses(net, x), ROUTES, net)
    assert known[-1] == ()
    ff.backward(early, ROUTES, net)
    assert known[-1] is None, "this graph is older than the last call"
    net.hook = lambda g: g
    ff.backward(losses(net, x), ROUTES, net)
    assert known[-1] is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda found: found | {"extra": found["cls"]}, "loss 'extra' has no route"),
        (lambda found: {"cls": found["cls"]}, "there is a route for loss 'dom'"),
        (lambda found: found | {"dom": found["dom"].detach()}, "loss 'dom' does not require grad"),
        (lambda found: found | {"dom": found["dom"].expand(2)}, "loss 'dom' is not a scalar"),
    ],
)
def test_mistakes_leave_grad_alone(change, text):
    net = Net()
    with pytest.raises(ff.RouteError, match=text):
        ff.backward(change(losses(net, torch.randn(6, 4))), ROUTES, net)
    assert all(p.grad is None for p in net.parameters())


def test_under_inference_mode():
    net, x = Net(), torch.randn(6, 4)
    found = losses(net, x)
    with torch.inference_mode():
        ff.backward(found, ROUTES, net)
    ff.backward(losses(net, x), ROUTES, net)
    assert not net.cls.weight.grad.is_inference()


def test_a_mapping_of_modules():
    parts = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 1)}
    ff.backward({"l": parts["b"](parts["a"](torch.ones(1, 2))).sum()}, {"l": "b"}, parts)
    assert parts["a"].weight.grad is None
    assert parts["b"].bias.grad is not None


def test_losses_of_another_model_are_refused():
    net = Net()
    with pytest.raises(ff.RouteError, match="no parameter of this model is in the graph of the losses"):
        ff.backward(losses(copy.deepcopy(net), torch.randn(6, 4)), ROUTES, net)
