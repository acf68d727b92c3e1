"""TorchJD's own rules: `mtl_backward` for the matrix of gradients, `jac_to_grad` with the aggregator of that name."""

from __future__ import annotations

from typing import Any

import torch

from bench.contender import Absent, Contender
from bench.peers.parts import parts
from bench.workloads.merge import RADIUS, Merge
from bench.workloads.workload import Workload

NAMES = {
    "sum": "Sum",
    "mean": "Mean",
    "pcgrad": "PCGrad",
    "mgda": "MGDA",
    "imtl-g": "IMTLG",
    "cagrad": "CAGrad",
    "aligned-mtl": "AlignedMTL",
    "graddrop": "GradDrop",
    "upgrad": "UPGrad",
}
"""What TorchJD calls the rules."""


def build(workload: Workload, device: torch.device, *, chunk: int | None = None) -> Contender | Absent:
    """As TorchJD's documentation writes it; with `chunk=1` the losses' gradients are taken in turn, not by vmap."""
    from torchjd.autojac import jac_to_grad, mtl_backward

    made = parts(workload, device)
    if made.merge.at != "parameters":
        return Absent("cannot express", "mtl_backward has no rules on activations")
    aggregator = _made(made.merge)
    if isinstance(aggregator, Absent):
        return aggregator

    def run() -> None:
        h, losses = made.forward()
        mtl_backward(
            losses,
            features=h,
            tasks_params=made.heads,
            shared_params=made.shared,
            parallel_chunk_size=chunk,
        )
        jac_to_grad(made.shared, aggregator)
        made.optimizer.step()

    return made.contender(run, draws=draws(made.merge, len(made.heads)))


def gramian(workload: Workload, device: torch.device) -> Contender | Absent:
    """Autogram: the Gramian without the matrix, then a backward of the weighted losses.

    Its documentation goes on with `losses.backward(weights)`, which weighs the heads' gradients as well. Here the heads
    get their own plain gradients, as everybody's do, by a backward that ends in them. The losses are means over the
    batch, so that `batch_dim` is None; the engine takes BatchNorm then.
    """
    from torchjd.autogram import Engine

    made = parts(workload, device)
    if made.merge.at != "parameters":
        return Absent("cannot express", "an engine tells the Gramian of parameters' gradients")
    weighting = _made(made.merge, "Weighting")
    if isinstance(weighting, Absent):
        return weighting
    engine = Engine(made.model.get_submodule(made.split.shared), batch_dim=None)
    heads = [p for head in made.heads for p in head]

    def run() -> None:
        losses = torch.stack(made.forward()[1])
        weights = weighting(engine.compute_gramian(losses))
        torch.autograd.backward(losses.sum(), inputs=heads, retain_graph=True)
        torch.autograd.backward(losses, weights, inputs=made.shared)
        made.optimizer.step()

    return made.contender(run, draws=draws(made.merge, len(made.heads)))


def draws(merge: Merge, losses: int) -> bool:
    """Whether TorchJD's rule draws numbers: PCGrad always draws its order, which with two losses is no choice."""
    return merge.rule == "graddrop" or (merge.rule == "pcgrad" and losses > 2)


def _made(merge: Merge, kind: str = "") -> Any:
    """An aggregator, or a weighting of the Gramian; absent if TorchJD has none or what it needs is not installed."""
    import torchjd.aggregation

    name = f"{NAMES[merge.rule]}{kind}"
    if name not in torchjd.aggregation.__all__:
        return Absent("cannot express", f"{NAMES[merge.rule]} is no weighting of the Gramian")
    options = {"c": RADIUS} if merge.rule == "cagrad" else {}
    try:
        return getattr(torchjd.aggregation, name)(**options)
    except ImportError as problem:
        return Absent("not installed", str(problem))
