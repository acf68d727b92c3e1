# pip install -c constraints.txt ".[examples]" && python examples/plain_loop.py
"""A plain loop with autocast, `GradScaler`, accumulation, clipping: digits, read by an encoder that hides the domain.

Labels are known of clean images alone. One head learns to tell clean images from noisy ones, and the encoder learns to
leave it nothing to go by, so that the other head can read both.
"""

from __future__ import annotations

try:
    import torch
    import torch.nn.functional as F
    from torch import nn

    import funcfreeze as ff
    from funcfreeze.demos.digits import batches, two_domains
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is missing: pip install -c constraints.txt ".[examples]"') from None

STEPS, ACCUMULATED = 400, 2
ROUTES = {
    "digit": ["encoder", "digit"],
    # the encoder moves against the loss, the more the longer it goes: no gradient reversal layer
    "domain": {"domain": 1.0, "encoder": -0.3 * ff.optim.dann_schedule(STEPS)},
}


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        # bounded features: with ReLU ones the encoder escapes the domain head by growing them
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.Tanh())
        self.digit = nn.Linear(32, 10)
        self.domain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, pixels):
        return self.digit(self.encoder(pixels))


def losses(model, batch):
    clean, labels, noisy = batch
    code = model.encoder(torch.cat([clean, noisy]))
    is_noisy = (torch.arange(len(code)) >= len(clean)).long()
    return {
        "digit": F.cross_entropy(model.digit(code[: len(clean)]), labels),
        "domain": F.cross_entropy(model.domain(code), is_noisy),
    }


def train(model, batches, half=True):
    plan = ff.plan(model, ROUTES)
    print(plan)
    readers = [*model.encoder.parameters(), *model.digit.parameters()]
    groups = [{"params": readers, "lr": 2e-3}, {"params": model.domain.parameters(), "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.999))  # little momentum, or two opponents circle each other
    scaler = torch.amp.GradScaler("cpu")
    for number, batch in enumerate(batches, 1):
        with torch.autocast("cpu", torch.float16, enabled=half):
            found = losses(model, batch)
        loss = ff.combine(found, plan, model, step=number // ACCUMULATED)
        scaler.scale(loss / ACCUMULATED).backward()
        if number % ACCUMULATED == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if number % 200 == 0:
            print(f"batch {number}: " + ", ".join(f"{name} {value.item():.3f}" for name, value in found.items()))


def main():
    torch.set_num_threads(1)  # small networks are quicker on one
    torch.manual_seed(0)
    digits = two_domains(seed=0)
    model = Reader()
    train(model, batches(digits, seed=0, steps=STEPS * ACCUMULATED, size=32))
    for name, images in ("clean", digits.source_test), ("noisy", digits.target_test):
        right = model(images.pixels).argmax(1) == images.labels
        print(f"of {len(images)} {name} images held out, {right.float().mean():.0%} are read right")


if __name__ == "__main__":
    main()
