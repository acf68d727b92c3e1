"""The doors in the middle of what torch.compile compiles."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import funcfreeze as ff

ROUTES = {"task": "*", "small": {"encoder": -0.1}}
DOORS = {"backward": ff.backward, "combine": lambda *given: ff.combine(*given).backward()}


def step(door, net, x):
    h = net["encoder"](x)
    DOORS[door]({"task": net["head"](h).square().mean(), "small": h.abs().mean()}, ROUTES, net)
    return h.sum()


@pytest.mark.parametrize("door", DOORS)
def test_between_two_graphs_they_are_right(door):
    net = nn.ModuleDict({"encoder": nn.Linear(4, 5), "head": nn.Linear(5, 2)})
    plain, x = copy.deepcopy(net), torch.randn(6, 4)
    step(door, plain, x)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo warns of what it looks at itself
        for _ in range(2):
            net.zero_grad()
            compiled(door, net, x)
            for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("door", DOORS)
def test_where_there_may_be_one_graph_only_the_error_says_why(door):
    net = nn.ModuleDict({"encoder": nn.Linear(4, 5), "head": nn.Linear(5, 2)})
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="funcfreeze plans the backward of a graph of autograd"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(door, net, torch.randn(6, 4))


def test_a_compiled_model_is_like_any_other():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    plain, x = copy.deepcopy(net), torch.randn(6, 4)
    compiled = torch.compile(net, backend="aot_eager")
    for model in (compiled, plain):
        out = model(x)
        losses = {"a": out.square().mean(), "b": out.abs().mean()}
        ff.combine(losses, {"a": "*", "b": "2"}, model).backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
