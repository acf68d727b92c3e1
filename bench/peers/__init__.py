"""Ways to train with several losses, one a file, each written as its own users write it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from bench.contender import Build, BuildProgram, Peer
from bench.peers import by_hand, inputs, meetings_by_hand, optax, ours, recipe, torchjd, torchjd_meetings

__all__ = ["DEFAULTS", "OURS", "PEERS", "REFERENCES"]

_GRAPHS = {"mode": "reduce-overhead"}


def _both(build: Build, program: BuildProgram, compile: Any) -> tuple[Build, BuildProgram]:
    """What makes contenders of workloads and of programs, compiled in one way."""
    return partial(build, compile=compile), partial(program, compile=compile)


def _ours(compile: Any) -> tuple[Build, BuildProgram, Build]:
    """The same of ours, where a rule is one more argument."""
    build, program = _both(ours.build, ours.program, compile)
    return build, program, build


PEERS: Mapping[str, Peer] = {
    "summed": Peer("one summed loss", by_hand.summed, meeting=by_hand.summed, routed=False),
    "recipe": Peer("recipe", recipe.build),
    "inputs": Peer("backward(inputs=)", inputs.build),
    "torchjd": Peer("TorchJD", torchjd.build, meeting=torchjd_meetings.build, requires=("torchjd",)),
    "torchjd-in-turn": Peer(
        "TorchJD, in turn", None, meeting=partial(torchjd_meetings.build, chunk=1), requires=("torchjd",)
    ),
    "torchjd-gramian": Peer("TorchJD, Gramian", None, meeting=torchjd_meetings.gramian, requires=("torchjd",)),
    "by-hand": Peer("by hand", by_hand.build, by_hand.program, meetings_by_hand.build),
    "by-hand-compiled": Peer("by hand, compiled", *_both(by_hand.build, by_hand.program, {}), compiled=True),
    "by-hand-graphs": Peer(
        "by hand, CUDA graphs",
        *_both(by_hand.build, by_hand.program, _GRAPHS),
        cuda=True,
        compiled=True,
        replayed=True,
    ),
    "jax": Peer("jax + optax", optax.build, requires=("jax", "optax"), compiled=True),
    "funcfreeze": Peer("funcfreeze", *_ours(False)),
    "funcfreeze-compiled": Peer("funcfreeze, compiled", *_ours(True), compiled=True),
    "funcfreeze-graphs": Peer(
        "funcfreeze, CUDA graphs",
        *_ours(_GRAPHS),
        cuda=True,
        compiled=True,
        replayed=True,
    ),
}
"""By the name that `--peers` takes."""

DEFAULTS = tuple(name for name, peer in PEERS.items() if peer.builder is not None)
"""Whom a run has that names no peers: not those that are there for merge rules alone."""

OURS = ("funcfreeze", "funcfreeze-compiled", "funcfreeze-graphs")

REFERENCES: Mapping[str, str] = {"recipe": "the recipe", "by-hand": "the loop by hand", "torchjd": "TorchJD"}
"""Whose update the others have to make, as sentences call them: the first that is written and draws no numbers."""
