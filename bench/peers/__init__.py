"""Ways to train with several losses, one a file, each written as its own users write it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from bench.contender import Peer
from bench.peers import by_hand, inputs, optax, ours, recipe, torchjd

__all__ = ["OURS", "PEERS"]

_GRAPHS = {"mode": "reduce-overhead"}

PEERS: Mapping[str, Peer] = {
    "summed": Peer("one summed loss", by_hand.summed, routed=False),
    "recipe": Peer("recipe", recipe.build),
    "inputs": Peer("backward(inputs=)", inputs.build),
    "torchjd": Peer("TorchJD", torchjd.build, requires=("torchjd",)),
    "by-hand": Peer("by hand", by_hand.build),
    "by-hand-compiled": Peer("by hand, compiled", partial(by_hand.build, compile={}), compiled=True),
    "by-hand-graphs": Peer(
        "by hand, CUDA graphs", partial(by_hand.build, compile=_GRAPHS), cuda=True, compiled=True, replayed=True
    ),
    "jax": Peer("jax + optax", optax.build, requires=("jax", "optax"), compiled=True),
    "funcfreeze": Peer("funcfreeze", partial(ours.build, compile=False)),
    "funcfreeze-compiled": Peer("funcfreeze, compiled", partial(ours.build, compile=True), compiled=True),
    "funcfreeze-graphs": Peer(
        "funcfreeze, CUDA graphs", partial(ours.build, compile=_GRAPHS), cuda=True, compiled=True, replayed=True
    ),
}
"""By the name that `--peers` takes."""

OURS = ("funcfreeze", "funcfreeze-compiled", "funcfreeze-graphs")
