"""The recipe as a training loop: a real module, one backward a loss, `.grad`. What `verify` compares with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from funcfreeze.computation.loss_scale import scale_in, unscale
from funcfreeze.computation.merging import after_meeting, states_in
from funcfreeze.computation.microbatches import Shares, times
from funcfreeze.computation.renewal import renewed
from funcfreeze.computation.sharing import taken_apart
from funcfreeze.computation.state import State
from funcfreeze.computation.statistics import FrozenNorms
from funcfreeze.gradients.meeting import meet
from funcfreeze.gradients.returned import check_losses
from funcfreeze.gradients.toggle import accumulate
from funcfreeze.merge.deciding import Met
from funcfreeze.model.attributes import let_go_of_graphs, nodes_made
from funcfreeze.model.functional import FunctionalModule
from funcfreeze.optim.skip import find_non_finite
from funcfreeze.proof.twins import TwinsByHand
from funcfreeze.seeding import seeded
from funcfreeze.step import Step


class Recipe:
    """The eager loop: a real module, one backward a loss into `.grad`, and the optimizer's pure form."""

    def __init__(self, step: Step, module: nn.Module, state: State, twins: TwinsByHand | None = None) -> None:
        self.step = step
        self.twins = twins or TwinsByHand(step.computation.evaluation.targets, module, state)
        self.module = module
        self.losses = step.losses
        self.timetable = step.computation.timetable
        self.transform = step.transform
        self.routed = step.plan.routed
        self.functional = FunctionalModule.of(module)
        self.frozen_norms = FrozenNorms.of(module, None, step.plan.frozen_statistics)
        self.functional.write(state.params, state.buffers)
        self.optimizer = copy.deepcopy(state.optimizer)
        self.scaled = step.loss_scale is not None
        self.splitting = step.splitting
        self.met: Mapping[str, Met] = {}

    def gradients(self, batch: Any, number: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and gradients by name, from one forward for each part; what no loss touches has none."""
        parts = self.splitting.parts(batch)
        if parts is None:
            losses, found, apart = self._of_part(batch, number, None)
            return losses, self._merged(found, apart, losses, number)
        sums: dict[str, Tensor] = {}
        rows: list[dict[int, Tensor]] = [{} for _ in self.timetable.at(int(number)).losses]
        seen: list[tuple[dict[str, Tensor], Shares]] = []
        for part, shares in zip(parts, self.splitting.weights(parts), strict=True):
            losses, found, apart = self._of_part(part, number, shares)
            sums |= _added(sums, found)
            for row, own in zip(rows, apart, strict=True):
                row |= _added(row, own)
            seen.append((losses, shares))
        means = {}
        for name in {name: None for losses, _ in seen for name in losses}:
            there = [
                (losses[name], share)
                for losses, shares in seen
                if name in losses and (share := shares[name]) is not None
            ]
            weighted = torch.stack([loss * share for loss, share in there]).sum()
            means[name] = weighted / torch.stack([share for _, share in there]).sum()
        return means, self._merged(sums, rows, means, number)

    def _merged(
        self,
        gradients: dict[str, Tensor],
        apart: Sequence[Mapping[int, Tensor]],
        losses: Mapping[str, Tensor],
        number: Tensor,
    ) -> dict[str, Tensor]:
        """With what merge rules make of each loss's own; they are told, with what they keep, to the next update."""
        routing = self.timetable.at(int(number))
        if not routing.places:
            return gradients
        states = states_in(self.optimizer, is_scaled=self.scaled)
        merged, self.met = meet(routing, apart, losses, number, states)
        return {**gradients, **{routing.paths[leaf]: gradient for leaf, gradient in merged.items()}}

    def _of_part(
        self, batch: Any, number: Tensor, shares: Shares | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[int, Tensor]]]:
        """One forward, and the gradients of its losses, times their shares where it is a part of a batch.

        Those where a merge rule decides are apart: for each loss, by the index of the parameter.

        Where routes are timed, parameters of which none is active have `requires_grad` False, as people toggle it.
        """
        routing = self.timetable.at(int(number))
        parameters, since = self.functional.present_parameters(), nodes_made()
        if self.timetable.is_timed:
            for path, required in zip(routing.paths, routing.requires_grad, strict=True):
                if path in self.routed:
                    parameters[path].requires_grad_(required)
        with torch.enable_grad(), self.frozen_norms.holding():
            own, shared = taken_apart(batch)
            returned = self.losses(self.module, own, **self.twins.named(self.step), **shared)
            for parameter in parameters.values():
                parameter.grad = None  # of a backward of the losses' own
            left = self.functional.present_buffers()
            self.functional.hold_copies(left)  # activation checkpointing would update them again, once for every loss
            losses = returned[0] if isinstance(returned, tuple) else returned
            ordered = check_losses(losses, routing)
            if shares is not None:
                named = zip(routing.losses, ordered, strict=True)
                ordered = [times(loss, shares[name]) for name, loss in named]
            seed = scale_in(self.optimizer) if self.scaled else None
            weights = routing.weight_values(number)
            apart = accumulate(ordered, list(parameters.values()), routing, weights, seed)
        found = {path: p.grad.detach() for path, p in parameters.items() if p.grad is not None}
        if seed is not None:
            found = unscale(found, seed)
            apart = [unscale(row, seed) for row in apart]
        for path, parameter in parameters.items():
            parameter.grad = None
            if path in self.routed:
                parameter.requires_grad_()  # another's routes may have another timetable
        self.functional.put_buffers(left)
        for module in (self.module, *self.twins.modules.values()):
            let_go_of_graphs(module.modules(), since)
        return {name: loss.detach() for name, loss in losses.items() if loss is not None}, found, apart

    def update(self, gradients: Mapping[str, Tensor], number: Tensor) -> None:
        """One optimizer step."""
        parameters = {path: p.detach() for path, p in self.functional.present_parameters().items()}
        own = {path: parameters[path] for path in self.routed}
        thawing = {path: own[path] for path in self.timetable.thawing(int(number))}
        with torch.no_grad():
            if thawing:
                self.optimizer = renewed(self.transform, self.optimizer, thawing, is_scaled=self.scaled)
            skip = find_non_finite(gradients.values(), number.device) if self.scaled and gradients else None
            kept = after_meeting(self.optimizer, self.met, skip, is_scaled=self.scaled)
            updates, self.optimizer = self.transform.update(gradients, kept, own, step=number)
            for path, update in updates.items():
                if update is not None:
                    parameters[path] += update
        self.twins.move(self.step, self.functional, number)
        # a buffer that was updated with gradients on would bring this step's graph into the next
        self.functional.exchange_buffers(Tensor.detach)


def _added(sums: Mapping[Any, Tensor], more: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    return {key: sums[key] + gradient if key in sums else gradient for key, gradient in more.items()}


def random_numbers(seed: int) -> AbstractContextManager[None]:
    """The same random numbers for every side of a comparison, on all devices."""
    return seeded(seed, range(torch.cuda.device_count()))


def with_torchs_random_numbers(step: Step) -> Any:
    """How the step is compiled, but with eager torch's random numbers: Inductor draws others from the same seed."""
    if step.compiled is None or step.compiled.options.backend != "inductor":
        return step.compile
    given = step.compile if isinstance(step.compile, Mapping) else {}
    return {**given, "options": {**(given.get("options") or {}), "fallback_random": True}}
