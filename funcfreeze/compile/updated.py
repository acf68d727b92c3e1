"""An update by given gradients as a graph: the second half of a compiled step. None of it is the user's code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcfreeze.compile.compiled import note_on_torch
from funcfreeze.compile.layout import Kind, Layout, Listed, kind_of
from funcfreeze.compile.options import Options
from funcfreeze.compile.readings import Readings
from funcfreeze.computation.computation import Computation, Optimized
from funcfreeze.computation.finite import lost

Key = tuple[Layout, int, tuple[tuple[str, Kind], ...]]
"""A state's layout, what the transform reads from Python, and the paths and forms of the gradients."""


Program = Callable[[Listed, Sequence[Tensor]], Optimized]
"""Takes an update: (a state that is overwritten, gradients) -> what it gives."""


def refuse_sparse(gradients: Mapping[str, Tensor]) -> None:
    """Refuse gradients that a graph can neither give nor take.

    Raises:
        ValueError: naming them.
    """
    sparse = [path for path, gradient in gradients.items() if gradient.layout is not torch.strided]
    if sparse:
        raise ValueError(
            f"{', '.join(sparse)}: the gradient is sparse, which the halves of a compiled step neither give nor take; "
            "take whole steps, or build the Step with compile=False"
        )


class CompiledUpdate:
    """An optimizer's update, compiled for every set of touched parameters.

    Args:
        computation: whose optimizer it is.
        options: how to compile.
        donate: whether states are overwritten in place, so that their tensors stay where they are.
    """

    def __init__(self, computation: Computation, options: Options, donate: bool) -> None:
        self._computation = computation
        self._options = options
        self._donate = donate
        self._readings = Readings(computation)
        self._programs: dict[Key, Program] = {}

    @property
    def traces(self) -> int:
        """How many times it has been traced and compiled so far."""
        return len(self._programs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledUpdate:
        return CompiledUpdate(copy.deepcopy(self._computation, memo), self._options, self._donate)

    def __call__(self, state: Listed, gradients: Mapping[str, Tensor], losses: Mapping[str, Any]) -> Optimized:
        """Overwrite parameters and the optimizer's state, of which only what could not be overwritten is returned."""
        refuse_sparse(gradients)
        given = [state.apart(gradient) for gradient in gradients.values()]
        flags = [] if self._computation.finite is None else [lost(losses, state.step.device)]
        key = state.layout, self._readings.number(), tuple(zip(gradients, map(kind_of, given), strict=True))
        with self._computation.evaluation.functional.alone:
            if key not in self._programs:
                self._programs[key] = self._made(state, tuple(gradients), [*given, *flags])
            return self._programs[key](state, [*given, *flags])

    def _made(self, state: Listed, paths: Sequence[str], gradients: Sequence[Tensor]) -> Program:
        try:
            from funcfreeze.compile.program import compile_update
        except (ImportError, AttributeError) as error:
            note_on_torch(error)
            raise
        return compile_update(self._computation, state, paths, gradients, self._options, self._donate)
