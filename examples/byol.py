# pip install -c constraints.txt ".[examples]" && python examples/byol.py
"""BYOL: an encoder of digits learns from pairs of views, without a label, beside a teacher that averages it.

A predictor guesses what the teacher makes of the other view. How much was learned is what a linear classifier reads
from the features after it has seen fifty labels.
"""

from __future__ import annotations

try:
    import torch
    import torch.nn.functional as F
    from sklearn.linear_model import LogisticRegression
    from torch import nn

    import funcfreeze as ff
    from funcfreeze.demos.digits import two_domains
except ModuleNotFoundError as error:
    raise SystemExit(f'{error.name} is missing: pip install -c constraints.txt ".[examples]"') from None

STEPS, LABELS = 400, 50


def wide(inside, hidden, outside):
    return nn.Sequential(nn.Linear(inside, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outside))


def networks():
    online = nn.Sequential(wide(64, 256, 64), wide(64, 256, 32))  # an encoder, and a projector
    return nn.ModuleDict({"online": online, "predictor": wide(32, 128, 32)})


def losses(model, views, *, targets):
    def apart(seen, other):
        guess = model["predictor"](model["online"](seen))
        return 1 - F.cosine_similarity(guess, targets["teacher"](other)).mean()

    one, two = views
    return {"byol": apart(one, two) + apart(two, one)}


def step_of(model):
    return ff.Step(
        model,
        losses,
        {"byol": "*"},
        optimizer=ff.optim.adamw(
            {"online": 2e-3, "predictor": 4e-3},
            weight_decay={ff.where(lambda path, p: p.ndim > 1): 1e-2},  # of matrices alone
        ),
        targets={"teacher": ff.ema("online", ff.schedules.cosine(0.98, 1.0, STEPS))},
    )


def view(images):
    """Turned, scaled, shifted, and with noise."""
    turn, scale, *shift = (torch.rand(4, len(images)) - 0.5) * torch.tensor([0.6, 0.4, 0.5, 0.5])[:, None]
    sine, cosine = (1 + scale) * turn.sin(), (1 + scale) * turn.cos()
    affine = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, (len(images), 1, 8, 8), align_corners=False)
    moved = F.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)
    return moved + 0.1 * torch.randn_like(moved)


def read_right(model, digits):
    """How many digits held out a linear classifier reads from the encoder's features."""
    encoder = model["online"][0].eval()
    with torch.no_grad():
        seen, held_out = (encoder(images.pixels) for images in (digits.source[:LABELS], digits.source_test))
    encoder.train()
    classifier = LogisticRegression(max_iter=2000).fit(seen, digits.source.labels[:LABELS])
    return classifier.score(held_out, digits.source_test.labels)


def train(model, images, steps=STEPS, size=128):
    step = step_of(model)
    print(step.plan)
    state = step.init()
    for number in range(1, steps + 1):
        chosen = images[torch.randint(len(images), (size,))]
        state, metrics = step(state, (view(chosen), view(chosen)))
        if number % 100 == 0:
            print(f"step {number}: {metrics['byol']:.3f}")
    return step.export(state)


def main():
    torch.set_num_threads(1)  # small networks are quicker on one
    torch.manual_seed(0)
    digits = two_domains(seed=0)
    model = networks()
    before = read_right(model, digits)
    after = read_right(train(model, digits.source.pixels), digits)
    print(f"{LABELS} labels: {before:.0%} of the digits held out are read right before, {after:.0%} after")


if __name__ == "__main__":
    main()
