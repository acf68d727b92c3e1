"""What runs on every rank, in processes of its own: `python ranks.py RANKS FOLDER MODE MODEL`.

Under DistributedDataParallel `ff.combine` must move a model as one process does that forwards every rank's share from
rank 0's buffers and averages the merged gradients. What a rank found is in FOLDER/RANK.json.
"""

from __future__ import annotations

import copy
import importlib
import json
import multiprocessing
import pathlib
import sys
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

import funcfreeze as ff


class Branches(nn.Module):
    """Two heads over one encoder, a head that a loss reaches and none may update, and one that nobody calls."""

    routes: ClassVar = {"cls": ["encoder", "cls"], "dom": {"dom": 1.0, "encoder": -0.3}}
    still = "reached"

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

    @staticmethod
    def sample(number):
        return torch.randn(number, 4)


class Vision(nn.Module):
    """Convolutions with a skip from trunk to head, batch norms, a parametrized head."""

    routes: ClassVar = {"cls": ["stem", "block", "cls"], "dom": {"dom": 1.0, "stem": -0.3}}
    still = "reached"

    def __init__(self, unused):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.cls = weight_norm(nn.Linear(4, 3))
        self.dom, self.reached = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 4, 1)
        if unused:
            self.unused = nn.Linear(2, 2)

    def forward(self, x, heads=("cls", "dom")):
        h = self.stem(x)
        found = {"cls": self.cls((h + self.block(h)).mean((2, 3))).square().mean()}
        if "dom" in heads:
            found["dom"] = self.dom(self.reached(h)).square().mean()
        return found

    @staticmethod
    def sample(number):
        return torch.randn(number, 2, 4, 4)


class Language(nn.Module):
    """A transformer whose embedding is tied to its head, and an auxiliary loss on a trunk that it shares."""

    routes: ClassVar = {"cls": ["embed", "body", "cls"], "dom": {"dom": 1.0, "body": 0.3}}
    still = "reached"

    def __init__(self, unused):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.body = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.cls = nn.Linear(8, 7, bias=False)
        self.cls.weight = self.embed.weight
        self.dom, self.reached = nn.Linear(8, 1), nn.Linear(8, 8)
        if unused:
            self.unused = nn.Linear(2, 2)

    def forward(self, x, heads=("cls", "dom")):
        h = self.body(self.embed(x))
        found = {"cls": nn.functional.cross_entropy(self.cls(h[:, :-1]).transpose(1, 2), x[:, 1:])}
        if "dom" in heads:
            found["dom"] = self.dom(self.reached(h)).square().mean()
        return found

    @staticmethod
    def sample(number):
        return torch.randint(7, (number, 5))


MODELS = {kind.__name__: kind for kind in (Branches, Vision, Language)}

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
        ff.backward({name: found.get(name) for name in model.routes}, model.routes, model)
        after = after or {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.data.copy_(after[name])
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= 2 / len(shares)


def on_rank(rank, ranks, folder, mode, kind):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = MODELS[kind](unused="find" in mode)
    alone = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    ddp = DistributedDataParallel(model, **MODES[mode])
    sent = [0]

    def counted(_, bucket):
        sent[-1] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, counted)
    for parameter in model.parameters():  # never called with None, and an untouched parameter stays untouched
        parameter.register_hook(lambda gradient: gradient * 2)
    optimizers = [torch.optim.AdamW(each.parameters(), 0.01, eps=1e-3, weight_decay=0.1) for each in (model, alone)]
    plan = ff.plan(ddp, model.routes)
    untouched = [*model.get_submodule(model.still).parameters()]
    for turn in range(20):
        x = model.sample(4 * ranks)
        sent.append(0)
        present = ("cls",) if turn % 5 == 3 and mode == "find" else ("cls", "dom")
        for optimizer in optimizers:
            optimizer.zero_grad()
        found = ddp(x[rank::ranks], present)
        ff.combine({name: found.get(name) for name in model.routes}, plan, ddp if turn % 2 else model).backward()
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
    head = nn.Linear(3, 1)
    try:
        found = ddp(x[rank::ranks])
        loss = head(torch.ones(1, 3)).sum() + sum(found.values())
        ff.combine({"l": loss}, {"l": "*"}, {"model": ddp, "head": head})
        unknown = "no"
    except ff.RouteError as error:
        unknown = str(error)
    with ddp.no_sync():
        found = ddp(x[rank::ranks])
        ff.combine({"l": head(torch.ones(1, 3)).sum()}, {"l": "head"}, {"model": ddp, "head": head})
    of_one_gradient = sum(parameter.nbytes for parameter in model.parameters())
    told = {"worst": worst, "moved": moved, "refused": refused, "unknown": unknown}
    told |= {"sent": sent[1:], "of one gradient": of_one_gradient}
    (folder / f"{rank}.json").write_text(json.dumps(told))


def main(ranks, folder, mode, kind):
    """Whether all ranks came to their end. They share what is imported: optimizers import the compiler."""
    importlib.import_module("torch._dynamo")
    context = multiprocessing.get_context("fork")
    each = [
        context.Process(target=on_rank, args=(rank, ranks, pathlib.Path(folder), mode, kind)) for rank in range(ranks)
    ]
    for process in each:
        process.start()
    for process in each:
        process.join(timeout=240)
    for process in each:
        process.kill()  # who still waits for one that has failed
        process.join()
    return all(process.exitcode == 0 for process in each)


if __name__ == "__main__":
    sys.exit(not main(int(sys.argv[1]), *sys.argv[2:]))
