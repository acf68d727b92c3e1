"""Averaged twins as a training loop keeps them: real copies of parts of a model, moved by `mul_` and `add_`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcfreeze.computation.naming import Asked
from funcfreeze.computation.state import State
from funcfreeze.computation.targets import Targets
from funcfreeze.model.functional import FunctionalModule
from funcfreeze.proof.report import Check
from funcfreeze.step import Step


class TwinsByHand:
    """The twins of a step, over a copy of its model.

    Args:
        targets: the step's.
        module: the copy.
        state: whose values they begin with.
    """

    def __init__(self, targets: Targets, module: nn.Module, state: State) -> None:
        self._twins = {name: target.twin for name, target in targets.over(module).items()}
        self._functionals = {name: FunctionalModule.of(twin.module) for name, twin in self._twins.items()}
        self.renew()  # they are in the copy's memory
        for name, twin in self._twins.items():
            values = state.targets[name]
            parameters, buffers = ({path: values[path] for path in paths} for paths in (twin.parameters, twin.buffers))
            self._functionals[name].write(parameters, buffers)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """By name."""
        return {name: twin.module for name, twin in self._twins.items()}

    def renew(self) -> None:
        """Give the twins other tensors with the same values."""
        for own in self._functionals.values():
            own.exchange_buffers(lambda buffer: buffer.detach().clone())
            for path, tensor in own.present_parameters().items():
                other = nn.Parameter(tensor.detach().clone(), requires_grad=False)
                for module, name in own.parameters[path]:
                    module._parameters[name] = other

    def named(self, step: Step) -> dict[str, Any]:
        """What a step's losses are given by name, with the twins in the modes that they should be in."""
        targets = step.computation.evaluation.targets
        for name, target in targets.by_name.items():
            self._twins[name].set_mode(target.declared.mode)
        return {"targets": self.modules} if self._twins and "targets" in Asked.by(step.losses) else {}

    def move(self, step: Step, model: FunctionalModule, number: Tensor) -> None:
        """After a step's update at a count of its clock."""
        parameters, buffers = model.present_parameters(), model.present_buffers()
        for name, target in step.computation.evaluation.targets.by_name.items():
            if not target.moves or int(number) not in target.declared.timing.counts:
                continue
            twin, own, decay = self._twins[name], self._functionals[name], target.declared.decay_at(number)
            with torch.no_grad():
                for path, tensor in own.present_parameters().items():
                    tensor.mul_(decay).add_(parameters[twin.parameters[path]].detach() * (1 - decay))
                for path, tensor in own.present_buffers().items():
                    followed = buffers[twin.buffers[path]]
                    if target.declared.buffers == "averaged" and tensor.is_floating_point():
                        tensor.mul_(decay).add_(followed * (1 - decay))
                    elif target.declared.buffers != "own":
                        tensor.copy_(followed)

    def checks(self, start: State, end: State, tolerance: float) -> Iterator[Check]:
        """How far the displacements of a state's twins are from these, relative to that of each twin."""
        for name, own in self._functionals.items():
            theirs = {**own.present_parameters(), **own.present_buffers()}
            yield Check(
                f"target {name} displacement", (), _apart(start.targets[name], end.targets[name], theirs), tolerance
            )


def _apart(start: Mapping[str, Tensor], mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)

    apart = _norm(wide(mine[path]) - wide(theirs[path]) for path in theirs)
    moved = _norm(wide(theirs[path]) - wide(start[path]) for path in theirs)
    if apart == 0:
        return 0.0
    floating = [tensor.dtype for tensor in theirs.values() if tensor.is_floating_point() or tensor.is_complex()]
    rounding = max((torch.finfo(dtype).eps for dtype in floating), default=0.0) * _norm(map(wide, start.values()))
    return apart / max(moved, 1e3 * rounding) if max(moved, rounding) > 0 else math.inf


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.abs().square().sum()) for tensor in tensors))
