# pip install -c constraints.txt ".[examples]" && python examples/accelerate_loop.py
"""accelerate, with accumulation, clipping and bfloat16: an adversarial autoencoder draws digits out of noise.

A critic learns to tell codes of images from numbers drawn from a normal distribution. The encoder learns to fool it,
and the decoder to draw images from their codes: in the end it draws some from random numbers. Three losses, each of
which moves other parts of one model, in one backward pass. (All move at once; by turns would be two optimizers' work.)
"""

from __future__ import annotations

try:
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from torch import nn
    from torch.utils.data import DataLoader

    import funcfreeze as ff
    from funcfreeze.demos.digits import all_digits
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is missing: pip install -c constraints.txt ".[examples]"') from None

EPOCHS, SIZE = 20, 4
ROUTES = {
    "drawing": ["encoder", "decoder"],
    "critic": "critic",
    "fooling": {"encoder": 0.02},  # through the critic, which stays as it is
}


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, SIZE))
        self.decoder = nn.Sequential(nn.Linear(SIZE, 128), nn.ReLU(), nn.Linear(128, 64))
        self.critic = nn.Sequential(nn.Linear(SIZE, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, pixels, noise):
        """The losses. They belong into the call of the prepared model: accelerate's autocast is around that."""
        code = self.encoder(pixels)
        on_code, on_noise = self.critic(code), self.critic(noise)
        no, yes = torch.zeros_like(on_code), torch.ones_like(on_code)
        return {
            "drawing": F.mse_loss(self.decoder(code), pixels),
            "critic": F.binary_cross_entropy_with_logits(on_noise, yes)
            + F.binary_cross_entropy_with_logits(on_code, no),
            "fooling": F.binary_cross_entropy_with_logits(on_code, yes),
        }


def train(model, batches, accelerator, epochs=EPOCHS):
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, betas=(0.5, 0.999))
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    plan = ff.plan(model, ROUTES)
    accelerator.print(plan)
    for epoch in range(1, epochs + 1):
        for pixels in batches:
            with accelerator.accumulate(model):
                found = model(pixels, torch.randn(len(pixels), SIZE).to(pixels))
                accelerator.backward(ff.combine(found, plan, model))  # divided as a plain loss is
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        if epoch % 5 == 0:
            accelerator.print(f"epoch {epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))


def shown(image):
    return ["".join(" .:*#"[min(4, int(5 * value))] for value in row) for row in image.clamp(0, 1).view(8, 8)]


def main():
    torch.set_num_threads(1)  # small networks are quicker on one
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    batches = DataLoader(all_digits().pixels, batch_size=32, shuffle=True, drop_last=True)
    model = Autoencoder()
    train(model, batches, accelerator)
    with torch.no_grad():
        code = model.encoder(all_digits().pixels).float()
        drawn = model.decoder(torch.randn(6, SIZE)).float()
    accelerator.print(f"mean of the codes {code.mean():.2f}, deviation {code.std():.2f}; drawn from random numbers:")
    for rows in zip(*map(shown, drawn), strict=True):
        accelerator.print("  ".join(rows))


if __name__ == "__main__":
    main()
