"""Digits classified by an encoder that hides a nuisance domain: the adversarial loss may update the encoder only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import funcfreeze as ff
from funcfreeze.demos.digits import Batch, Domains, Drawn, Images, batches, two_domains
from funcfreeze.demos.probe import domain_probe
from funcfreeze.demos.threads import one_thread
from funcfreeze.proof.report import Report

Modules = dict[str, nn.Module]


@dataclass(frozen=True)
class Settings:
    """What both runs have in common.

    The values were chosen on the seeds 100 to 104; the demo reports the seeds from 0 on.

    Attributes:
        steps: how many steps to train.
        batch: images of each domain in a batch.
        rate: Adam's learning rate.
        domain_rate: that of the domain head, which must keep up with the encoder.
        beta1: Adam's first momentum; a low one keeps two opponents from circling each other.
        points: how often to measure on the way.
    """

    steps: int = 800
    batch: int = 64
    rate: float = 1e-3
    domain_rate: float = 5e-3
    beta1: float = 0.5
    points: int = 8


WEIGHTS: Mapping[str, float] = {"baseline": 0.0, "adversarial": 0.3}
"""The adversarial weight of each run, the only thing in which they differ."""


@dataclass(frozen=True)
class Point:
    """What was measured on held-out images after some steps.

    Attributes:
        step: how many steps.
        source_accuracy: share of the clean images classified right.
        target_accuracy: share of the noisy images classified right.
        domain_probe: how often a fresh linear probe tells the domain from the features; 0.5 is chance.
    """

    step: int
    source_accuracy: float
    target_accuracy: float
    domain_probe: float


def make_model(seed: int) -> Modules:
    """Encoder, classifier and domain head with initial values fixed by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            # Bounded features: with ReLU ones the encoder escapes the domain head by growing them.
            "encoder": nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.Tanh()),
            "classifier": nn.Linear(32, 10),
            "domain": nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)),
        }


def losses(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Classify the source images, and tell target from source images."""
    source, label, target = batch
    features = model["encoder"](torch.cat([source, target]))
    is_target = torch.cat([torch.zeros(len(source)), torch.ones(len(target))]).to(features)
    return {
        "class": F.cross_entropy(model["classifier"](features[: len(source)]), label),
        "domain": F.binary_cross_entropy_with_logits(model["domain"](features).squeeze(1), is_target),
    }


def make_routes(weight: float, steps: int) -> dict[str, Any]:
    """Which loss may update what: the domain loss trains its own head, and the encoder against it."""
    return {
        "class": ["encoder", "classifier"],
        "domain": {"domain": 1.0, "encoder": -weight * ff.optim.dann_schedule(steps)},
    }


def make_step(seed: int, weight: float, settings: Settings) -> ff.Step:
    """The training step of one run."""
    betas = (settings.beta1, 0.999)
    optimizer = ff.optim.partition(
        {
            ff.path("encoder") | "classifier": ff.optim.adam(settings.rate, betas=betas),
            "domain": ff.optim.adam(settings.domain_rate, betas=betas),
        }
    )
    return ff.Step(make_model(seed), losses, make_routes(weight, settings.steps), optimizer=optimizer)


def verify_step(seed: int, settings: Settings) -> Report:
    """Compare the adversarial run's step with the recipe, on a batch of its own data.

    From the middle of the training on, since the adversarial weight is 0 at its start.
    """
    step = make_step(seed, WEIGHTS["adversarial"], settings)
    state = step.init().replace(step=torch.tensor(settings.steps // 2))
    (batch,) = batches(two_domains(seed), seed, 1, settings.batch)
    with one_thread():
        return ff.verify(step, state, batch)


class Stopped(Exception):
    """A signal ended the training between two steps."""


@dataclass(frozen=True)
class Watching:
    """A logger that tells of the losses.

    Attributes:
        watch: called with the number of steps taken and the losses.
    """

    watch: Callable[[int, Mapping[str, float]], None]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell."""
        self.watch(step, {name: metrics[name] for name in ("class", "domain")})


def train(
    seed: int,
    weight: float,
    settings: Settings,
    watch: Callable[[int, Mapping[str, float]], None],
    folder: Path | None = None,
) -> tuple[Point, ...]:
    """Train once, and measure on the way.

    Args:
        seed: of the split, the noise, the initial values and the order of the batches.
        weight: the adversarial weight.
        settings: everything else.
        watch: called after every step with the number of steps taken and their losses.
        folder: for checkpoints; what is there goes on.

    Returns:
        What was measured; the last point is the outcome.

    Raises:
        Stopped: by Ctrl-C or SIGTERM; with a folder nothing is lost.
    """
    domains = two_domains(seed)
    step, data = make_step(seed, weight, settings), Drawn(domains, seed, settings.steps, settings.batch)
    state, extra = (step.init(), {}) if folder is None else ff.checkpoint.resume(folder, step, data=data)
    points: list[dict[str, Any]] = extra.setdefault("points", [])  # each checkpoint holds those that there are then
    every = max(1, settings.steps // settings.points)

    def evaluate(model: Any) -> dict[str, float]:
        done = min((len(points) + 1) * every, settings.steps)
        points.append(asdict(measure(model, domains, done, seed)))
        return {"target_accuracy": points[-1]["target_accuracy"]}

    _, fitted = ff.fit(
        step,
        state,
        data,
        steps=settings.steps,
        evaluate=evaluate,
        evaluate_every=every,
        best="max",
        folder=folder,
        save_every=every,
        extra=extra,
        log=Watching(watch),
        show_every=1,
        show=False,
    )
    if fitted.reason != "steps":
        raise Stopped(fitted.reason)
    return tuple(Point(**point) for point in points)


def measure(model: Any, domains: Domains, step: int, seed: int) -> Point:
    """Accuracies and the domain probe on the held-out images."""
    source, target = domains.source_test, domains.target_test
    features = model["encoder"](source.pixels), model["encoder"](target.pixels)
    return Point(
        step=step,
        source_accuracy=_accuracy(model["classifier"](features[0]), source),
        target_accuracy=_accuracy(model["classifier"](features[1]), target),
        domain_probe=domain_probe(*features, seed=seed),
    )


def _accuracy(logits: Tensor, images: Images) -> float:
    return (logits.argmax(1) == images.labels).double().mean().item()
