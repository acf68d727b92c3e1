"""What runs on every rank, in processes of its own: `python on_ranks.py RANK RANKS FILE NAME`.

Trains a model by the example of that name, and a copy the plain way in the same loop: the losses' plain sum, with
layers that scale gradients and with `detach()` in the model. Writes how far apart they are.
"""

from __future__ import annotations

import copy
import json
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_ways import distance, example, scaled
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset


def by_hand(module, pixels, labels, noisy=None, draw=0.1):
    code = module.encoder(pixels)
    total = F.cross_entropy(module.digit(code), labels) + F.mse_loss(module.decoder(scaled(code, draw)), pixels)
    return total if noisy is None else total + F.cross_entropy(module.probe(code.detach()), noisy)


def with_plain_forward(module, draw):
    """A copy whose forward gives the loss that people write by hand."""

    class Plain(type(module)):
        def forward(self, *batch):
            return by_hand(self, *batch, draw=draw)

    other = copy.deepcopy(module)
    other.__class__ = Plain
    return other


def share(dataset, size):
    """This rank's own batches, 24 of them."""
    dataset = Subset(dataset, range(24 * size * dist.get_world_size()))
    return DataLoader(dataset, size, sampler=DistributedSampler(dataset))


def ddp():
    program = example("ddp")
    digits = program.two_domains(seed=0)
    pixels, labels, noisy = program.both(digits.source, digits.target)
    batches = share(TensorDataset(pixels.double(), labels, noisy), 16)

    def trained(module):
        program.train(DistributedDataParallel(module), batches, epochs=1)

    def trained_by_hand(module):
        model = DistributedDataParallel(module)
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        batches.sampler.set_epoch(1)
        norms = []
        for number, batch in enumerate(batches, 1):
            with nullcontext() if number % 2 == 0 else model.no_sync():
                (model(*batch) / 2).backward()
            if number % 2 == 0:
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
                optimizer.step()
                optimizer.zero_grad()
        assert max(norms) > 0.5, "clipping bites"

    return program.Reader(), trained, trained_by_hand


def deepspeed():
    program = example("deepspeed_loop")
    images = program.two_domains(seed=0).source
    batches = share(TensorDataset(images.pixels.float(), images.labels), 12)

    def trained(module):
        program.train(program.engine_of(module, batch=12), batches, epochs=1)

    def trained_by_hand(module):
        engine = program.engine_of(module, batch=12)
        batches.sampler.set_epoch(1)
        for batch in batches:
            engine.backward(engine(*batch))
            engine.step()

    return program.Reader().float(), trained, trained_by_hand


def main(rank, ranks, file, name):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model, trained, trained_by_hand = {"ddp": ddp, "deepspeed": deepspeed}[name]()
    start = copy.deepcopy(model.state_dict())
    theirs, summed = with_plain_forward(model, 0.1), with_plain_forward(model, 1.0)
    trained(model)
    trained_by_hand(theirs)
    trained_by_hand(summed)
    found = {"distance": distance(model, theirs, start), "from the sum": distance(model, summed, start)}
    sys.stdout.write("\n" + json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
