"""A captured forward made a whole step: leaf copies, planned backward, optimizer, and the state written in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from funcfreeze.compile.compiled import Run
from funcfreeze.compile.flat import Fakes, Flat, fakes_of, flatten
from funcfreeze.compile.graph import Forward
from funcfreeze.compile.hooks import parameter_hooks
from funcfreeze.compile.layout import Layout, Listed
from funcfreeze.compile.options import Options
from funcfreeze.compile.outside import Outside
from funcfreeze.compile.private import compiler, compiling, tracing
from funcfreeze.compile.readings import Readings
from funcfreeze.compile.stand_ins import StandIns
from funcfreeze.compile.tail import Tail, take_off
from funcfreeze.computation.back_door import raise_misuse, write_problem
from funcfreeze.computation.computation import Computation, Optimized
from funcfreeze.computation.finite import lost
from funcfreeze.computation.merging import after_meeting, told
from funcfreeze.declare.plan import Plan
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.model.functional import constant_problem
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
    writes_refused = Readings(computation).refusing_writes
    while True:
        outside = Outside(fakes.mode, state.step)
        whole = whole_step(computation, forward, hooks, state.layout, outside, written)
        try:
            with writes_refused(), tracing(fakes.mode, forward.has_lstm), calling(outside.scheduled), outside:
                flat = flatten(whole, [*fakes.state, *fakes.inputs], outside.stand_ins, static_number)
        except LateWrites as late:
            written |= late.paths
            continue
        break
    changing = frozenset({*state.layout.params, *flat.returned.buffers, *flat.returned.params})
    finished, whole_run = finish(flat, fakes, outside, options), flat.whole

    def program(state: Listed, given: Sequence[Any]) -> Run:
        given = [given[index] for index in others]
        raise_misuse(stand_ins.misuse(given, state, changing))
        passed = [state.apart(value) if isinstance(value, Tensor) else value for value in given]
        given_back: Run = whole_run(finished(state, passed, may_raise=bool(hooks)))
        return given_back

    return program


def compile_update(
    computation: Computation,
    state: Listed,
    paths: Sequence[str],
    gradients: Sequence[Tensor],
    options: Options,
    is_static: bool,
) -> Callable[[Listed, Sequence[Tensor]], Optimized]:
    """Trace and compile an update by given gradients.

    Args:
        computation: whose optimizer it is.
        state: a state of the layout that the program will take.
        paths: of the parameters that have a gradient.
        gradients: examples, and then the flag of the losses where that is looked at.
        options: how to compile.
        is_static: whether states are overwritten in place, so that their tensors stay where they are.
    """
    number = len(state.tensors)

    def update(*given: Tensor) -> Optimized:
        params, _, optimizer, count = state.layout.fields(given[:number])
        with grad_mode(False):
            named = dict(zip(paths, given[number:], strict=False))
            flags = given[number + len(paths) :]
            after = computation.optimize(named, optimizer, params, count, *flags)
            return after._replace(optimizer=state.layout.written(optimizer, after.optimizer))

    with compiling():
        fakes = fakes_of(gradients, state)
        outside = Outside(fakes.mode, state.step)
        writes_refused = Readings(computation).refusing_writes
        with writes_refused(), tracing(fakes.mode, has_lstm=False), calling(outside.scheduled), outside:
            inputs = [*fakes.state, *fakes.inputs]
            flat = flatten(update, inputs, outside.stand_ins, number if is_static else 0)
        finished, whole = finish(flat, fakes, outside, options), flat.whole
    return lambda state, given: whole(finished(state, given))


def finish(flat: Flat, fakes: Fakes, outside: Outside, options: Options) -> Finished:
    """Compile a flat graph.

    Args:
        flat: the graph, which is changed.
        fakes: its inputs.
        outside: what else it takes.
        options: how to compile.
    """
    tail = take_off(flat.graph, kernels=not options.cuda_graphs)
    examples = [*fakes.state, *fakes.inputs, *outside.stand_ins, *flat.constants]
    with grad_mode(False):
        graph = compiler(options)(flat.graph, [examples[index] for index in tail.inputs])
    return Finished(graph, tail, outside, flat.constants, options.cuda_graphs)


class Finished:
    """A compiled graph, and what comes after it.

    Args:
        graph: what was compiled.
        tail: what is left to do after it.
        outside: what it takes after its own inputs, which is read anew at every call.
        constants: what it takes last.
        are_replayed: whether it records CUDA graphs.
    """

    def __init__(
        self,
        graph: Callable[..., Any],
        tail: Tail,
        outside: Outside,
        constants: Sequence[Tensor],
        are_replayed: bool,
    ) -> None:
        self._graph, self._tail, self._outside = graph, tail, outside
        self._constants, self._are_replayed = constants, are_replayed
        self._runs: WeakKeyDictionary[Listed, Callable[[Sequence[Any]], Any]] = WeakKeyDictionary()

    def __call__(self, state: Listed, given: Sequence[Any], may_raise: bool = False) -> Sequence[Any]:
        """What the graph gives, and the kernels called.

        Args:
            state: which is overwritten.
            given: the other inputs, in memory of their own.
            may_raise: whether code of the user's in it may raise half way; the state is as before then.
        """
        read = [state.apart(tensor.detach()) for tensor in self._outside.tensors(state.step)]
        if self._are_replayed:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch's
        with grad_mode(False):
            if may_raise:
                own = [tensor.clone() for tensor in state.tensors]
                computed = self._tail.after(self._graph, own)([*given, *read, *self._constants])
                torch._foreach_copy_(state.tensors, own)
            else:
                run = self._runs.get(state)
                if run is None:
                    self._runs[state] = run = self._tail.after(self._graph, state.tensors)
                computed = run([*given, *read, *self._constants])
        if self._are_replayed:  # replays overwrite what they gave
            computed = [value.clone() if isinstance(value, Tensor) else value for value in computed]
        return computed  # type: ignore[no-any-return]  # a graph's


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
    constants = computation.evaluation.functional.constants.keys()

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
            raise_misuse(map(constant_problem, sorted(changed.keys() & constants)))
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
            flag = None if computation.finite is None else lost(computed.losses, count.device)
            optimized = computation.optimize(computed.gradients, optimizer, params, count, flag)
            is_scaled, found = computation.loss_scale is not None, optimized.found
            after = after_meeting(optimized.optimizer, computed.met, optimized.skip, is_scaled=is_scaled)
            if found is not None:
                new = found.kept("buffer or parameter", {**params, **buffers}, new)
            return Run(
                outputs,
                {path: tensor for path, tensor in new.items() if path in layout.buffers},
                {path: tensor for path, tensor in new.items() if path not in layout.buffers},
                layout.written(optimizer, after),
                {**optimized.measured, **told(computed.met)},
                [gradient for gradient in computed.gradients.values() if _is_large(gradient)],
                found,
                computed.rows,
                computed.met,
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
