"""A captured forward made a whole step: leaf copies, planned backward, optimizer, and the state written in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.compile.flat import fakes_of, flatten
from funcfreeze.compile.graph import Forward
from funcfreeze.compile.hooks import parameter_hooks
from funcfreeze.compile.layout import Layout, Listed
from funcfreeze.compile.options import Options
from funcfreeze.compile.outside import Outside
from funcfreeze.compile.private import compiler, tracing
from funcfreeze.compile.stand_ins import StandIns
from funcfreeze.compile.tail import take_off
from funcfreeze.computation.back_door import raise_misuse, write_problem
from funcfreeze.computation.computation import Computation
from funcfreeze.declare.schedules import calling
from funcfreeze.model.memory import memory_of

KEPT_BYTES = 2**18
"""Gradients of this size on the CPU stay allocated until the next step starts; see `Lease.gradients`."""


@dataclass(frozen=True)
class Run:
    """What a run of a program gives.

    Attributes:
        outputs: those of the captured graph.
        buffers: the new values of those that the forward wrote to, by path.
        params: the same of parameters that no loss may update.
        optimizer: the optimizer's new state, or None if all of it was overwritten in place.
        gradients: large gradients on the CPU, kept only to keep their memory.
    """

    outputs: list[Any]
    buffers: dict[str, Tensor]
    params: dict[str, Tensor]
    optimizer: Any
    gradients: list[Tensor]


Program = Callable[[Listed, Sequence[Any]], Run]
"""Takes a step: (a state that is overwritten, the captured graph's inputs) -> what it gives."""


class Form:
    """Where the tensors of what a step gives are among the outputs of its graph; they are added while it is traced."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []

    def add(self, leaf: Any) -> Any:
        """What stands for a leaf: its place if it is a tensor or a size, else itself."""
        if not isinstance(leaf, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
            return lambda computed: leaf
        place = len(self.tensors)
        self.tensors.append(leaf)
        return lambda computed: computed[place]


def compile_step(
    computation: Computation,
    forward: Forward,
    stand_ins: StandIns,
    state: Listed,
    inputs: Sequence[Any],
    options: Options,
    static: bool,
) -> Program:
    """Trace and compile a step, inside of Dynamo's compilation.

    Args:
        computation: what the step computes.
        forward: the captured forward.
        stand_ins: what Dynamo saw in the module.
        state: a state of the layout that the program will take.
        inputs: example inputs of the captured graph.
        options: how to compile.
        static: whether states are overwritten in place, so that their tensors stay where they are.
    """
    others = forward.others
    fakes = fakes_of([inputs[index] for index in others], state)
    number = len(state.tensors)
    hooks = parameter_hooks(stand_ins.own)
    written: frozenset[str] = frozenset()
    while True:
        outside = Outside(fakes.mode, state.step)
        whole = Whole(computation, forward, hooks, state.layout, outside, written)
        try:
            with tracing(fakes.mode, forward.has_lstm), calling(outside.scheduled), outside:
                flat, constants = flatten(
                    whole, [*fakes.state, *fakes.inputs], outside.stand_ins, number if static else 0
                )
        except LateWrites as late:
            written |= late.paths
            continue
        break
    tail = take_off(flat, kernels=not options.cuda_graphs)
    examples = [*fakes.state, *fakes.inputs, *outside.stand_ins, *constants]
    with torch.no_grad():
        graph = compiler(options)(flat, [examples[index] for index in tail.inputs])
    fill, changing = whole.fill, whole.changing

    def program(state: Listed, given: Sequence[Any]) -> Run:
        raise_misuse(stand_ins.misuse([given[index] for index in others], state, changing))
        passed = [state.apart(given[i]) if isinstance(given[i], Tensor) else given[i] for i in others]
        read = [state.apart(tensor.detach()) for tensor in outside.tensors(state.step)]
        if options.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch's
        own = [tensor.clone() for tensor in state.tensors] if hooks else state.tensors  # a hook may raise half way
        with torch.no_grad():
            computed = tail.run(graph, [*own, *passed, *read, *constants])
            if hooks:
                torch._foreach_copy_(state.tensors, own)
        if not options.cuda_graphs:
            return fill(computed)
        return fill([value.clone() if isinstance(value, Tensor) else value for value in computed])  # replays overwrite

    return program


class LateWrites(Exception):
    """The forward writes to parameters that no loss may update, which it should have been given copies of."""

    def __init__(self, paths: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(paths)))
        self.paths = paths


class Whole:
    """The step itself, on whatever stands for the tensors: it overwrites parameters and the optimizer's state.

    Not buffers and the count of steps: a compiler would write those first, before anything can fail.

    Args:
        computation: what the step computes.
        forward: the captured forward.
        hooks: those on parameters, by path.
        layout: how the state's tensors are listed, which come first of all inputs.
        outside: what notes writes.
        written: the parameters that the forward is known to write to.

    Attributes:
        fill: after the call: what a run gives, from the outputs of the graph.
        changing: after the call: the paths of parameters, and of the buffers that the forward changes.
    """

    fill: Callable[[Sequence[Any]], Run]
    changing: frozenset[str]

    def __init__(
        self,
        computation: Computation,
        forward: Forward,
        hooks: Sequence[tuple[str, Callable[[Tensor], Tensor]]],
        layout: Layout,
        outside: Outside,
        written: frozenset[str],
    ) -> None:
        self._computation, self._forward, self._hooks = computation, forward, hooks
        self._layout, self._outside, self._written = layout, outside, written

    def __call__(self, *given: Any) -> list[Any]:
        """The tensors and sizes that the graph gives."""
        computation, layout, forward = self._computation, self._layout, self._forward
        number = len(layout.kinds)
        params, buffers, optimizer, count = layout.fields(given[:number])
        returned: list[Any] = []
        copied: dict[str, Tensor] = {}
        changed: dict[str, Tensor] = {}

        def evaluate(leaves: Sequence[Tensor]) -> tuple[dict[str, Tensor | None], None]:
            named = dict(zip(params, leaves, strict=True))
            for path, hook in self._hooks:
                if named[path].requires_grad:
                    self._outside.keep(hook)
                    named[path].register_hook(hook)  # type: ignore[no-untyped-call]
            copied.update({path: named[path].clone() for path in self._written})
            copied.update({path: buffer.clone() for path, buffer in buffers.items()})
            named |= copied
            before = {path: memory_of(tensor) for path, tensor in named.items()}
            rest = iter(given[number:])
            returned.extend(forward.run(*[next(rest) if path is None else named[path] for path in forward.places]))
            changed.update(
                {
                    path: tensor.detach()
                    for path, tensor in named.items()
                    if before[path] in self._outside.written or memory_of(tensor) != before[path]
                }
            )
            self._refuse_writes(changed)
            absent: dict[str, Tensor | None] = dict.fromkeys(computation.evaluation.plan.losses)
            return absent | {name: returned[place] for name, place in forward.losses.items()}, None

        computed = computation.differentiated(evaluate, params, optimizer, count)
        form = Form()
        with torch.no_grad():
            for name, place in forward.losses.items():
                returned[place] = computed.losses[name]
            # an output may be a view of what is overwritten below
            outputs = [form.add(value.detach().clone() if isinstance(value, Tensor) else value) for value in returned]
            new = {path: form.add(tensor.clone()) for path, tensor in changed.items()}
            after = layout.written(optimizer, computation.optimize(computed.gradients, optimizer, params, count))
            renewed = None if after is None else (after[0], [form.add(leaf) for leaf in after[1]])
            kept = [form.add(gradient) for gradient in computed.gradients.values() if _is_large(gradient)]

        def fill(results: Sequence[Any]) -> Run:
            state = None if renewed is None else optree.tree_unflatten(renewed[0], [f(results) for f in renewed[1]])
            now = {path: take(results) for path, take in new.items()}
            return Run(
                [take(results) for take in outputs],
                {path: tensor for path, tensor in now.items() if path in layout.buffers},
                {path: tensor for path, tensor in now.items() if path not in layout.buffers},
                state,
                [take(results) for take in kept],
            )

        self.fill, self.changing = fill, frozenset(params) | frozenset(changed)
        return form.tensors

    def _refuse_writes(self, changed: Mapping[str, Tensor]) -> None:
        plan = self._computation.evaluation.plan
        raise_misuse(write_problem(path) for path in plan.routed if path in changed)
        late = frozenset(path for path in plan.paths if path in changed) - self._written
        if late:
            raise LateWrites(late)


def _is_large(gradient: Tensor) -> bool:
    return (
        gradient.device.type == "cpu"
        and gradient.layout == torch.strided
        and gradient.numel() * gradient.element_size() >= KEPT_BYTES
    )
