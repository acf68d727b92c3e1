"""Random computations with everything that makes a graph awkward: skips both ways, reused weights, several outputs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class NanForZero(torch.autograd.Function):
    """Its backward normalises the cotangent: right for every single loss, NaN if it is run on zeros."""

    sizes: ClassVar[list[float]] = []  # of the cotangents it was run on, for the test to read

    @staticmethod
    def forward(ctx, x):
        return x * 2.0

    @staticmethod
    def backward(ctx, cotangent):
        NanForZero.sizes.append(float(cotangent.abs().sum()))
        return 2.0 * cotangent / (cotangent.abs().sum() / cotangent.abs().sum())

    generate_vmap_rule = True


class Scale(torch.autograd.Function):
    """A linear Function in the style that torch.func accepts."""

    @staticmethod
    def forward(x):
        return x * 3.0

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return 3.0 * cotangent


class NoneForFirst(torch.autograd.Function):
    """Delivers no gradient for its first input."""

    @staticmethod
    def forward(ctx, x, y):
        return torch.tanh(x) + y

    @staticmethod
    def backward(ctx, cotangent):
        return None, cotangent * 2.0


@dataclass(frozen=True)
class RandomGraph:
    """Losses of a random computation over `params`, and random overlapping signed routes."""

    params: dict[str, Tensor]
    losses: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    table: dict[str, dict[str, float]]


def random_graph(seed: int, *, foreign: bool = False, hooks: bool = False) -> RandomGraph:
    """A computation drawn from `seed`; with `foreign` Functions and with `hooks` on its activations if wanted."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    width = rng.choice([2, 4])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5

    count = rng.randint(2, 9)
    params = {f"p{i}": draw(width, width) if rng.random() < 0.7 else draw(width) for i in range(count)}
    steps = []
    for _ in range(rng.randint(3, 18)):
        kinds = ["linear", "add", "mul", "tanh", "split", "cat", "unbind", "norm", "inplace", "self"]
        kinds += ["nan", "scale"] if foreign else []
        kinds += ["none"] if foreign and not hooks else []  # a hook of this kind does not expect None
        steps.append(
            (
                rng.choice(kinds),
                rng.random(),
                rng.random(),
                rng.choice(sorted(params)),
                rng.choice([None, "linear", "clamp", "normalise"]) if hooks and rng.random() < 0.3 else None,
            )
        )
    names = [f"loss{k}" for k in range(rng.randint(1, 5))]
    heads = [
        (rng.random(), rng.random(), rng.choice(sorted(params)), rng.choice(["sum", "param", "loss", "product"]))
        for _ in names
    ]
    x = draw(3, width)
    hook_of = {
        "linear": lambda g: -0.5 * g,
        "clamp": lambda g: g.clamp(-0.1, 0.1),
        "normalise": lambda g: g / (1.0 + g.norm()),
    }

    def weight(p: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
        return h @ p[name] if p[name].ndim == 2 else h * p[name]

    def losses(p: dict[str, Tensor]) -> dict[str, Tensor]:
        values = [weight(p, sorted(p)[0], x)]
        for kind, first, second, name, hook in steps:
            a = values[int(first * len(values))]
            b = values[max(0, len(values) - 1 - int(second * 3))]
            if kind == "linear":
                new = weight(p, name, b)
            elif kind == "add":
                new = a + b
            elif kind == "mul":
                new = torch.tanh(a) * b
            elif kind == "tanh":
                new = torch.tanh(b)
            elif kind == "split":
                left, right = b.chunk(2, dim=1)
                new = torch.cat([right, left], dim=1) + a
            elif kind == "cat":
                new = torch.cat([a, b, b], dim=0)[1:4]
            elif kind == "unbind":
                rows = b.unbind(0)
                new = torch.stack([rows[2], rows[0], rows[0]]) + weight(p, name, a)
            elif kind == "norm":
                # with the usual eps of 1e-5 the gradient of nearly equal numbers amplifies rounding 300-fold
                new = torch.nn.functional.layer_norm(b, (width,), eps=0.1)
            elif kind == "inplace":
                new = b * 1.0
                new[:, 0] = weight(p, name, a)[:, 1]
                new.mul_(0.9)
            elif kind == "self":
                new = b * b * 0.3
            elif kind == "nan":
                new = NanForZero.apply(b)
            elif kind == "none":
                new = NoneForFirst.apply(a, b)
            else:
                new = Scale.apply(b)
            if hook is not None and new.requires_grad:
                new.register_hook(hook_of[hook])
            values.append(torch.tanh(new) if kind in ("self", "add") else new)
        found: dict[str, Tensor] = {}
        for key, (first, second, name, kind) in zip(names, heads, strict=True):
            h = values[len(values) - 1 - int(first * min(4, len(values)))]
            if kind == "param" and p[name].ndim == 1:
                found[key] = p[name].sum() * 1.0
            elif kind == "loss" and found:
                found[key] = sorted(found.items())[0][1] * 0.5 + torch.tanh(weight(p, name, h)).sum()
            elif kind == "product":
                found[key] = (weight(p, name, h) * values[int(second * len(values))]).mean()
            else:
                found[key] = torch.sin(h).sum()
        return found

    # no two of them cancel out: a sum that is exactly zero would be NaN after NanForZero, and no loss alone
    levels = [1.0, 1.0, 1.0, -0.1, 0.5, -0.37, 2.0]
    table: dict[str, dict[str, float]] = {}
    for key in names:
        chosen = [path for path in params if rng.random() < rng.choice([0.3, 0.6, 1.0])] or [rng.choice(sorted(params))]
        common = rng.choice(levels)
        table[key] = {path: common if rng.random() < 0.7 else rng.choice(levels) for path in chosen}
    routed = {path for row in table.values() for path in row}
    leaves = {path: param.clone().requires_grad_(path in routed) for path, param in params.items()}
    for key, loss in losses(leaves).items():
        if not loss.requires_grad:  # it hangs on parameters alone that no loss may update, which is an error
            table[key] = dict.fromkeys(params, rng.choice(levels))
    return RandomGraph(params, losses, table)
