"""Ways to train with several losses, one a file, each written as its own users write it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from bench.contender import Build, BuildProgram, Peer
from bench.peers import by_hand, inputs, optax, ours, recipe, torchjd

__all__ = ["OURS", "PEERS", "REFERENCES"]

_GRAPHS = {"mode": "reduce-overhead"}


def _both(build: Build, program: BuildProgram, compile: Any) -> tuple[Build, BuildProgram]:
    """What makes contenders of workloads and of programs, compiled in one way."""
    return partial(build, compile=compile), partial(program, compile=compile)


PEERS: Mapping[str, Peer] = {
    "summed": Peer("one summed loss", by_hand.summed, routed=False),
    "recipe": Peer("recipe", recipe.build),
    "inputs": Peer("backward(inputs=)", inputs.build),
    "torchjd": Peer("TorchJD", torchjd.build, requires=("torchjd",)),
    "by-hand": Peer("by hand", by_hand.build, by_hand.program),
    "by-hand-compiled": Peer("by hand, compiled", *_both(by_hand.build, by_hand.program, {}), compiled=True),
    "by-hand-graphs": Peer(
        "by hand, CUDA graphs",
        *_both(by_hand.build, by_hand.program, _GRAPHS),
        cuda=True,
        compiled=True,
        replayed=True,
    ),
    "jax": Peer("jax + optax", optax.build, requires=("jax", "optax"), compiled=True),
    "funcfreeze": Peer("funcfreeze", *_both(ours.build, ours.program, False)),
    "funcfreeze-compiled": Peer("funcfreeze, compiled", *_both(ours.build, ours.program, True), compiled=True),
    "funcfreeze-graphs": Peer(
        "funcfreeze, CUDA graphs",
        *_both(ours.build, ours.program, _GRAPHS),
        cuda=True,
        compiled=True,
        replayed=True,
    ),
}
"""By the name that `--peers` takes."""

OURS = ("funcfreeze", "funcfreeze-compiled", "funcfreeze-graphs")

REFERENCES = ("recipe", "by-hand")
"""Whose update the others have to make: the first that is written."""
