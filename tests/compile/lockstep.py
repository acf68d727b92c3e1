"""Runs a program eagerly, compiled, and by hand on plain `torch.compile`, each in a world of its own, and compares.

A program is a function that makes a `World` from nothing, so that no two runs share an object. The same changes are
made to every world between steps.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import funcfreeze as ff


def as_it_is(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """Our graph uncompiled: what a compiler makes of it is for other tests. As code would, it relies on strides."""

    def kind(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, [stride if isinstance(stride, int) else None for stride in tensor.stride()]

    wanted = [kind(given) if isinstance(given, Tensor) else None for given in inputs]

    def run(*given: Any) -> Any:
        for tensor, (dtype, strides) in ((t, w) for t, w in zip(given, wanted, strict=True) if w is not None):
            assert tensor.dtype == dtype
            assert all(
                now == before for now, before in zip(tensor.stride(), strides, strict=True) if before is not None
            )
        return graph.forward(*given)

    return run


COMPILED = {"backend": as_it_is}
RATE = 0.1

LINE = r"programs/\w+\.py:\d+ \(.*compile=False"
"""What a refusal says: the user's line, and what else there is."""

PROGRAMS: dict[str, Program] = {}


@dataclass
class World:
    """What a program makes.

    Attributes:
        model, losses, routes, optimizer, options: what the Step is made of.
        batch: the batch of a turn.
        change: what the user does before turn 2, or a mapping turn -> what is done before it.
        seen: gives the user's objects that must come out alike.
        around: a context for every step, given the turn.
        drive: takes the step in another way: (step, state, turn, batch) -> (state, metrics).
        between: given (step, state, turn), returns the Step and the state to go on with.
        restore: undoes what was done to globals.
        rtol: how close the runs must be.
        compile: what the harness compiles with; for programs that build Steps of their own.
    """

    model: Any
    losses: Any
    routes: Any = field(default_factory=lambda: {"loss": "*"})
    optimizer: Any = field(default_factory=lambda: ff.optim.sgd(RATE))
    options: dict[str, Any] = field(default_factory=dict)
    batch: Callable[[int], Any] = lambda turn: torch.randn(6, 4)
    change: Any = None
    seen: Callable[[], Any] = lambda: None
    around: Callable[[int], Any] = lambda turn: contextlib.nullcontext()
    drive: Any = None
    between: Any = None
    restore: Callable[[], Any] = lambda: None
    compile: Any = False
    steps: int = 4
    rtol: float = 1e-9

    def before(self, turn: int) -> None:
        """Make the change that is due."""
        changes = self.change if isinstance(self.change, Mapping) else {2: self.change}
        if changes.get(turn) is not None:
            changes[turn]()


@dataclass(frozen=True)
class Program:
    """A program and what is expected of it.

    Attributes:
        make: makes its world.
        refused: what the message of a refusal to compile matches; plain `torch.compile` refuses too.
        ours: why only the compiled step refuses it, where plain `torch.compile` does not.
        eager: what the message of an error matches that the eager Step alone raises; the compiled one is right.
        wrong: what the message of an error matches that the eager Step raises too.
        known: why plain `torch.compile` is wrong, too.
        bug: what is wrong with the compiled step alone.
        old: what is wrong before torch 2.13.
        traces: how often it may be compiled.
    """

    make: Callable[[], World]
    refused: str | None = None
    ours: str | None = None
    eager: str | None = None
    wrong: str | None = None
    known: str | None = None
    bug: str | None = None
    old: str | None = None
    traces: int | None = None


def program(make: Any = None, **expected: Any) -> Any:
    """Register a program."""

    def register(make: Callable[[], World]) -> Callable[[], World]:
        name = f"{make.__module__.rpartition('.')[2]}: {make.__name__.strip('_').replace('_', ' ')}"
        assert name not in PROGRAMS, name
        PROGRAMS[name] = Program(make, **expected)
        return make

    return register if make is None else register(make)


@dataclass
class Trace:
    """What a run left: a record for each turn, and the error that ended it."""

    records: list[dict[str, Any]]
    error: Exception | None = None
    traces: int = 0
    rtol: float = 1e-9


def run(make: Callable[[], World], compile: Any) -> Trace:
    """All steps of a program with a Step."""
    torch.manual_seed(0)
    world = make()
    world.compile = compile
    trace = Trace([], rtol=world.rtol)
    try:
        step = ff.Step(
            world.model, world.losses, world.routes, optimizer=world.optimizer, compile=compile, **world.options
        )
        state = step.init()
        start = {path: tensor.clone() for path, tensor in state.params.items()}
        for turn in range(world.steps):
            seed(turn)
            world.before(turn)
            if world.between is not None:
                step, state = world.between(step, state, turn)
            batch = world.batch(turn)
            before = surroundings(world, step.module, state)
            own = tensors_of(step.module)
            try:
                with world.around(turn):
                    if world.drive is None:
                        state, metrics = step(state, batch)
                    else:
                        state, metrics = world.drive(step, state, turn, batch)
            except Exception as error:
                trace.error = error
                trace.traces = step.traces
                differing(before, surroundings(world, step.module, state), "after the error")
                break
            trace.records.append(
                {
                    "metrics": described(metrics),
                    "moved": {path: tensor.detach() - start[path] for path, tensor in state.params.items()},
                    "buffers": described(dict(state.buffers)),
                    "seen": described(world.seen()),
                    "attributes": attributes_of(step.module),
                    "own tensors kept": tensors_of(step.module) == own,
                }
            )
        trace.traces = step.traces
    finally:
        world.restore()
    return trace


def run_plain(make: Callable[[], World]) -> Trace:
    """The same with `torch.compile(losses, fullgraph=True)`, `torch.autograd.grad`, and SGD by hand."""
    torch.manual_seed(0)
    world = make()
    model = world.model if isinstance(world.model, nn.Module) else nn.ModuleDict(world.model)
    plan = ff.Step(world.model, world.losses, world.routes, optimizer=world.optimizer, compile=False).plan
    compiled = torch.compile(world.losses, fullgraph=True, backend="aot_eager")
    start = {path: tensor.detach().clone() for path, tensor in model.named_parameters()}
    trace = Trace([], rtol=world.rtol)
    try:
        for turn in range(world.steps):
            seed(turn)
            world.before(turn)
            batch = world.batch(turn)
            settings = {"trace_autograd_ops": True, "allow_rnn": True}
            try:
                with world.around(turn), torch._dynamo.config.patch(**settings):
                    returned = compiled(model, batch)
                    pair = isinstance(returned, tuple)
                    found, metrics = returned if pair else (returned, {})
                    move(model, plan, found, turn)
            except Exception as error:
                trace.error = error
                break
            parameters = dict(model.named_parameters())
            trace.records.append(
                {
                    "metrics": described({**{n: v for n, v in found.items() if v is not None}, **metrics}),
                    "moved": {path: parameters[path].detach() - start[path] for path in plan.paths},
                    "buffers": described(dict(model.named_buffers())),
                    "seen": described(world.seen()),
                    "attributes": attributes_of(model),
                }
            )
    finally:
        world.restore()
    return trace


def move(model: nn.Module, plan: Any, found: Mapping[str, Any], turn: int) -> None:
    """One step of SGD, written out."""
    parameters = dict(model.named_parameters())
    moves: dict[str, Tensor] = {}
    for name, value in found.items():
        rows = [row for row in plan.rows if name in row.weights]
        if value is None:
            continue
        given = torch.autograd.grad(value, [parameters[row.path] for row in rows], retain_graph=True, allow_unused=True)
        for row, gradient in zip(rows, given, strict=True):
            if gradient is not None:
                weight = sum(w(turn) if callable(w) else w for w in row.weights[name])
                moves[row.path] = moves.get(row.path, 0) + weight * gradient
    with torch.no_grad():
        for path, gradient in moves.items():
            parameters[path] -= RATE * gradient


def seed(turn: int) -> None:
    """The same numbers in every world."""
    torch.manual_seed(turn)
    random.seed(turn)
    np.random.seed(turn)


def surroundings(world: World, module: nn.Module, state: ff.State) -> dict[str, Any]:
    """All that a refused step must leave alone."""
    return {
        "params": described(dict(state.params)),
        "buffers": described(dict(state.buffers)),
        "optimizer": described(state.optimizer),
        "seen": described(world.seen()),
        "attributes": attributes_of(module),
        "own": described([*module.parameters(), *module.buffers()]),
    }


def tensors_of(module: nn.Module) -> list[tuple[Any, ...]]:
    """The module's own tensors: which they are, their versions, their bits."""
    both = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, id(t), t.requires_grad, t.grad is None, t.detach().cpu().numpy().tobytes()) for name, t in both]


_OF_MODULES = {"_parameters", "_buffers", "_modules", "_compiled_call_impl"}


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """All Python attributes of all modules."""
    return {
        path: {
            key: described(value)
            for key, value in vars(part).items()
            if key not in _OF_MODULES and "hooks" not in key and key != "_torchdynamo_wrapper_id"
        }
        for path, part in module.named_modules()
    }


def described(value: Any, deep: int = 6) -> Any:
    """A picture of a value that later writes do not change."""
    if isinstance(value, Tensor):
        return ("tensor", value.detach().clone())
    if isinstance(value, np.ndarray):
        return ("array", torch.as_tensor(value.copy()))
    if value is None or isinstance(value, int | float | str | complex | torch.dtype | torch.device | torch.Size):
        return (type(value).__name__, value)
    if deep == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return (type(value).__name__, {key: described(part, deep - 1) for key, part in value.items()})
    if isinstance(value, list | tuple | collections.deque):
        return (type(value).__name__, [described(part, deep - 1) for part in value])
    if isinstance(value, set | frozenset):
        return (type(value).__name__, sorted(map(repr, value)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
        return (type(value).__name__, {key: described(part, deep - 1) for key, part in parts.items()})
    if isinstance(value, types.SimpleNamespace):
        return (type(value).__name__, {key: described(part, deep - 1) for key, part in vars(value).items()})
    return type(value).__qualname__


def differing(wanted: Any, got: Any, where: str, rtol: float = 0.0) -> None:
    """Fail where two pictures are not alike."""
    if isinstance(wanted, Tensor):
        assert isinstance(got, Tensor), f"{where}: {got} for {wanted}"
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), f"{where}: {got.dtype}{got.shape}"
        told = lambda message: f"{where}: {message}"  # noqa: E731
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * 0.01, equal_nan=True, msg=told)
    elif isinstance(wanted, dict):
        assert isinstance(got, dict), f"{where}: {got} for {wanted}"
        assert got.keys() == wanted.keys(), f"{where}: {got} for {wanted}"
        for key in wanted:
            differing(wanted[key], got[key], f"{where}[{key}]", rtol)
    elif isinstance(wanted, list | tuple):
        assert type(got) is type(wanted), f"{where}: {got} for {wanted}"
        assert len(got) == len(wanted), f"{where}: {got} for {wanted}"
        for index, (one, other) in enumerate(zip(wanted, got, strict=True)):
            differing(one, other, f"{where}[{index}]", rtol)
    elif isinstance(wanted, float):
        assert got == wanted or abs(got - wanted) <= rtol * abs(wanted), f"{where}: {got} for {wanted}"
    else:
        assert got == wanted, f"{where}: {got} for {wanted}"


def compare(eager: Trace, other: Trace, only: tuple[str, ...] = ()) -> None:
    """Fail at the first turn at which two runs differ."""
    for turn, (wanted, got) in enumerate(zip(eager.records, other.records, strict=False)):
        for kind in only or wanted:
            if kind == "own tensors kept" and got[kind]:
                continue  # the eager step may write to a frozen parameter once, where that begins late
            differing(wanted[kind], got[kind], f"turn {turn}, {kind}", eager.rtol)


def matches(pattern: str, error: Exception) -> bool:
    """Whether the message is the expected one."""
    return re.search(pattern, str(error), re.DOTALL) is not None
