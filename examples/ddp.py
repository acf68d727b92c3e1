# pip install -c constraints.txt ".[examples]" && torchrun --nproc-per-node 2 examples/ddp.py
"""Several processes under `DistributedDataParallel`, with accumulation and clipping: digits, read and drawn again.

The encoder serves the reader. A decoder learns to draw the image from its code, and may bend the encoder a little. A
probe tells whether the code shows the noise on the image; it only looks, and must not move what it looks at.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

try:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    import funcfreeze as ff
    from funcfreeze.demos.digits import two_domains
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is missing: pip install -c constraints.txt ".[examples]"') from None

EPOCHS, ACCUMULATED = 9, 2
ROUTES = {
    "digit": ["encoder", "digit"],
    "drawing": {"decoder": 1.0, "encoder": 0.1},
    "probe": "probe",  # no `detach()` in the model
}


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
        self.digit, self.probe = nn.Linear(32, 10), nn.Linear(32, 2)

    def forward(self, pixels, labels, noisy):
        """The losses: what is computed in the call of the wrapped model is what `DistributedDataParallel` sees."""
        code = self.encoder(pixels)
        return {
            "digit": F.cross_entropy(self.digit(code), labels),
            "drawing": F.mse_loss(self.decoder(code), pixels),
            "probe": F.cross_entropy(self.probe(code), noisy),
        }


def train(model, batches, epochs=EPOCHS):
    """`model` is wrapped; `batches` are this process's own."""
    plan = ff.plan(model, ROUTES)
    if dist.get_rank() == 0:
        print(plan)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for epoch in range(1, epochs + 1):
        batches.sampler.set_epoch(epoch)  # another order, the same in all processes
        for number, batch in enumerate(batches, 1):
            last = number % ACCUMULATED == 0
            with nullcontext() if last else model.no_sync():
                found = model(*batch)
                loss = ff.combine(found, plan, model)
                (loss / ACCUMULATED).backward()  # one all-reduce, whatever the number of losses
            if last:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        if dist.get_rank() == 0 and epoch % 3 == 0:
            print(f"epoch {epoch}: " + ", ".join(f"{name} {value.item():.3f}" for name, value in found.items()))


def both(clean, noisy):
    """The images of both domains, their labels, and which are noisy."""
    is_noisy = torch.tensor([0] * len(clean) + [1] * len(noisy))
    return torch.cat([clean.pixels, noisy.pixels]), torch.cat([clean.labels, noisy.labels]), is_noisy


def main():
    if "RANK" not in os.environ:
        raise SystemExit("this one starts in several processes: torchrun --nproc-per-node 2 examples/ddp.py")
    torch.set_num_threads(1)  # small networks are quicker on one
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    digits = two_domains(seed=0)
    dataset = TensorDataset(*both(digits.source, digits.target))
    batches = DataLoader(dataset, batch_size=24, sampler=DistributedSampler(dataset), drop_last=True)
    model = DistributedDataParallel(Reader())
    train(model, batches)
    if dist.get_rank() == 0:
        pixels, labels, noisy = both(digits.source_test, digits.target_test)
        code = model.module.encoder(pixels)
        read, seen = (
            (head(code).argmax(1) == wanted).float().mean()
            for head, wanted in ((model.module.digit, labels), (model.module.probe, noisy))
        )
        print(f"of {len(labels)} images held out, {read:.0%} are read right; the probe tells the domain of {seen:.0%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
