"""A captured forward made a whole step: leaf copies, planned backward, optimizer, and the state written in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.compile.flat import flatten, stand_ins_of
from funcfreeze.compile.graph import Forward
from funcfreeze.compile.layout import Layout, Listed
from funcfreeze.compile.options import Options
from funcfreeze.compile.outside import Outside
from funcfreeze.compile.private import compiler, tracing
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
        optimizer: the optimizer's new state, or None if all of it was overwritten in place.
        gradients: large gradients on the CPU, kept only to keep their memory.
    """

    outputs: list[Any]
    buffers: dict[str, Tensor]
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
    hooks: Sequence[tuple[str, Callable[[Tensor], Tensor | None]]],
    state: Listed,
    inputs: Sequence[Any],
    options: Options,
    static: bool,
) -> Program:
    """Trace and compile a step, inside of Dynamo's compilation.

    Args:
        computation: what the step computes.
        forward: the captured forward.
        hooks: those on parameters, by path.
        state: a state of the layout that the program will take.
        inputs: example inputs of the captured graph.
        options: how to compile.
        static: whether states are overwritten in place, so that their tensors stay where they are.
    """
    others = forward.others
    fakes = stand_ins_of([inputs[index] for index in others], state)
    outside = Outside(fakes.mode, state.step)
    number = len(state.tensors)
    filled: list[Callable[[Sequence[Any]], Run]] = []

    def step(*given: Any) -> list[Any]:
        outputs, fill = _traced(computation, forward, hooks, state.layout, given[:number], given[number:], outside)
        filled.append(fill)
        return outputs

    with tracing(fakes.mode, forward.has_lstm), calling(outside.scheduled), outside:
        flat, constants = flatten(step, [*fakes.state, *fakes.inputs], outside.stand_ins, number if static else 0)
    run = compiler(options)(flat, [*fakes.state, *fakes.inputs, *outside.stand_ins, *constants])
    (fill,) = filled

    def program(state: Listed, given: Sequence[Any]) -> Run:
        passed = [state.apart(given[i]) if isinstance(given[i], Tensor) else given[i] for i in others]
        read = [state.apart(tensor.detach()) for tensor in outside.tensors(state.step)]
        if not options.cuda_graphs:
            return fill(run(*state.tensors, *passed, *read, *constants))
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch's
        computed = run(*state.tensors, *passed, *read, *constants)
        return fill([value.clone() if isinstance(value, Tensor) else value for value in computed])  # replays overwrite

    return program


def _traced(
    computation: Computation,
    forward: Forward,
    hooks: Sequence[tuple[str, Callable[[Tensor], Tensor | None]]],
    layout: Layout,
    own: Sequence[Tensor],
    others: Sequence[Any],
    outside: Outside,
) -> tuple[list[Any], Callable[[Sequence[Any]], Run]]:
    """The step itself, on whatever stands for the tensors: it overwrites parameters and the optimizer's state.

    Not buffers and the count of steps: a compiler would write those first, before anything can fail.
    """
    params, buffers, optimizer, count = layout.fields(own)
    returned: list[Any] = []
    cloned = {path: buffer.clone() for path, buffer in buffers.items()}

    def evaluate(leaves: Sequence[Tensor]) -> tuple[dict[str, Tensor | None], None]:
        named = dict(zip(params, leaves, strict=True))
        for path, hook in hooks:
            if named[path].requires_grad:
                named[path].register_hook(hook)  # type: ignore[no-untyped-call]
        named |= cloned
        rest = iter(others)
        returned.extend(forward.run(*[next(rest) if path is None else named[path] for path in forward.places]))
        absent: dict[str, Tensor | None] = dict.fromkeys(computation.evaluation.plan.losses)
        return absent | {name: returned[place] for name, place in forward.losses.items()}, None

    computed = computation.differentiated(evaluate, params, optimizer, count)
    form = Form()
    with torch.no_grad():
        values = [computed.losses[name] for name in forward.losses]
        for place, value in zip(forward.losses.values(), values, strict=True):
            returned[place] = value
        # an output may be a view of what is overwritten below
        outputs = [form.add(value.detach().clone() if isinstance(value, Tensor) else value) for value in returned]
        changed = {path: buffer for path, buffer in cloned.items() if memory_of(buffer) in outside.written}
        buffers_out = {path: form.add(buffer) for path, buffer in changed.items()}
        after = layout.written(optimizer, computation.optimize(computed.gradients, optimizer, params, count))
        renewed = None if after is None else (after[0], [form.add(leaf) for leaf in after[1]])
        kept = [form.add(gradient) for gradient in computed.gradients.values() if _is_large(gradient)]

    def fill(results: Sequence[Any]) -> Run:
        state = None if renewed is None else optree.tree_unflatten(renewed[0], [take(results) for take in renewed[1]])
        new = {path: take(results) for path, take in buffers_out.items()}
        return Run([take(results) for take in outputs], new, state, [take(results) for take in kept])

    return form.tensors, fill


def _is_large(gradient: Tensor) -> bool:
    return (
        gradient.device.type == "cpu"
        and gradient.layout == torch.strided
        and gradient.numel() * gradient.element_size() >= KEPT_BYTES
    )
