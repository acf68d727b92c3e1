"""Merge rules by hand: `torch.autograd.grad` of one loss after the other, flattened to a matrix; the rule on that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.contender import Absent, Contender
from bench.peers.parts import Parts, parts
from bench.peers.rules_by_hand import COMBINED, Combine
from bench.workloads.workload import Workload


def build(workload: Workload, device: torch.device) -> Contender | Absent:
    """As the papers' own programs do it. Heads get their own plain gradients, which is what routes say."""
    made = parts(workload, device)
    combine = COMBINED.get(made.merge.rule)
    if combine is None:
        return Absent("not written", "its authors' own program is TorchJD")
    merge = _on_parameters if made.merge.at == "parameters" else _on_activations

    def run() -> None:
        merge(made, combine, *made.forward())
        made.optimizer.step()

    return made.contender(run, draws=made.merge.rule == "graddrop")


def _on_parameters(made: Parts, combine: Combine, h: Tensor, losses: Sequence[Tensor]) -> None:
    """The trunk is walked once for every loss."""
    merged = combine(_rows(losses, made.shared, made.heads))
    gradients = torch.split(merged, [p.numel() for p in made.shared])
    for p, gradient in zip(made.shared, gradients, strict=True):
        p.grad = gradient.view_as(p)


def _on_activations(made: Parts, combine: Combine, h: Tensor, losses: Sequence[Tensor]) -> None:
    """MGDA's upper bound: the rule sees the losses' gradients of the features, and the trunk is walked once."""
    torch.autograd.backward(h, combine(_rows(losses, [h], made.heads)).view_as(h))


def _rows(losses: Sequence[Tensor], shared: Sequence[Tensor], heads: Sequence[Sequence[nn.Parameter]]) -> Tensor:
    """The losses' gradients of what they share, one below the other; each head gets its own."""
    rows = []
    for loss, head in zip(losses, heads, strict=True):
        found = torch.autograd.grad(loss, [*shared, *head], retain_graph=loss is not losses[-1])
        rows.append(torch.cat([gradient.flatten() for gradient in found[: len(shared)]]))
        for p, gradient in zip(head, found[len(shared) :], strict=True):
            p.grad = gradient
    return torch.stack(rows)
