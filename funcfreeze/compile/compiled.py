"""The programs of one step, and which of them is right for the state, the batch and the model as they are."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import TYPE_CHECKING, Any

from funcfreeze.compile.form import Form
from funcfreeze.compile.layout import Layout, Listed
from funcfreeze.compile.options import Options
from funcfreeze.compile.watch import Watch
from funcfreeze.computation.computation import Computation

if TYPE_CHECKING:  # the real import, of half of torch's compiler and of sympy, waits for the first trace
    from funcfreeze.compile.program import Program, Returned

MANY = 8
"""So many programs are more than train and eval, with and without a loss, can explain."""


class CompiledStep:
    """A computation, compiled as often as it has to be.

    Args:
        computation: what a step computes.
        options: how to compile.
        donate: whether a step overwrites the state it is given, or copies of it.

    Attributes:
        options: how to compile.
        traces: how many times it has been traced and compiled so far.
    """

    def __init__(self, computation: Computation, options: Options, donate: bool) -> None:
        self.traces = 0
        self._computation = computation
        self.options = options
        self._donate = donate
        self._programs: list[Program] = []
        self._lock = threading.RLock()

    def __call__(self, state: Listed, batch: Any) -> Returned:
        """Take a step that overwrites the state's tensors.

        Raises:
            TypeError: the batch holds something that is neither a tensor nor a plain value.
        """
        form, tensors = Form.of(batch)
        with self._lock:
            program = self._program(state.layout, form)
            return program(state, [state.apart(tensor) for tensor in tensors])

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStep:
        return CompiledStep(
            copy.deepcopy(self._computation, memo), self.options, self._donate
        )  # compiled anew when it is called

    def _program(self, layout: Layout, form: Form) -> Program:
        for index, program in enumerate(self._programs):
            if (
                (program.layout is layout or program.layout == layout)
                and program.form == form
                and program.watch.holds()
            ):
                if index:
                    self._programs.insert(0, self._programs.pop(index))
                return program
        form.check()
        return self._add(layout, form)

    def _add(self, layout: Layout, form: Form) -> Program:
        from funcfreeze.compile.program import Program

        functional = self._computation.evaluation.functional
        if len(self._programs) >= MANY:
            warnings.warn(
                f"this step is traced for the {len(self._programs) + 1}th time, now because "
                f"{self._difference(layout, form)}; what changes from step to step should be a tensor",
                stacklevel=6,
            )
        watch = Watch(functional.module, self._computation.functions, [*functional.present_parameters().values()])
        program = Program(self._computation, layout, form, watch, self.options, self._donate, self._count)
        self._programs.insert(0, program)
        return program

    def _count(self) -> None:
        self.traces += 1

    def _difference(self, layout: Layout, form: Form) -> str:
        """Why the program used last does not do."""
        last = self._programs[0]
        if last.form != form:
            return last.form.difference(form)
        if last.layout != layout:
            return "the state's tensors have other shapes, strides or dtypes"
        return "; ".join(last.watch.changes())
