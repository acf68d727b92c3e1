"""The programs of one step, and which of them is right for the state, the batch and the model as they are."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcfreeze.compile.layout import Layout, Listed
from funcfreeze.compile.options import Options
from funcfreeze.compile.reading import PLAIN
from funcfreeze.compile.watch import Watch
from funcfreeze.computation import Computation

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
        leaves, structure = optree.tree_flatten(batch, none_is_leaf=True)
        constants = {index: _constant(leaf) for index, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        with self._lock:
            program = self._program(state.layout, structure, constants)
            return program(state.tensors, [_apart(leaf, state) for leaf in leaves if isinstance(leaf, Tensor)])

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStep:
        return CompiledStep(
            copy.deepcopy(self._computation, memo), self.options, self._donate
        )  # compiled anew when it is called

    def _program(self, layout: Layout, structure: optree.PyTreeSpec, constants: dict[int, Constant]) -> Program:
        for index, program in enumerate(self._programs):
            if (
                (program.layout is layout or program.layout == layout)
                and program.structure == structure
                and program.constants == constants
                and program.watch.holds()
            ):
                if index:
                    self._programs.insert(0, self._programs.pop(index))
                return program
        _check_constants(structure, constants)
        return self._add(layout, structure, constants)

    def _add(self, layout: Layout, structure: optree.PyTreeSpec, constants: dict[int, Constant]) -> Program:
        from funcfreeze.compile.program import Program

        functional = self._computation.functional
        if len(self._programs) >= MANY:
            warnings.warn(
                f"this step is traced for the {len(self._programs) + 1}th time, now because "
                f"{self._difference(layout, structure, constants)}; what changes from step to step should be a tensor",
                stacklevel=6,
            )
        watch = Watch(functional.module, self._computation.functions, [*functional.present_parameters().values()])
        program = Program(
            self._computation, layout, structure, constants, watch, self.options, self._donate, self._count
        )
        self._programs.insert(0, program)
        return program

    def _count(self) -> None:
        self.traces += 1

    def _difference(self, layout: Layout, structure: optree.PyTreeSpec, constants: dict[int, Constant]) -> str:
        """Why the program used last does not do."""
        last = self._programs[0]
        if last.structure != structure:
            return "the batch has another structure"
        if last.constants != constants:
            return f"a Python value in the batch changed from {_shown(last.constants)} to {_shown(constants)}"
        if last.layout != layout:
            return "the state's tensors have other shapes, strides or dtypes"
        return "; ".join(last.watch.changes())


class Constant(NamedTuple):
    """A plain value in the batch: 1, 1.0 and True are three different ones, and every NaN is the same."""

    kind: type
    shown: str
    leaf: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self[:2] == other[:2]

    def __hash__(self) -> int:
        return hash(self[:2])


def _constant(leaf: Any) -> Constant:
    return Constant(type(leaf), repr(leaf), leaf)


def _shown(constants: dict[int, Constant]) -> str:
    return ", ".join(constant.shown for constant in constants.values())


def _apart(leaf: Tensor, state: Listed) -> Tensor:
    """A tensor of the batch, or a copy if it shares memory with the state, which the step overwrites."""
    shares = leaf.layout is torch.strided and leaf.untyped_storage().data_ptr() in state.memories
    return leaf.clone() if shares and leaf.numel() else leaf


def _check_constants(structure: optree.PyTreeSpec, constants: dict[int, Constant]) -> None:
    paths = structure.paths() if constants else []
    problems = [
        f"batch[{']['.join(map(repr, paths[index]))}]: {kind.__name__}" if paths[index] else kind.__name__
        for index, (kind, _, value) in constants.items()
        if not isinstance(value, PLAIN)
    ]
    if problems:
        raise TypeError(
            "a compiled step takes batches of tensors, numbers and strings in dicts, lists and tuples, got\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nturn it into one of these (torch.as_tensor, dict(...)), or build the Step with compile=False"
        )
