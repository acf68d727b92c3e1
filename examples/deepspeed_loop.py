# pip install -c constraints.txt ".[examples]" deepspeed && torchrun --nproc-per-node 2 examples/deepspeed_loop.py
"""DeepSpeed with ZeRO 2, accumulation and clipping, in several processes: digits, read and drawn again.

DeepSpeed divides by the accumulation steps, clips, and compiles a kernel at its first start, for which it wants a C++
compiler. The encoder serves the reader; a decoder learns to draw the image from its code, and may bend it a little.
"""

from __future__ import annotations

import os

try:
    import deepspeed
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    import funcfreeze as ff
    from funcfreeze.demos.digits import two_domains
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is missing: pip install -c constraints.txt ".[examples]" deepspeed') from None

EPOCHS, BATCH = 10, 24
ROUTES = {
    "digit": ["encoder", "digit"],
    "drawing": {"decoder": 1.0, "encoder": 0.1},
}


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
        self.digit = nn.Linear(32, 10)

    def forward(self, pixels, labels):
        code = self.encoder(pixels)
        drawn = self.decoder(code)
        return {"digit": F.cross_entropy(self.digit(code), labels), "drawing": F.mse_loss(drawn, pixels)}


def engine_of(model, batch=BATCH, stage=2):
    settings = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # a plain one of torch's
    }
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def train(engine, batches, epochs=EPOCHS):
    plan = ff.plan(engine.module, ROUTES)
    if dist.get_rank() == 0:
        print(plan)
    for epoch in range(1, epochs + 1):
        batches.sampler.set_epoch(epoch)
        for batch in batches:
            found = engine(*batch)
            engine.backward(ff.combine(found, plan, engine.module))
            engine.step()  # the optimizer's, every second time
        if dist.get_rank() == 0 and epoch % 2 == 0:
            print(f"epoch {epoch}: " + ", ".join(f"{name} {value.item():.3f}" for name, value in found.items()))


def main():
    if "RANK" not in os.environ:
        raise SystemExit("this one starts in several processes: torchrun --nproc-per-node 2 examples/deepspeed_loop.py")
    torch.set_num_threads(1)  # small networks are quicker on one
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    digits = two_domains(seed=0)
    dataset = TensorDataset(digits.source.pixels, digits.source.labels)
    batches = DataLoader(dataset, batch_size=BATCH, sampler=DistributedSampler(dataset), drop_last=True)
    model = Reader()
    train(engine_of(model), batches)
    if dist.get_rank() == 0:
        images = digits.source_test
        read = (model.digit(model.encoder(images.pixels)).argmax(1) == images.labels).float().mean()
        print(f"of {len(images)} images held out {read:.0%} are read right")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
