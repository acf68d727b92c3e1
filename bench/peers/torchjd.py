"""TorchJD: `mtl_backward` keeps one gradient of the shared parameters per loss, `jac_to_grad` adds them up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.contender import Absent, Contender, Phase, adam, batches_on, model_on, phases, waiter
from bench.workloads.workload import Workload


def build(workload: Workload, device: torch.device) -> Contender | Absent:
    """Heads by `mtl_backward`, the trunk by one weight a loss, where the routes say no more than that."""
    split = workload.multitask
    if isinstance(split, str):
        return Absent("not written" if split.startswith("not written") else "cannot express", split)
    from torchjd.aggregation import Aggregator, Constant, Sum
    from torchjd.autojac import jac_to_grad, mtl_backward

    model, batches = model_on(workload, device), batches_on(workload, device)
    optimizer = adam(model, workload.rates)
    turns = phases(workload)
    named = dict(model.named_parameters())
    shared = {path: p for path, p in named.items() if path.startswith(f"{split.shared}.")}
    weights = _shared_weights(turns, set(shared))
    if weights is None:
        return Absent("cannot express", "a loss has several weights in the trunk, or one that is not 1 in its head")
    names = list(weights)
    heads = [[named[path] for path in sorted(_head(turns, loss, set(shared)))] for loss in names]
    # Heads that two losses go through, as an adversary's, are walked twice.
    twice = len({p for head in heads for p in head}) < sum(map(len, heads)) or not all(heads)
    values = list(weights.values())
    plain = all(value == 1.0 for value in values)
    first = next(iter(named.values()))
    aggregator: Aggregator = Sum() if plain else Constant(torch.tensor(values, dtype=first.dtype, device=device))

    def run() -> None:
        optimizer.zero_grad()
        batch = next(batches)
        h = split.features(model, batch)
        losses = split.losses(model, h, batch)
        mtl_backward(
            [losses[name] for name in names],
            features=h,
            tasks_params=heads,
            shared_params=list(shared.values()),
            retain_graph=twice,
        )
        jac_to_grad(shared.values(), aggregator)
        optimizer.step()

    return Contender(run, waiter(device), lambda: dict(model.named_parameters()))


def _shared_weights(turns: Sequence[Phase], shared: set[str]) -> dict[str, float] | None:
    """The weight of every loss in the trunk, or None where one weight a loss does not say it."""
    weights: dict[str, float] = {}
    for phase in turns:
        inside = phase.paths & shared
        if inside and (inside != shared or phase.loss in weights):
            return None
        if phase.paths - shared and phase.weight != 1.0:
            return None
        if inside:
            weights[phase.loss] = phase.weight
    return {phase.loss: weights.get(phase.loss, 0.0) for phase in turns}


def _head(turns: Sequence[Phase], loss: str, shared: set[str]) -> set[str]:
    return {path for phase in turns if phase.loss == loss for path in phase.paths - shared}
