"""A network with a teacher that is an average of its trunk, and the plain loop."""

from __future__ import annotations

import optree
import torch
from torch import nn

import funcfreeze as ff
from twins import averaged, encoder, twin_of


def network():
    return nn.ModuleDict({"online": encoder(), "head": nn.Linear(5, 2)})


def losses(model, x, *, targets):
    h = model["online"](x)
    return {"fit": (h - targets["teacher"](x)).square().mean() + model["head"](h).square().mean()}


def make(model=None, average=None, losses=losses, routes=None, **options):
    options = {"optimizer": ff.optim.sgd(0.1, momentum=0.9), **options}
    targets = {"teacher": average or ff.ema("online", 0.8)}
    return ff.Step(model or network(), losses, routes or {"fit": "*"}, targets=targets, **options)


def by_hand(model, given, decay=lambda number: 0.8, moves=lambda number: True, parts=1):
    """The loop; gives the twin."""
    twin = twin_of(model["online"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for number, x in enumerate(given):
        optimizer.zero_grad()
        for part in x.chunk(parts):
            (losses(model, part, targets={"teacher": twin})["fit"] / parts).backward()
        optimizer.step()
        if moves(number):
            averaged(twin, model["online"], decay(number))
    return twin


def batches(number):
    return [torch.randn(6, 4) for _ in range(number)]


def cloned(tree):
    return optree.tree_map(torch.clone, tree)


def same_bits(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(_bits(tensor), _bits(other[path])) for path, tensor in one.items())


def _bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)
