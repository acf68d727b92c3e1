"""Proof on the user's own model: a step's engine against the recipe, in eager PyTorch, on copies of both."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from funcfreeze.alternating.alternation import Alternation
from funcfreeze.computation.specification import check_fits
from funcfreeze.computation.state import State
from funcfreeze.declare.overlaps import refuse_crossings
from funcfreeze.model.watching import Watch, by_memory
from funcfreeze.proof.by_turns import by_turns
from funcfreeze.proof.comparison import COARSE_TOLERANCE, TOLERANCES, Seen, checks, coarsest
from funcfreeze.proof.copies import cast, cast_state, module_copy
from funcfreeze.proof.recipe import Recipe, random_numbers, with_torchs_random_numbers
from funcfreeze.proof.report import Report
from funcfreeze.step import Step


def verify(step: Step | Alternation, state: State, batch: Any, *, steps: int = 5) -> Report:
    """Prove a step equal to the recipe on its own model, state and batch.

    The recipe runs on a copy of the real module: one forward, and for each loss one `backward(retain_graph=True)` into
    the parameters it may update. The step runs on another copy with its own engine. Both call `losses` once a step, and
    get the same random numbers; tensors that a forward has left on the model are copied without their graph.
    Compared are, at every step, losses, touched sets and gradients; after the last, displacements from the start,
    buffers, and that what is frozen or untouched is bit-identical, its optimizer state included. In float64 if the
    model can, else in its own dtype.

    The model, the state and the generators of torch, `random` and numpy are left as they were. What `losses` keeps
    outside of the model (a counter, a generator of your own) is one for both sides, and may make them differ. `losses`
    that does not use the model it is given cannot be verified, and the report says so.

    Of an alternation each member is verified so, but for those that take what is `shared`, and then the calls: against
    one module on which the members' recipes take their turns.
    Timed routes are those of the state's count and the ones after it: `state.replace(step=torch.tensor(998))` proves
    the steps around a route that starts at 1000.

    Args:
        step: the step, or the alternation, to verify.
        state: a state of it; the comparison starts there.
        batch: a batch that `losses` takes.
        steps: how many steps to take.

    Returns:
        A report with `ok`, a readable `str()` and `to_dict()`.

    Raises:
        ValueError, TypeError, RuntimeError: what the step itself would raise.
        ValueError: a merge rule of the step looks at activations.

    >>> from torch import nn
    >>> import funcfreeze as ff
    >>> def losses(model, batch):
    ...     features = model["encoder"](batch)
    ...     return {"task": model["head"](features).square().mean(), "small": features.square().mean()}
    >>> model = {"encoder": nn.Linear(3, 2), "head": nn.Linear(2, 1)}
    >>> step = ff.Step(model, losses, {"task": "*", "small": {"encoder": 0.1}}, optimizer=ff.optim.adam(0.1))
    >>> ff.verify(step, step.init(), torch.ones(4, 3)).ok
    True
    """
    if steps < 1:
        raise ValueError(f"verify takes at least one step, got steps={steps}")
    if isinstance(step, Alternation):
        sharing = step.sharing
        alone = {
            name: verify(one, step.seen_by(name, state), batch, steps=steps)
            for name, one in step.members.items()
            if sharing is None or not sharing.asks(name)
        }
        return by_turns(step, state, batch, steps, alone)
    state = check_fits(state, step.specification)
    why = "which the recipe, one backward a loss, cannot; verify the step with at='parameters', or without the rule"
    refuse_crossings(step.plan.merge, why)
    with random_numbers(0):
        touched = step.gradients(state, batch).keys()
    try:
        return _compare(step, state, batch, steps, touched, torch.float64, {})
    except _NotInFloat64 as error:
        return _compare(step, state, batch, steps, touched, None, {"because": f"float64 failed: {error}"})


class _NotInFloat64(Exception):
    """The recipe cannot run the model in float64."""


def _compare(
    step: Step,
    state: State,
    batch: Any,
    steps: int,
    touched: AbstractSet[str],
    dtype: torch.dtype | None,
    facts: Mapping[str, str],
) -> Report:
    module = module_copy(step.module, dtype)
    mine = step.remade(model=module, compile=with_torchs_random_numbers(step))
    now, batch = cast_state(state, dtype, mine.specification.optimizer), cast(batch, dtype)
    recipe = Recipe(mine, module_copy(step.module, dtype), now)
    start = copy.deepcopy(now)
    seen = Seen()
    original = Watch(by_memory(_own(step)), {})
    for turn in range(steps):
        number = now.step.clone()  # a compiled step counts in place
        with random_numbers(turn), original if turn == 0 else nullcontext():
            losses, gradients = _in_float64_or_not(recipe, batch, number, dtype)
        now, metrics, own = _taken(mine, now, batch, turn)
        seen.compare(mine, turn, (losses, gradients), (metrics, own))
        if turn == 0:
            seen.compare_buffers(now.buffers, recipe.functional.present_buffers())
            expected = mine.computation.timetable.at(int(number)).routed
            seen.compare_model(own.keys(), touched, bool(expected))
            seen.note_reads(original.seen, start, recipe.functional)
        recipe.update(gradients, number)
        seen.compare_written(mine.plan, start.params, now.params, recipe.functional.present_parameters())
    kind = coarsest(start.params)
    return Report(
        f"engine {step.engine!r} against the recipe",
        tuple(checks(mine, seen, recipe, start, now, TOLERANCES.get(kind, COARSE_TOLERANCE))),
        {"dtype": str(kind).removeprefix("torch."), "steps": steps, **facts},
    )


def _taken(step: Step, state: State, batch: Any, turn: int) -> tuple[State, Mapping[str, Any], Mapping[str, Tensor]]:
    """A step and its gradients, with the random numbers of the turn: those of a compiled step are computed eagerly."""
    if step.compiled is None:
        with random_numbers(turn):
            half = step.compute(state, batch)
            gradients = {path: gradient.clone() for path, gradient in half.gradients.items()}
            return (*step.apply_gradients(state, half), gradients)
    with random_numbers(turn):
        gradients = step.gradients(state, batch)
    with random_numbers(turn):
        after, metrics = step(state, batch)
    return after, metrics, gradients


def _own(step: Step) -> dict[str, Tensor]:
    """The tensors of the model itself that change from step to step: nothing that runs on a copy should meet them."""
    params = step.functional.present_parameters()
    return {path: params[path] for path in step.plan.routed} | {
        path: buffer for path, buffer in step.functional.present_buffers().items() if path in step.specification.buffers
    }


def _in_float64_or_not(recipe: Recipe, batch: Any, number: Tensor, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The recipe's losses and gradients; in float64, a forward that raises may merely want its own dtype."""
    try:
        return recipe.gradients(batch, number)
    except (RuntimeError, TypeError, ValueError) as error:
        if dtype is None:
            raise RuntimeError(
                f"verify runs `losses` on a copy of the model, and that fails, though the step runs: {error}\nDoes a "
                "hook, a closure or an attribute hold the model itself (`lambda module, args, out: self...`)? Let it "
                "use the module that it is given"
            ) from error
        raise _NotInFloat64(f"{type(error).__name__}, {str(error).splitlines()[0] if str(error) else ''}") from error
