"""Programs with timed routes, and the loop that people write for them: `requires_grad` toggled by the step's number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff

COMPILED = {"backend": "aot_eager"}

OPTIMIZERS = {
    "sgd": (
        ff.optim.sgd(0.1, momentum=0.9, weight_decay=0.1),
        lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.1),
    ),
    "adam": (ff.optim.adam(0.05, weight_decay=0.1), lambda ps: torch.optim.Adam(ps, 0.05, weight_decay=0.1)),
    "adamw": (ff.optim.adamw(0.05, weight_decay=0.1), lambda ps: torch.optim.AdamW(ps, 0.05, weight_decay=0.1)),
}


@dataclass(frozen=True)
class Program:
    """A model with timed routes, and what is active when in words of its own.

    Attributes:
        model: makes it.
        losses: of it.
        routes: as funcfreeze takes them.
        active: a count -> what people write in an `if`: (loss, names of modules, weight) of everything active then.
        active_sets: how many different ones there are in `steps` steps.
        resets: a count -> the names of modules whose optimizer state people delete there.
        steps: how many steps show all of it.
    """

    model: Callable[[], nn.Module]
    losses: Callable[[Any, Any], Any]
    routes: Any
    active: Callable[[int], Sequence[tuple[str, str, float]]]
    active_sets: int
    resets: Mapping[int, Sequence[str]] = field(default_factory=dict)
    steps: int = 10


def batches(number: int) -> list[torch.Tensor]:
    return [torch.randn(6, 4) for _ in range(number)]


def network():
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3)),
            "cls": nn.Linear(5, 3),
            "dom": nn.Linear(5, 2),
        }
    )


def adversarial(model, batch):
    h = model["encoder"](batch)
    label = torch.arange(len(batch))
    return {"cls": F.cross_entropy(model["cls"](h), label % 3), "dom": F.cross_entropy(model["dom"](h), label % 2)}


class Four(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(3)
        )
        self.head = nn.Linear(4, 2)


def unfrozen(model, batch):
    return {"cls": (model.head(model.c(model.b(model.a(batch)))) - 1).square().mean()}


def gan():
    return nn.ModuleDict({"gen": nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "disc": nn.Linear(4, 1)})


def gan_losses(model, batch):
    fake = model["gen"](batch)
    real = batch.square()
    return {
        "match": (fake - real).square().mean(),
        "fool": F.softplus(-model["disc"](fake)).mean(),
        "real": F.softplus(-model["disc"](real)).mean(),  # hangs on the discriminator alone
        "fake": F.softplus(model["disc"](fake)).mean(),
    }


def _adversarial_active(count):
    found = [("cls", "cls", 1.0)]
    if count >= 2:
        found.append(("cls", "encoder", 1.0))
    if count % 2 == 1:
        found.append(("dom", "dom", 1.0))
    if 4 <= count < 7:
        found.append(("dom", "encoder", -0.1))
    return found


def _overlapping_active(count):
    found = [("cls", "encoder", 1.0)] if count < 3 else []
    if count in (2, 5, 8):
        found.append(("cls", "encoder", 0.5))
    return found


def _gan_active(count):
    found = [("match", "gen", 1.0)]
    if count >= 3:
        found += [("real", "disc", 1.0), ("fake", "disc", 1.0)]
    if count >= 5:
        found.append(("fool", "gen", 0.5))
    return found


PROGRAMS = {
    "all at once": Program(
        network,
        adversarial,
        {
            "cls": [ff.Route("cls"), ff.Route("encoder", start=2)],
            "dom": [ff.Route("dom", start=1, every=2), ff.Route("encoder", weight=-0.1, start=4, stop=7)],
        },
        _adversarial_active,
        6,
    ),
    "overlapping": Program(
        network,
        adversarial,
        {
            "cls": [ff.Route("encoder", stop=3), ff.Route("encoder", weight=0.5, start=2, every=3)],
            "dom": ff.Route("dom", start=100),
        },
        _overlapping_active,
        4,
    ),
    "gradual unfreezing": Program(
        Four,
        unfrozen,
        {
            "cls": [
                ff.Route("head"),
                ff.Route("c", start=2),
                ff.Route("b", start=4),
                ff.Route("a", start=6),
            ]
        },
        lambda count: [("cls", name, 1.0) for name, at in (("head", 0), ("c", 2), ("b", 4), ("a", 6)) if count >= at],
        4,
    ),
    "linear probe, then all afresh": Program(
        network,
        lambda model, batch: {"cls": adversarial(model, batch)["cls"]},
        {"cls": [ff.Route("cls"), ff.Route("encoder", start=4, reset=True)]},
        lambda count: [("cls", "cls", 1.0)] + [("cls", "encoder", 1.0)] * (count >= 4),
        2,
    ),
    "a body that rests and starts afresh": Program(
        network,
        lambda model, batch: {"cls": adversarial(model, batch)["cls"]},
        {
            "cls": [
                ff.Route("cls"),
                ff.Route("encoder", stop=2),
                ff.Route("encoder", start=5, every=3, reset=True),
            ]
        },
        lambda count: [("cls", "cls", 1.0)] + [("cls", "encoder", 1.0)] * (count < 2 or count in (5, 8)),
        2,
        {5: ["encoder"], 8: ["encoder"]},
    ),
    "a discriminator that starts late": Program(
        gan,
        gan_losses,
        {
            "match": "gen",
            "fool": ff.Route("gen", weight=0.5, start=5),
            "real": ff.Route("disc", start=3),
            "fake": ff.Route("disc", start=3),
        },
        _gan_active,
        3,
    ),
}


def by_hand(
    program: Program,
    model: nn.Module,
    given: Sequence[Any],
    build: Callable[[Any], torch.optim.Optimizer],
    first: int = 0,
) -> tuple[nn.Module, list[dict[str, float]], torch.optim.Optimizer]:
    """The loop in plain PyTorch, on a copy of the model."""
    model = copy.deepcopy(model)
    optimizer = build(model.parameters())
    seen = []
    for count, batch in enumerate(given, first):
        torch.manual_seed(count)
        active = program.active(count)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(any(path.split(".")[0] == name for _, name, _ in active))
            if any(path.split(".")[0] == name for name in program.resets.get(count, ())):
                optimizer.state.pop(parameter, None)
        optimizer.zero_grad(set_to_none=True)
        found = program.losses(model, batch)
        for loss, name, weight in active:
            allowed = [p for path, p in model.named_parameters() if path.split(".")[0] == name]
            (weight * found[loss]).backward(retain_graph=True, inputs=allowed)
        optimizer.step()
        seen.append({name: value.item() for name, value in found.items()})
    return model, seen, optimizer


def run(
    step: ff.Step, state: ff.State, given: Sequence[Any], first: int = 0
) -> tuple[ff.State, list[dict[str, float]]]:
    """The same steps by funcfreeze."""
    seen = []
    for count, batch in enumerate(given, first):
        torch.manual_seed(count)
        state, metrics = step(state, batch)
        seen.append({name: float(value) for name, value in metrics.items()})
    return state, seen


def assert_moved_alike(start: nn.Module, state: ff.State, wanted: nn.Module, tolerance: float = 1e-10) -> None:
    """Displacements from the start, and buffers."""
    before = dict(start.named_parameters())
    for path, parameter in wanted.named_parameters():
        mine, theirs = state.params[path] - before[path].detach(), parameter.detach() - before[path].detach()
        assert (mine - theirs).abs().max() <= tolerance, path
    for path, buffer in wanted.named_buffers():
        assert torch.allclose(state.buffers[path], buffer, rtol=0, atol=tolerance), path
