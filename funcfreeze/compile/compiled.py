"""A computation, compiled. What does the work is imported at the first call: half of torch's compiler."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from funcfreeze.compile.layout import Listed
from funcfreeze.compile.options import Options
from funcfreeze.compile.through import Through
from funcfreeze.computation.computation import Computation
from funcfreeze.computation.finite import Found
from funcfreeze.gradients import Routing
from funcfreeze.merge.deciding import Met

if TYPE_CHECKING:
    from funcfreeze.compile.capturing import Capturing


TESTED = (2, 15)
"""The newest release of torch that was tried."""


def note_on_torch(error: BaseException) -> None:
    """Note on an error where to look, if torch is newer than what was tried: its private parts may have changed."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) > TESTED:
        error.add_note(
            f"torch {torch.__version__} is newer than {TESTED[0]}.{TESTED[1]}, the newest that this funcfreeze was "
            "tried with; what it uses of torch's private parts is in funcfreeze/compile/private.py. Build the Step "
            "with compile=False"
        )


class Run(NamedTuple):
    """What a run of a compiled step gives.

    Attributes:
        outputs: those of the captured graph.
        buffers: the new values of those that the forward wrote to, by path; in the end, of those that could not be
            overwritten in place.
        params: the new values of parameters that no loss may update, and that the forward wrote to.
        optimizer: the optimizer's new state, or None if all of it was overwritten in place.
        measured: what the optimizer has measured, as metrics.
        gradients: large gradients on the CPU, kept only to keep their memory.
        found: what is not finite, if that is looked for: all that the step wrote is what was there then.
        rows: of a part of a batch, for each loss the gradients that merge rules are to be shown.
        met: what they saw.
    """

    outputs: list[Any]
    buffers: Mapping[str, Tensor]
    params: Mapping[str, Tensor]
    optimizer: Any
    measured: Mapping[str, Tensor]
    gradients: list[Tensor]
    found: Found | None = None
    rows: Mapping[str, Mapping[str, Tensor]] = {}
    met: Mapping[str, Met] = {}


class Compilation:
    """A computation, compiled as often as it has to be.

    Args:
        computation: what a step computes.
        options: how to compile.
        donate: whether a step overwrites the state it is given, or copies of it.
    """

    def __init__(self, computation: Computation, options: Options, donate: bool) -> None:
        self.options = options
        self._computation = computation
        self._donate = donate
        self._capturings: dict[tuple[Any, ...], Capturing] = {}

    @property
    def traces(self) -> int:
        """How many times it has been traced and compiled so far."""
        return sum(capturing.traces for capturing in self._capturings.values())

    def __call__(
        self, routing: Routing, state: Listed, batch: Any, through: Through | None = None
    ) -> tuple[dict[str, Any], Run]:
        """Take a step that overwrites the state's tensors; returns the metrics, losses among them, and the rest.

        What requires grad in the forward depends on the routes that are active: each set of them has its own graphs.

        Args:
            routing: which loss may update what now.
            state: whose tensors are overwritten; where what is shared are leaves, these come last of its parameters.
            batch: what `losses` is given.
            through: what is shared, as leaves.
        """
        key = routing.active if through is None else through.key
        with self._computation.evaluation.functional.alone:
            if key not in self._capturings:
                self._capturings[key] = self._first(routing, state, through)
            return self._capturings[key](state, batch, through)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compilation:
        own = copy.deepcopy(self._computation, memo)
        return Compilation(own, self.options, self._donate)  # compiled anew when it is called

    def _first(self, routing: Routing, state: Listed, through: Through | None) -> Capturing:
        try:
            from funcfreeze.compile.capturing import Capturing
        except (ImportError, AttributeError) as error:
            note_on_torch(error)
            raise
        eager = replace(self._computation, now=routing)
        computation = eager if through is None else replace(self._computation, now=through.routing)
        return Capturing(computation, eager, self.options, self._donate, state)
