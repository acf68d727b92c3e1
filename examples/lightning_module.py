# pip install -c constraints.txt ".[examples]" && python examples/lightning_module.py
"""A Lightning module, with automatic and with manual optimization: digits, read by an encoder that hides the domain.

Accumulation, clipping and bfloat16 are the `Trainer`'s. Labels are known of clean images alone.
"""

from __future__ import annotations

import logging
import warnings

try:
    import lightning
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import funcfreeze as ff
    from funcfreeze.demos.digits import two_domains
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is missing: pip install -c constraints.txt ".[examples]"') from None

STEPS, ACCUMULATED = 200, 2
ROUTES = {
    "digit": ["encoder", "digit"],
    "domain": {"domain": 1.0, "encoder": -0.3 * ff.optim.dann_schedule(STEPS)},
}


class Reader(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        # bounded features: with ReLU ones the encoder escapes the domain head by growing them
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.Tanh())
        self.digit = nn.Linear(32, 10)
        self.domain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        self.plan = ff.plan(self, ROUTES)

    def losses(self, batch):
        clean, labels, noisy = batch
        code = self.encoder(torch.cat([clean, noisy]))
        is_noisy = (torch.arange(len(code), device=code.device) >= len(clean)).long()
        found = {
            "digit": F.cross_entropy(self.digit(code[: len(clean)]), labels),
            "domain": F.cross_entropy(self.domain(code), is_noisy),
        }
        self.log_dict({name: value.detach() for name, value in found.items()})
        return found

    def training_step(self, batch, index):
        return ff.combine(self.losses(batch), self.plan, self, step=self.global_step)

    def test_step(self, batch, index):
        pixels, labels = batch
        self.log("read", (self.digit(self.encoder(pixels)).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        readers = [*self.encoder.parameters(), *self.digit.parameters()]
        groups = [{"params": readers, "lr": 2e-3}, {"params": self.domain.parameters(), "lr": 1e-2}]
        return torch.optim.AdamW(groups, betas=(0.5, 0.999))


class ReaderByHand(Reader):
    """The same, with a loop of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        loss = super().training_step(batch, index)
        self.manual_backward(loss / ACCUMULATED)
        if (index + 1) % ACCUMULATED == 0:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


def trainer(module, steps=STEPS, devices=1, **options):
    if module.automatic_optimization:  # a loop by hand does these by hand
        options |= {"accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": 0.5}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(max_steps=steps, accelerator="cpu", devices=devices, **quiet, **options)


class Progress(lightning.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if (index + 1) % ACCUMULATED == 0 and trainer.global_step % 50 == 0:
            values = ", ".join(f"{name} {value:.3f}" for name, value in trainer.callback_metrics.items())
            print(f"step {trainer.global_step}: {values}")


def main():
    torch.set_num_threads(1)  # small networks are quicker on one
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    digits = two_domains(seed=0)
    pairs = TensorDataset(digits.source.pixels, digits.source.labels, digits.target.pixels)
    batches = DataLoader(pairs, batch_size=32, shuffle=True, drop_last=True)
    noisy = DataLoader(TensorDataset(digits.target_test.pixels, digits.target_test.labels), batch_size=300)
    for kind in Reader, ReaderByHand:
        lightning.seed_everything(0, verbose=False)
        module = kind()
        print(f"{kind.__name__}\n{module.plan}")
        one = trainer(module, precision="bf16-mixed", callbacks=[Progress()])
        one.fit(module, batches)
        (found,) = one.test(module, noisy, verbose=False)
        print(f"of the noisy images held out {found['read']:.0%} are read right")


if __name__ == "__main__":
    main()
