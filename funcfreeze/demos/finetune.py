"""Fine-tuning over a frozen body: a network that knows the digits 0 to 4 gets a new head for 5 to 9.

No route mentions the body, and that is all it takes: its weight gradients are not computed, and its parameters come out
bit-identical. For comparison the same is done with a route to the body as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import funcfreeze as ff
from funcfreeze.demos.digits import Images, all_digits, only
from funcfreeze.demos.threads import one_thread

Batch = tuple[Tensor, Tensor]
"""Images and labels."""

Watching = Callable[[int, Mapping[str, Tensor]], None]
"""`watch(step, losses)`, called after every step."""

Watch = Callable[[int, str, int, Mapping[str, Tensor]], None]
"""The same with seed and way in front: `watch(seed, way, step, losses)`."""

OLD, NEW = range(5), range(5, 10)
BATCH = 64

PRETRAIN_RATE, FINETUNE_RATE = 1e-3, 1e-2
"""Learning rates, chosen on the seeds 100 to 102; the demo reports the seeds from 0 on."""

PRETRAINING = "pretraining"

ROUTES: Mapping[str, Mapping[str, list[str]]] = {
    "new head only": {"new": ["new_head"]},
    "everything": {"new": ["new_head", "body"]},
}


@dataclass(frozen=True, eq=False)
class Digits:
    """The digits 0 to 4 and 5 to 9, each to train on and held out."""

    old: Images
    new: Images
    old_test: Images
    new_test: Images


@dataclass(frozen=True)
class Outcome:
    """What a way of fine-tuning did.

    Attributes:
        old_accuracy: share of the held-out digits 0 to 4 that body and old head classify right, before and after.
        new_accuracy: share of the held-out digits 5 to 9 that body and new head classify right, before and after.
        changes: module -> the largest change of one of its parameters; 0.0 only if all are bit-identical.
        forward: floating-point operations of a step's forward.
        backward: floating-point operations of its backward.
    """

    old_accuracy: tuple[float, float]
    new_accuracy: tuple[float, float]
    changes: dict[str, float]
    forward: int
    backward: int


def make_model(seed: int) -> dict[str, nn.Module]:
    """A body and two heads, with initial values fixed by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            "body": nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
            "old_head": nn.Linear(256, len(OLD)),
            "new_head": nn.Linear(256, len(NEW)),
        }


def old_losses(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Classify the digits 0 to 4."""
    pixels, labels = batch
    return {"old": F.cross_entropy(model["old_head"](model["body"](pixels)), labels - OLD.start)}


def new_losses(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Classify the digits 5 to 9."""
    pixels, labels = batch
    return {"new": F.cross_entropy(model["new_head"](model["body"](pixels)), labels - NEW.start)}


def split(seed: int) -> Digits:
    """The digits shuffled by the seed, a third of them held out."""
    digits = all_digits()
    shuffled = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))]
    held_out = len(digits) // 3
    train, test = shuffled[held_out:], shuffled[:held_out]
    return Digits(only(train, OLD), only(train, NEW), only(test, OLD), only(test, NEW))


def run(seeds: Sequence[int], steps: int, watch: Watch) -> dict[str, list[Outcome]]:
    """Pretrain for every seed, and fine-tune the same network in every way. Way -> an outcome for each seed."""
    found: dict[str, list[Outcome]] = {way: [] for way in ROUTES}
    with one_thread():
        for seed in seeds:
            model = pretrain(seed, steps, partial(watch, seed, PRETRAINING))
            for way, routes in ROUTES.items():
                found[way].append(finetune(model, routes, seed, steps, partial(watch, seed, way)))
    return found


def pretrain(seed: int, steps: int, watch: Watching) -> dict[str, nn.Module]:
    """A network whose body and old head were trained on the digits 0 to 4."""
    model = make_model(seed)
    step = ff.Step(model, old_losses, {"old": ["body", "old_head"]}, optimizer=ff.optim.adam(PRETRAIN_RATE))
    step.export(_trained(step, split(seed).old, seed, steps, watch))
    return model


def make_step(model: Mapping[str, nn.Module], routes: Mapping[str, list[str]]) -> ff.Step:
    """The step of fine-tuning what the routes name."""
    # Weight decay moves whatever reaches the optimizer, also with a gradient of zero: what stays did not reach it.
    return ff.Step(model, new_losses, routes, optimizer=ff.optim.adamw(FINETUNE_RATE, weight_decay=0.01))


def finetune(
    model: Mapping[str, nn.Module], routes: Mapping[str, list[str]], seed: int, steps: int, watch: Watching
) -> Outcome:
    """Train on the digits 5 to 9 what the routes name, and see what that did. The model itself stays as it is."""
    digits = split(seed)
    step = make_step(model, routes)
    before = step.init()
    start = {path: tensor.clone() for path, tensor in before.params.items()}
    old_before, new_before = step.call(before, _accuracies, digits)
    forward, backward = count_operations(step, before, digits.new)
    after = _trained(step, digits.new, seed, steps, watch)
    old_after, new_after = step.call(after, _accuracies, digits)
    return Outcome(
        old_accuracy=(old_before, old_after),
        new_accuracy=(new_before, new_after),
        changes={name: largest_change(name, start, after.params) for name in model},
        forward=forward,
        backward=backward,
    )


def count_operations(step: ff.Step, state: ff.State, images: Images) -> tuple[int, int]:
    """Floating-point operations of a step's forward and of its backward, counted as they are dispatched."""
    batch = images.pixels[:BATCH], images.labels[:BATCH]
    with FlopCounterMode(display=False) as forward:
        step.call(state, step.losses, batch)
    with FlopCounterMode(display=False) as both:
        step.gradients(state, batch)
    return forward.get_total_flops(), both.get_total_flops() - forward.get_total_flops()


def largest_change(module: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The largest change of one of a module's float32 parameters; 0.0 only if all are equal bit for bit.

    >>> largest_change("head", {"head.bias": torch.tensor([0.0])}, {"head.bias": torch.tensor([-0.0])})
    1.401298464324817e-45
    """
    paths = [path for path in before if path.startswith(f"{module}.")]
    if all(torch.equal(before[path].view(torch.int32), after[path].view(torch.int32)) for path in paths):
        return 0.0
    # Equal numbers with different bits, 0.0 and -0.0, count as the smallest change there is.
    smallest = 2.0**-149
    return max(smallest, *((after[path] - before[path]).abs().max().item() for path in paths))


def _trained(step: ff.Step, images: Images, seed: int, steps: int, watch: Watching) -> ff.State:
    state, draw = step.init(), torch.Generator().manual_seed(seed)
    for done in range(1, steps + 1):
        drawn = images[torch.randint(len(images), (BATCH,), generator=draw)]
        state, metrics = step(state, (drawn.pixels, drawn.labels))
        watch(done, metrics)
    return state


def _accuracies(model: Any, digits: Digits) -> tuple[float, float]:
    """On the held-out old digits by the old head, and on the new ones by the new head."""
    old, new = digits.old_test, digits.new_test
    old_logits = model["old_head"](model["body"](old.pixels))
    new_logits = model["new_head"](model["body"](new.pixels))
    return (
        (old_logits.argmax(1) + OLD.start == old.labels).double().mean().item(),
        (new_logits.argmax(1) + NEW.start == new.labels).double().mean().item(),
    )
