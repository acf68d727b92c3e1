"""A whole training loop as a workload: with optimizers, turns and targets of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.alternating.alternation import Alternation

Options = Mapping[str, Any]
"""Of `torch.compile`."""


@dataclass(frozen=True)
class Loop:
    """A loop that somebody wrote by hand.

    Attributes:
        body: takes a batch.
        targets: the averaged copies that it keeps, by the names that our program has for them.
    """

    body: Callable[[Any], object]
    targets: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A model, a source of fresh batches, and how it is trained, by hand and by funcfreeze.

    Attributes:
        by_hand: `by_hand(model, compile)` makes the loop: eager with None, and with options of `torch.compile` compiled
            where its users would compile it.
        ours: `ours(model, compile)` makes the step.
        calls: how many calls are one step of the bench, so that all steps do the same where members run by turns.
    """

    name: str
    model: nn.Module
    batch: Callable[[], Any]
    by_hand: Callable[[Any, Options | None], Loop]
    ours: Callable[[Any, bool | Options], ff.Step | Alternation]
    calls: int = 1


def compiled(f: Callable[..., Any], compile: Options | None) -> Callable[..., Any]:
    """The function as it is, or compiled."""
    return f if compile is None else torch.compile(f, **compile)
