"""The calls of an alternation against the loop that people write: one module, several optimizers, taking turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcfreeze.alternating.alternate import alternate
from funcfreeze.alternating.alternation import Alternation
from funcfreeze.computation.sharing import WithShared
from funcfreeze.computation.state import State
from funcfreeze.computation.statistics import FrozenNorms
from funcfreeze.declare.plan_table import group_rows
from funcfreeze.gradients.law import Live
from funcfreeze.proof.comparison import COARSE_TOLERANCE, TOLERANCES, Seen, buffer_checks, coarsest, exactly
from funcfreeze.proof.copies import cast, cast_state, module_copy
from funcfreeze.proof.recipe import Recipe, random_numbers, with_torchs_random_numbers
from funcfreeze.proof.report import Check, Report
from funcfreeze.proof.twins import TwinsByHand


def by_turns(step: Alternation, state: State, batch: Any, steps: int, alone: Mapping[str, Report]) -> Report:
    """The members' own reports, and what their turns come to.

    Args:
        step: the alternation.
        state: a state of it.
        batch: what its members take.
        steps: how many calls to compare.
        alone: member -> the report on it alone.
    """
    is_double = all(report.facts.get("dtype") == "float64" for report in alone.values())
    told = [
        replace(check, subject=f"{name}: {check.subject}") for name, report in alone.items() for check in report.checks
    ]
    because = next((report.facts["because"] for report in alone.values() if "because" in report.facts), None)
    try:
        own = [*_checks(step, state, batch, steps, torch.float64 if is_double else None)]
    except (RuntimeError, TypeError, ValueError) as error:
        if not is_double:
            raise
        is_double, because = False, f"float64 failed: {type(error).__name__}, {str(error).splitlines()[0]}"
        own = [*_checks(step, state, batch, steps, None)]
    kinds = {report.facts["dtype"] for report in alone.values()}
    kinds.add("float64" if is_double else str(coarsest(state.params)).removeprefix("torch."))
    checks = (*told, *own)
    facts = {"dtype": ", ".join(sorted(kinds)), "calls": steps, **({} if because is None else {"because": because})}
    return Report(f"alternation, engine {step.engine!r}, against the loop by hand", checks, facts)


def _checks(step: Alternation, state: State, batch: Any, steps: int, dtype: torch.dtype | None) -> Iterator[Check]:
    mine = _over(step, module_copy(step.module, dtype))
    now, batch = _cast(mine, step, state, dtype), cast(batch, dtype)
    module = module_copy(step.module, dtype)
    twins = TwinsByHand(next(iter(mine.members.values())).computation.evaluation.targets, module, now)
    recipes = {name: Recipe(member, module, mine.seen_by(name, now), twins) for name, member in mine.members.items()}
    functional = next(iter(recipes.values())).functional
    start, seen, wrong = copy.deepcopy(now), Seen(), []
    clocks = {name: clock.clone() for name, clock in now.clocks.items()}
    for call in range(int(now.step), int(now.step) + steps):
        theirs: dict[str, Mapping[str, Tensor]] = {}
        with random_numbers(call):
            names = [name for name, turns in step.plan.turns.items() if call in turns.counts]
            given = _given(mine, module, twins, names, batch)
            for name in names:
                theirs[name], gradients = recipes[name].gradients(given(name), clocks[name])
                recipes[name].update(gradients, clocks[name])
                clocks[name] += 1
                seen.take_in(gradients)
        with random_numbers(call):
            now, metrics = mine(now, batch)
        if list(metrics) != list(theirs):
            wrong.append(
                f"call {call}: {', '.join(metrics) or 'nobody'} ran, and {', '.join(theirs) or 'nobody'} should"
            )
        for name in theirs.keys() & metrics.keys():
            seen.compare_losses(theirs[name], metrics[name])
        if call == int(start.step):
            seen.compare_buffers(now.buffers, functional.present_buffers())
    near, far = TOLERANCES.get(coarsest(start.params), COARSE_TOLERANCE)
    yield exactly("turns", wrong, f"{steps} calls")
    yield Check("losses in turn", (), seen.losses, far)
    apart = seen.displacements(mine.plan.rows, start.params, now.params, functional.present_parameters())
    for group in group_rows([row for row in mine.plan.rows if row.weights]):
        yield Check(f"{group.title} displacement in turn", tuple(group.rows[0].weights), apart[group.title], far)
    counts = [name for name in clocks if int(clocks[name]) != int(now.clocks[name])]
    yield exactly("clocks", [f"{name}: {int(now.clocks[name])}" for name in counts], f"{len(clocks)} equal")
    yield from buffer_checks(seen, now.buffers, functional.present_buffers(), near)
    yield from twins.checks(start, now, far)


def _given(
    step: Alternation, module: torch.nn.Module, twins: TwinsByHand, names: Sequence[str], batch: Any
) -> Callable[[str], Any]:
    """What each member's recipe is given as its batch: what is shared is computed on the real module, with a graph."""
    sharing = step.sharing
    if sharing is None or not any(map(sharing.asks, names)):
        return lambda name: batch
    named = {"targets": twins.modules} if "targets" in sharing.evaluation.asked else {}
    frozen = FrozenNorms.of(module, None, sharing.evaluation.frozen_norms.declared)
    with torch.enable_grad(), frozen.holding():
        value = sharing.function(module, batch, **named)
    if named:
        twins.renew()  # a graph goes through those that they had
    given = WithShared(batch, value, {}, Live({}, frozenset(), [], True))
    return lambda name: given if sharing.asks(name) else batch


def _over(step: Alternation, module: torch.nn.Module) -> Alternation:
    """The alternation over a copy of its model."""
    turns = step.plan.turns
    some = next(iter(step.members.values()))
    return alternate(
        {
            name: member.remade(model=module, engine="routed", compile=None, donate=True)
            for name, member in step.members.items()
        },
        every={name: turn.every for name, turn in turns.items()},
        start={name: turn.start for name, turn in turns.items()},
        stop={name: turn.stop for name, turn in turns.items()},
        compile=with_torchs_random_numbers(some),
        shared=None if step.sharing is None else step.sharing.function,
        donate=step.donate,
        engine=step.engine,
    )


def _cast(mine: Alternation, step: Alternation, state: State, dtype: torch.dtype | None) -> State:
    """The state in another dtype."""
    parts = {
        name: cast_state(step.seen_by(name, state), dtype, member.specification.optimizer)
        for name, member in mine.members.items()
    }
    first = next(iter(parts.values()))
    optimizers = {name: part.optimizer for name, part in parts.items()}
    clocks = {name: part.step for name, part in parts.items()}
    return State(first.params, first.buffers, optimizers, state.step.clone(), first.targets, clocks)
