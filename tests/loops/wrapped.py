"""Wrappers in one process, as `python wrapped.py FILE`: outputs beside the combined loss, wrappers that come and go."""

from __future__ import annotations

import copy
import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import funcfreeze as ff

ROUTES = {"cls": ["encoder", "cls"], "dom": {"dom": 1.0, "encoder": -0.3}}


class Model(nn.Module):
    """Combines inside of its forward, as a model for a trainer does, and returns what hangs on the same graph."""

    def __init__(self):
        super().__init__()
        self.encoder, self.cls, self.dom = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x):
        h = self.encoder(x).tanh()
        logits = self.cls(h)
        losses = {"cls": logits.square().mean(), "dom": self.dom(h).square().mean()}
        return {"loss": ff.combine(losses, ROUTES, self), "logits": logits}


def beside_other_outputs(options):
    """The largest difference to the model alone, whose outputs nothing walks."""
    model = Model()
    alone = copy.deepcopy(model)
    ddp = DistributedDataParallel(model, **options)
    worst = 0.0
    for _ in range(3):
        x = torch.randn(5, 4)
        ddp.zero_grad()
        alone.zero_grad()
        ddp(x)["loss"].backward()
        alone(x)["loss"].backward()
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        worst = max(worst, *(float((ours.grad - theirs.grad).abs().max()) for ours, theirs in pairs))
    return worst


def made_elsewhere():
    """A wrapper whose making leaves as many references to its class as there were, when the last look was taken."""
    local = DistributedDataParallel
    net = nn.Linear(2, 1)
    ff.backward({"l": net(torch.ones(1, 2)).sum()}, {"l": "*"}, net)
    return local(net)


def is_refused(ddp):
    try:
        ff.backward({"l": ddp(torch.ones(1, 2)).sum()}, {"l": "*"}, ddp.module)
    except TypeError:
        return True
    return False


def main(file):
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    refused = [is_refused(made_elsewhere()) for _ in range(3)]
    worst = [
        beside_other_outputs(options) for options in ({}, {"find_unused_parameters": True}, {"static_graph": True})
    ]
    sys.stdout.write(json.dumps({"worst": worst, "refused": refused}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
