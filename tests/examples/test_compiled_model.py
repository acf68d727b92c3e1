"""A plain loop around a compiled model: `torch.compile` does not matter to `ff.combine` and `ff.backward`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plain_ways import distance, recipe
from torch import nn

import funcfreeze as ff

pytestmark = pytest.mark.slow
ROUTES = {"digit": ["encoder", "digit"], "domain": {"domain": 1.0, "encoder": -0.1}}
PARTS = ("digit", 1.0, ("encoder", "digit")), ("domain", 1.0, ("domain",)), ("domain", -0.1, ("encoder",))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6), nn.Tanh())
        self.digit, self.domain = nn.Linear(6, 5), nn.Linear(6, 2)

    def forward(self, x):
        code = self.encoder(x)
        return self.digit(code), self.domain(code)


def losses(model, x):
    digit, domain = model(x)
    label = torch.arange(len(digit))
    return {"digit": F.cross_entropy(digit, label % 5), "domain": F.cross_entropy(domain, label % 2)}


def trained(model, batches, differentiate, find):
    """Ten steps of two batches, clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for number, x in enumerate(batches, 1):
        differentiate({name: loss / 2 for name, loss in find(model, x).items()})
        if number % 2 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("way", ["combine", "backward"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("compiled", ["the model", "in place", "the encoder", "losses"])
def test_as_the_recipe(way, backend, compiled):
    ours = Reader()
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours.state_dict())
    batches = [torch.randn(10, 8) for _ in range(20)]
    model, find = ours, losses
    if compiled == "the model":
        model = torch.compile(ours, backend=backend)
    elif compiled == "losses":
        find = torch.compile(losses, backend=backend)
    else:
        (ours if compiled == "in place" else ours.encoder).compile(backend=backend)

    def differentiate(found):
        if way == "combine":
            ff.combine(found, ROUTES, ours).backward()
        else:
            ff.backward(found, ROUTES, ours)

    trained(model, batches, differentiate, find)

    def by_recipe(found):
        recipe(theirs, [(found[name], *rest) for name, *rest in PARTS], torch.Tensor.backward)

    trained(theirs, batches, by_recipe, losses)
    assert distance(ours, theirs, start) < 1e-10
