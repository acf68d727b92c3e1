"""What runs on every rank: `torchrun --nproc-per-node 2 on_ranks.py FRAMEWORK FOLDER`.

Trains a model by the framework's example, and copies the plain way in the same loop: the losses' plain sum, with layers
that scale gradients and with `detach()` in the model. Writes how far apart they are into the folder.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import pathlib
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_ways import distance, example, framework, scaled
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset


def drawing_reader(program, factor):
    """The readers of two examples, with the loss that people write by hand."""

    class Plain(program.Reader):
        def forward(self, pixels, labels, noisy=None):
            code = self.encoder(pixels)
            drawn = self.decoder(scaled(code, factor))
            total = F.cross_entropy(self.digit(code), labels) + F.mse_loss(drawn, pixels)
            return total if noisy is None else total + F.cross_entropy(self.probe(code.detach()), noisy)

    return Plain()


def share(dataset, size):
    """This rank's own batches, 24 of them."""
    dataset = Subset(dataset, range(24 * size * dist.get_world_size()))
    return DataLoader(dataset, size, sampler=DistributedSampler(dataset))


def ddp():
    program = example("ddp")
    dist.init_process_group("gloo")
    digits = program.two_domains(seed=0)
    pixels, labels, noisy = program.both(digits.source, digits.target)
    batches = share(TensorDataset(pixels.double(), labels, noisy), 16)

    def train(module):
        program.train(DistributedDataParallel(module), batches, epochs=1)

    def train_by_hand(module):
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

    return program.Reader(), drawing_reader(program, 0.1), drawing_reader(program, 1.0), train, train_by_hand


def deepspeed():
    program = example("deepspeed_loop")
    program.deepspeed.init_distributed("gloo")
    images = program.two_domains(seed=0).source
    batches = share(TensorDataset(images.pixels.float(), images.labels), 12)

    def train(module):
        program.train(program.engine_of(module, batch=12), batches, epochs=1)

    def train_by_hand(module):
        engine = program.engine_of(module, batch=12)
        batches.sampler.set_epoch(1)
        for batch in batches:
            engine.backward(engine(*batch))
            engine.step()

    torch.set_default_dtype(torch.float32)
    return program.Reader(), drawing_reader(program, 0.1), drawing_reader(program, 1.0), train, train_by_hand


def accelerate():
    framework("accelerate")
    program = example("accelerate_loop")
    accelerator = program.Accelerator(cpu=True, gradient_accumulation_steps=2)
    batches = DataLoader(program.all_digits().pixels[:768].double(), 16)
    cross_entropy = F.binary_cross_entropy_with_logits

    class Plain(program.Autoencoder):
        factor = 0.02

        def forward(self, pixels, noise):
            code = self.encoder(pixels)
            as_it_is = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
            fooled = torch.func.functional_call(self.critic, as_it_is, scaled(code, self.factor))
            on_code, on_noise = self.critic(code.detach()), self.critic(noise)
            no, yes = torch.zeros_like(on_code), torch.ones_like(on_code)
            critic = cross_entropy(on_noise, yes) + cross_entropy(on_code, no)
            return F.mse_loss(self.decoder(code), pixels) + critic + cross_entropy(fooled, yes)

    class Summed(Plain):
        factor = 1.0

    def train(module):
        torch.manual_seed(1 + accelerator.process_index)
        program.train(module, batches, accelerator, epochs=1)

    def train_by_hand(module):
        torch.manual_seed(1 + accelerator.process_index)
        optimizer = torch.optim.Adam(module.parameters(), 3e-3, betas=(0.5, 0.999))
        model, optimizer, own = accelerator.prepare(module, optimizer, batches)
        for pixels in own:
            with accelerator.accumulate(model):
                accelerator.backward(model(pixels, torch.randn(len(pixels), program.SIZE).to(pixels)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    return program.Autoencoder(), Plain(), Summed(), train, train_by_hand


def lightning():
    import test_lightning

    framework("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    program = example("lightning_module")
    plain, _ = test_lightning.kinds(program)
    digits = program.two_domains(seed=0)
    pairs = TensorDataset(digits.source.pixels.double(), digits.source.labels, digits.target.pixels.double())

    def train(module):
        batches = DataLoader(pairs, batch_size=12, drop_last=True)
        program.trainer(module, 12, devices=2, strategy="ddp").fit(module, batches)

    return program.Reader(), plain(), plain(1.0), train, train


def trainer():
    import test_trainer

    framework("transformers")
    program = example("trainer_lora")

    def train(model):
        test_trainer.fitted(program, model, count=640, ddp_backend="gloo")

    return *(test_trainer.reader(program, kind) for kind in ("Reader", "Plain", "Summed")), train, train


def main(name, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    parts = {each.__name__: each for each in (ddp, deepspeed, accelerate, lightning, trainer)}
    ours, theirs, summed, train, train_by_hand = parts[name]()
    start = copy.deepcopy(ours.state_dict())
    theirs.load_state_dict(start)
    summed.load_state_dict(start)
    train(ours)
    train_by_hand(theirs)
    train_by_hand(summed)
    found = {"distance": distance(ours, theirs, start), "from the sum": distance(ours, summed, start)}
    (pathlib.Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
