"""The first half of a step: eager or compiled, of a whole batch or of one in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from funcfreeze.compile.stepping import CompiledStep
from funcfreeze.computation.computation import Computation
from funcfreeze.computation.half import Half
from funcfreeze.computation.microbatches import Shares, Splitting
from funcfreeze.computation.sharing import is_live
from funcfreeze.computation.state import State, gone_on
from funcfreeze.declare.overlaps import refuse_crossings


@dataclass(frozen=True, eq=False)
class Halves:
    """How first halves are computed.

    Attributes:
        computation: what a step computes.
        splitting: how batches come in parts.
        compiled: the compiled step, if there is one.
    """

    computation: Computation
    splitting: Splitting
    compiled: CompiledStep | None

    def make_one_graph(self, batch: Any) -> bool:
        """Whether a compiled step takes this batch with its update in the same graph."""
        return not self.splitting.splits(batch) and not is_live(batch)

    def half(self, state: State, batch: Any) -> Half:
        """As the step is: compiled, or eager."""
        if self.compiled is None:
            return self.eager(state, batch)
        if is_live(batch):
            return self.compiled.compute_through(state, batch) or self.eager(state, batch)
        parts = self.splitting.parts(batch)
        if parts is None:
            return self.compiled.compute(state, batch)
        self._refuse_parts()
        half = self.splitting.accumulated(parts, partial(self._compiled_part, self.compiled, state))
        return self._met(state, half)

    def eager(self, state: State, batch: Any, *, per_loss: bool = False) -> Half:
        """Eagerly, with each loss's gradients apart if wanted."""
        parts = self.splitting.parts(batch)
        if parts is not None:
            self._refuse_parts()
            half = self.splitting.accumulated(parts, partial(self._part, state, per_loss=per_loss))
            return self._met(state, half, keeps_rows=per_loss)
        computation = self.computation.at(state)
        run = computation.separately if per_loss else computation.gradients
        return run(*state.fields, batch)

    def _refuse_parts(self) -> None:
        why = "and the parts of a batch meet nowhere; use at='parameters', which sees what is accumulated"
        refuse_crossings(self.computation.evaluation.plan.merge, why)

    def _met(self, state: State, half: Half, *, keeps_rows: bool = False) -> Half:
        """With what the merge rules make of gradients that are accumulated."""
        _, _, optimizer, step = state.fields
        return self.computation.at(state).met(half, optimizer, step, keeps_rows=keeps_rows)

    def _part(
        self, state: State, part: Any, shares: Shares, *moved: Mapping[str, Tensor], per_loss: bool = False
    ) -> Half:
        """A part of a batch, after what the parts before it have left in buffers and parameters."""
        computation = replace(self.computation.at(state), shares=shares)
        run = computation.separately if per_loss else computation.gradients
        return run(*gone_on(state, *moved).fields, part)

    def _compiled_part(
        self, compiled: CompiledStep, state: State, part: Any, shares: Shares, *moved: Mapping[str, Tensor]
    ) -> Half:
        if None in shares.values():  # a loss less: not worth a graph of its own
            return self._part(state, part, shares, *moved)
        return compiled.compute_part(gone_on(state, *moved), part, shares)
