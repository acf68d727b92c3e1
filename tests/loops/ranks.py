"""What runs on every rank, in processes of its own: `python ranks.py RANK RANKS FILE MODE`.

Under DistributedDataParallel `ff.combine` must move a model as one process does that forwards every rank's share from
rank 0's buffers and averages the merged gradients.
"""

from __future__ import annotations

import copy
import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import funcfreeze as ff


class Model(nn.Module):
    def __init__(self, unused):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.cls, self.dom, self.reached = nn.Linear(6, 3), nn.Linear(6, 1), nn.Linear(6, 1)
        if unused:
            self.unused = nn.Linear(2, 2)

    def forward(self, x, heads=("cls", "dom")):
        h = self.encoder(x)
        found = {"cls": self.cls(h).square().mean()}
        if "dom" in heads:
            found["dom"] = (self.dom(h) + self.reached(h)).square().mean()
        return found


ROUTES = {"cls": ["encoder", "cls"], "dom": {"dom": 1.0, "encoder": -0.3}}

MODES = {
    "plain": {},
    "find": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "static find": {"static_graph": True, "find_unused_parameters": True},
}


def simulated(model, shares, present):
    """One process: every share from the same buffers, merged gradients averaged; the first share's buffers stay.

    Gradients are doubled, as hooks do on the ranks.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    after = None
    for share in shares:
        for name, buffer in model.named_buffers():
            buffer.data.copy_(buffers[name])
        found = model(share, present)
        ff.backward({name: found.get(name) for name in ROUTES}, ROUTES, model)
        after = after or {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.data.copy_(after[name])
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= 2 / len(shares)


def main(rank, ranks, file, mode):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = Model(unused="find" in mode)
    alone = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    ddp = DistributedDataParallel(model, **MODES[mode])
    for parameter in model.parameters():  # never called with None, and an untouched parameter stays untouched
        parameter.register_hook(lambda gradient: gradient * 2)
    optimizers = [torch.optim.AdamW(each.parameters(), 0.01, eps=1e-3, weight_decay=0.1) for each in (model, alone)]
    plan = ff.plan(ddp, ROUTES)
    untouched = [*model.reached.parameters()]
    for turn in range(20):
        x = torch.randn(4 * ranks, 4)
        present = ("cls",) if turn % 5 == 3 and mode == "find" else ("cls", "dom")
        for optimizer in optimizers:
            optimizer.zero_grad()
        found = ddp(x[rank::ranks], present)
        ff.combine({name: found.get(name) for name in ROUTES}, plan, ddp if turn % 2 else model).backward()
        if mode == "plain":
            for parameter in untouched:  # what DistributedDataParallel gives them
                assert parameter.grad is not None
                assert not parameter.grad.any()
                parameter.grad = None
        simulated(alone, [x[share::ranks] for share in range(ranks)], present)
        for optimizer in optimizers:
            optimizer.step()
    others = alone.state_dict()
    worst = max(
        float((tensor - others[name]).abs().max())
        for name, tensor in model.state_dict().items()
        if rank == 0 or name in dict(model.named_parameters())  # other ranks' buffers are exchanged before a forward
    )
    moved = {name: bool((parameter != start[name]).any()) for name, parameter in model.named_parameters()}
    try:
        found = ddp(x[rank::ranks])
        ff.backward(found, plan, model)
        refused = "no"
    except TypeError as error:
        refused = str(error)
    sys.stdout.write(json.dumps({"worst": worst, "moved": moved, "refused": refused}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
