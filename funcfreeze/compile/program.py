"""A captured forward made a whole step: leaf copies, planned backward, optimizer, and the state written in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from funcfreeze.compile.compiled import Run
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
from funcfreeze.declare.plan import Plan
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.model.memory import memory_of
from funcfreeze.schedules.calling import calling

KEPT_BYTES = 2**18
"""Gradients of this size on the CPU stay allocated until the next step starts; see `Lease.gradients`."""


Program = Callable[[Listed, Sequence[Any]], Run]
"""Takes a step: (a state that is overwritten, the captured graph's inputs) -> what it gives."""


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
    static_number = len(state.tensors) if static else 0
    hooks = parameter_hooks(stand_ins.own)
    written: frozenset[str] = frozenset()
    while True:
        outside = Outside(fakes.mode, state.step)
        whole = whole_step(computation, forward, hooks, state.layout, outside, written)
        try:
            with tracing(fakes.mode, forward.has_lstm), calling(outside.scheduled), outside:
                flat = flatten(whole, [*fakes.state, *fakes.inputs], outside.stand_ins, static_number)
        except LateWrites as late:
            written |= late.paths
            continue
        break
    are_replayed, constants, whole_run = options.cuda_graphs, flat.constants, flat.whole
    changing = frozenset({*state.layout.params, *flat.returned.buffers, *flat.returned.params})
    tail = take_off(flat.graph, kernels=not are_replayed)
    examples = [*fakes.state, *fakes.inputs, *outside.stand_ins, *constants]
    with grad_mode(False):
        graph = compiler(options)(flat.graph, [examples[index] for index in tail.inputs])

    runs: WeakKeyDictionary[Listed, Callable[[Sequence[Any]], Any]] = WeakKeyDictionary()

    def program(state: Listed, given: Sequence[Any]) -> Run:
        given = [given[index] for index in others]
        raise_misuse(stand_ins.misuse(given, state, changing))
        passed = [state.apart(value) if isinstance(value, Tensor) else value for value in given]
        read = [state.apart(tensor.detach()) for tensor in outside.tensors(state.step)]
        if are_replayed:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch's
        with grad_mode(False):
            if hooks:  # one may raise half way
                own = [tensor.clone() for tensor in state.tensors]
                computed = tail.after(graph, own)([*passed, *read, *constants])
                torch._foreach_copy_(state.tensors, own)
            else:
                run = runs.get(state)
                if run is None:
                    runs[state] = run = tail.after(graph, state.tensors)
                computed = run([*passed, *read, *constants])
        if are_replayed:  # replays overwrite what they gave
            computed = [value.clone() if isinstance(value, Tensor) else value for value in computed]
        given_back: Run = whole_run(computed)
        return given_back

    return program


class LateWrites(Exception):
    """The forward writes to parameters that no loss may update, which it should have been given copies of."""

    def __init__(self, paths: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(paths)))
        self.paths = paths


def whole_step(
    computation: Computation,
    forward: Forward,
    hooks: Sequence[tuple[str, Callable[[Tensor], Tensor]]],
    layout: Layout,
    outside: Outside,
    written: frozenset[str],
) -> Callable[..., Run]:
    """The step itself, on whatever stands for the tensors: it overwrites parameters and the optimizer's state.

    Not buffers and the count of steps: a compiler would write those first, before anything can fail.

    Args:
        computation: what the step computes.
        forward: the captured forward.
        hooks: those on parameters, by path.
        layout: how the state's tensors are listed, which come first of all inputs.
        outside: what notes writes.
        written: the parameters that the forward is known to write to.
    """
    number, plan = len(layout.kinds), computation.evaluation.plan

    def step(*given: Any) -> Run:
        params, buffers, optimizer, count = layout.fields(given[:number])
        returned: list[Any] = []
        changed: dict[str, Tensor] = {}

        def evaluate(leaves: Sequence[Tensor]) -> tuple[dict[str, Tensor | None], None]:
            named = dict(zip(params, leaves, strict=True))
            for path, hook in hooks:
                if named[path].requires_grad:
                    outside.keep(hook)
                    named[path].register_hook(hook)  # type: ignore[no-untyped-call]
            named |= {path: named[path].clone() for path in written}
            named |= {path: buffer.clone() for path, buffer in buffers.items()}
            before = {path: memory_of(tensor) for path, tensor in named.items()}
            rest = iter(given[number:])
            returned.extend(forward.run(*[next(rest) if path is None else named[path] for path in forward.places]))
            changed.update(
                {
                    path: tensor.detach()
                    for path, tensor in named.items()
                    if before[path] in outside.written or memory_of(tensor) != before[path]
                }
            )
            _refuse_writes(plan, changed, written)
            absent: dict[str, Tensor | None] = dict.fromkeys(plan.losses)
            return absent | {name: returned[place] for name, place in forward.losses.items()}, None

        computed = computation.differentiated(evaluate, params, optimizer, count)
        with grad_mode(False):
            for name, place in forward.losses.items():
                returned[place] = computed.losses[name]
            # an output may be a view of what is overwritten below
            outputs = [value.detach().clone() if isinstance(value, Tensor) else value for value in returned]
            new = {path: tensor.clone() for path, tensor in changed.items()}
            after = computation.optimize(computed.gradients, optimizer, params, count)
            return Run(
                outputs,
                {path: tensor for path, tensor in new.items() if path in layout.buffers},
                {path: tensor for path, tensor in new.items() if path not in layout.buffers},
                layout.written(optimizer, after),
                [gradient for gradient in computed.gradients.values() if _is_large(gradient)],
            )

    return step


def _refuse_writes(plan: Plan, changed: Mapping[str, Tensor], written: frozenset[str]) -> None:
    raise_misuse(write_problem(path) for path in plan.routed if path in changed)
    late = frozenset(path for path in plan.paths if path in changed) - written
    if late:
        raise LateWrites(late)


def _is_large(gradient: Tensor) -> bool:
    return (
        gradient.device.type == "cpu"
        and gradient.layout == torch.strided
        and gradient.numel() * gradient.element_size() >= KEPT_BYTES
    )
