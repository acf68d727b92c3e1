"""Proof on the user's own model: a step's engine against the recipe, in eager PyTorch, on copies of both."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcfreeze.computation.specification import check_fits
from funcfreeze.computation.state import State
from funcfreeze.declare.plan_table import group_rows
from funcfreeze.gradients.sums import plus
from funcfreeze.model.functional import FunctionalModule
from funcfreeze.proof.recipe import Recipe, random_numbers
from funcfreeze.proof.report import Check, Report
from funcfreeze.step import Step

TOLERANCES: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-8, 1e-6),
    torch.float32: (1e-3, 1e-1),
}
"""How far gradients and displacements may be apart, relative to the norm of the group of parameters they belong to.

Merged sums agree with the recipe to rounding only; what has drifted apart by rounding gives other losses, gradients and
buffers at the next step.
"""

COARSE_TOLERANCE = (5e-2, 5e-1)
"""For bfloat16, float16 and whatever else is not in the table."""

GRADIENT_FLOOR, DISPLACEMENT_FLOOR = 1e-4, 1e-1
"""A group whose norm is less than this part of the whole is measured against this part of the whole."""


def verify(step: Step, state: State, batch: Any, *, steps: int = 5) -> Report:
    """Prove a step equal to the recipe on its own model, state and batch.

    The recipe runs on a copy of the real module: one forward, `requires_grad` toggled, and for each loss one
    `backward(retain_graph=True)`. The step runs on another copy with its own engine. Both get the same random numbers.
    Compared are, at every step, losses, touched sets and gradients; after the last, displacements from the start,
    buffers, and that what is frozen or untouched is bit-identical, its optimizer state included. In float64 if the
    model can, else in its own dtype.

    The model, the state and the generators of torch, `random` and numpy are left as they were. `losses` runs several
    times a step; a generator of your own that it draws from makes the sides differ.

    Args:
        step: the step to verify.
        state: a state of it; the comparison starts there.
        batch: a batch that `losses` takes.
        steps: how many steps to take.

    Returns:
        A report with `ok`, a readable `str()` and `to_dict()`.

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
    state = check_fits(state, step.specification)
    try:
        return _compare(step, state, batch, steps, torch.float64, {})
    except _NotInFloat64 as error:
        return _compare(step, state, batch, steps, None, {"because": f"float64 failed: {error}"})


class _NotInFloat64(Exception):
    """The recipe cannot run the model in float64."""


def _compare(
    step: Step, state: State, batch: Any, steps: int, dtype: torch.dtype | None, facts: Mapping[str, str]
) -> Report:
    module = _module_copy(step, dtype)
    mine = Step(
        module,
        step.losses,
        step.plan,
        optimizer=step.optimizer,
        engine=step.engine,
        compile=_with_torchs_random_numbers(step),
        donate=step.donate,
        loss_scale=step.loss_scale,
    )
    now, given, batch = _cast_state(state, dtype, mine.specification.optimizer), batch, _cast(batch, dtype)
    recipe = Recipe(mine, _module_copy(step, dtype), now)
    start = copy.deepcopy(now)
    seen = _Seen()
    for turn in range(steps):
        number = now.step
        with random_numbers(turn):
            losses, gradients = _in_float64_or_not(recipe, batch, number, dtype)
        with random_numbers(turn):
            own = mine.gradients(now, batch)
        with random_numbers(turn):
            now, metrics = mine(now, batch)
        seen.compare(mine, turn, (losses, gradients), (metrics, own))
        if turn == 0:
            seen.compare_buffers(now.buffers, recipe.functional.present_buffers())
            with random_numbers(turn):
                seen.compare_model(own.keys(), step.gradients(state, given).keys())
        recipe.update(gradients, number)
    kinds = [tensor.dtype for tensor in start.params.values() if tensor.is_floating_point() or tensor.is_complex()]
    kind = max(kinds, key=lambda kind: torch.finfo(kind).eps)
    return Report(
        f"engine {step.engine!r} against the recipe",
        tuple(_checks(mine, seen, recipe, start, now, TOLERANCES.get(kind, COARSE_TOLERANCE))),
        {"dtype": str(kind).removeprefix("torch."), "steps": steps, **facts},
    )


def _with_torchs_random_numbers(step: Step) -> Any:
    """How the step is compiled, but with eager torch's random numbers: Inductor draws others from the same seed."""
    if step.compiled is None or step.compiled.options.backend != "inductor":
        return step.compile
    given = step.compile if isinstance(step.compile, Mapping) else {}
    return {**given, "options": {**(given.get("options") or {}), "fallback_random": True}}


def _module_copy(step: Step, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the step's model in another dtype; ties stay ties, which `Module.to` does not see to for buffers."""
    functional = FunctionalModule.of(copy.deepcopy(step.module))
    if dtype is not None:
        functional.exchange(lambda tensor: _cast(tensor, dtype))
    return functional.module


def _cast_state(state: State, dtype: torch.dtype | None, wanted: Any) -> State:
    """The state in another dtype, its optimizer state as a step in that dtype would start it."""
    known = dict(zip(*optree.tree_flatten_with_path(wanted)[:2], strict=True))

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(known.get(path), Tensor):  # counts, a loss scale and moments may have a dtype of their own
            return _cast(leaf, None if dtype is None else known[path].dtype)
        # what an optimizer has made since then: torch's kernels ask for their own counts in float32
        return _cast(leaf, None if path and path[-1] == "step" else dtype)

    optimizer = optree.tree_map_with_path(cast, state.optimizer)
    return State(_cast(state.params, dtype), _cast(state.buffers, dtype), optimizer, state.step.clone())


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a pytree with its floating tensors in another precision, complex ones too, or in their own."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if dtype is None or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf.detach().clone()
        return leaf.detach().to(dtype.to_complex() if leaf.is_complex() else dtype, copy=True)

    return optree.tree_map(cast, tree, none_is_leaf=True)


def _in_float64_or_not(recipe: Recipe, batch: Any, number: Tensor, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The recipe's losses and gradients; in float64, a forward that raises may merely want its own dtype."""
    try:
        return recipe.gradients(batch, number)
    except (RuntimeError, TypeError, ValueError) as error:
        if dtype is None:
            raise
        raise _NotInFloat64(f"{type(error).__name__}, {str(error).splitlines()[0] if str(error) else ''}") from error


# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """The worst differences over all steps."""

    losses: float = 0.0
    touched: list[str] = field(default_factory=list)
    rounding: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    buffers: float = 0.0

    def compare_buffers(self, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        """Take in the buffers after the first step; later ones follow parameters that have drifted apart."""
        floating = [path for path, tensor in theirs.items() if not _counts(tensor)]
        self.buffers = _larger(0.0, *(_apart(mine[path], theirs[path]) for path in floating))

    def compare_model(self, copied: AbstractSet[str], original: AbstractSet[str]) -> None:
        """Take in what the step touches on a copy of the model and on the model itself, which should be the same."""
        for path in sorted(copied ^ original):
            self.touched.append(
                f"{path} is touched on {'a copy of the model' if path in copied else 'the model itself'} only; does "
                "`losses` use the model it is given?"
            )
        if not original:
            self.touched.append("no loss touches any parameter, so nothing was compared")

    def compare(self, step: Step, turn: int, recipe: tuple[Any, Any], mine: tuple[Any, Any]) -> None:
        """Take in one step: losses and gradients of both sides."""
        (losses, gradients), (metrics, own) = recipe, mine
        self.reached |= gradients.keys()
        largest = max(
            (float(_size(gradient).max()) for gradient in gradients.values() if gradient.numel()), default=0.0
        )
        for path, gradient in gradients.items():
            self.rounding[path] = _is_rounding(_size(gradient), largest) | self.rounding.get(path, torch.tensor(False))
        self.losses = _larger(self.losses, *(_apart(metrics.get(name), loss) for name, loss in losses.items()))
        for path in gradients.keys() - own.keys():
            self.touched.append(f"step {turn}: {path} has a gradient in the recipe and none here")
        for path in own.keys() - gradients.keys():
            self.touched.append(f"step {turn}: {path} has a gradient here and none in the recipe")
        for title, error in _by_group(step, own, gradients, GRADIENT_FLOOR).items():
            self.gradients[title] = _larger(self.gradients.get(title, 0.0), error)

    def beyond_rounding(self, path: str, displacement: Tensor) -> Tensor:
        """A displacement without the elements whose gradient was nothing but rounding at some step."""
        return displacement.masked_fill(self.rounding[path].to(displacement.device), 0.0)


def _is_rounding(size: Tensor, largest: float) -> Tensor:
    """Elements that are not zero, but so small beside the largest of all that their sign means nothing.

    An adaptive optimizer makes whole steps of them: of a bias before BatchNorm, say.
    """
    return (size > 0) & (size < 1e3 * torch.finfo(size.dtype).eps * largest)


def _size(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).abs()


def _checks(
    step: Step, seen: _Seen, recipe: Recipe, start: State, end: State, tolerances: tuple[float, float]
) -> Iterator[Check]:
    near, far = tolerances
    names = step.plan.losses
    yield Check("losses", names, seen.losses, near)
    yield _exactly("touched sets", seen.touched, f"{len(seen.reached)} touched", names)
    theirs = recipe.functional.present_parameters()
    moved = {path: seen.beyond_rounding(path, end.params[path] - start.params[path]) for path in seen.reached}
    wanted = {path: seen.beyond_rounding(path, theirs[path].detach() - start.params[path]) for path in seen.reached}
    displacement = _by_group(step, moved, wanted, DISPLACEMENT_FLOOR)
    for group in group_rows([row for row in step.plan.rows if row.weights]):
        losses = tuple(name for name in names if name in group.rows[0].weights)
        missed = [row.path for row in group.rows if row.path not in seen.reached]
        yield Check(f"{group.title} gradients", losses, seen.gradients[group.title], near, _never_touched(missed))
        yield Check(f"{group.title} displacement", losses, displacement[group.title], far)
    still = set(step.plan.paths) - seen.reached
    yield _exactly(
        "untouched parameters",
        _moved(start.params, end.params, still),
        f"{len(still)} bit-identical" if still else "none: all are touched",
    )
    yield _exactly("their optimizer state", _changed_entries(start.optimizer, end.optimizer, still), "bit-identical")
    yield from _buffer_checks(seen, end.buffers, recipe.functional.present_buffers(), near)


def _never_touched(paths: Sequence[str]) -> str:
    """What to notice about parameters that a loss may update and no loss reaches."""
    if not paths:
        return ""
    return f"never touched, though routed: {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}"


def _exactly(subject: str, problems: list[str], good: str, losses: tuple[str, ...] = ()) -> Check:
    """A check of something that is right or wrong."""
    if not problems:
        return Check(subject, losses, detail=good)
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return Check(subject, losses, error=math.inf, detail="; ".join(problems[:3]) + more)


def _moved(start: Mapping[str, Tensor], end: Mapping[str, Tensor], paths: set[str]) -> list[str]:
    return [f"{path} has changed" for path in sorted(paths) if not _identical(start[path], end[path])]


def _changed_entries(start: Any, end: Any, paths: set[str]) -> list[str]:
    """Entries of untouched parameters anywhere in the optimizer state that have changed or appeared."""
    before, after = _entries(start, paths), _entries(end, paths)
    return [
        f"{'.'.join(map(str, key))} has changed"
        for key in sorted(before.keys() | after.keys(), key=str)
        if not _identical(before.get(key), after.get(key))
    ]


def _entries(optimizer: Any, paths: set[str]) -> dict[tuple[Any, ...], Any]:
    keys, leaves, _ = optree.tree_flatten_with_path(optimizer)
    return {key: leaf for key, leaf in zip(keys, leaves, strict=True) if paths.intersection(map(str, key))}


def _identical(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return type(one) is type(other) and bool(one == other)


def _buffer_checks(
    seen: _Seen, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float
) -> Iterator[Check]:
    if not theirs:
        return
    whole = {path for path, tensor in theirs.items() if _counts(tensor)}
    wrong = [
        f"{path} is {_shown(mine[path])} here and {_shown(theirs[path])} in the recipe"
        for path in sorted(whole)
        if not _identical(mine[path], theirs[path])
    ]
    yield _exactly("buffer counts", wrong, f"{len(whole)} equal")
    yield Check("buffers, one step", (), seen.buffers, tolerance)


def _counts(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def _shown(tensor: Tensor) -> str:
    return str(tensor.tolist()) if tensor.numel() <= 8 else f"of shape {tuple(tensor.shape)}"


def _by_group(step: Step, mine: Mapping[str, Tensor], wanted: Mapping[str, Tensor], floor: float) -> dict[str, float]:
    """For every group of parameters ‖mine − wanted‖ / ‖wanted‖, where the divisor is at least a part of the whole."""
    paths = mine.keys() | wanted.keys()
    least = floor * _norm([wanted[path] for path in wanted])
    errors = {}
    for group in group_rows([row for row in step.plan.rows if row.weights]):
        inside = [row.path for row in group.rows if row.path in paths]
        difference = _norm([_minus(mine.get(path), wanted.get(path)) for path in inside])
        scale = max(_norm([wanted[path] for path in inside if path in wanted]), least)
        errors[group.title] = difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
    return errors


def _minus(mine: Tensor | None, wanted: Tensor | None) -> Tensor:
    if mine is None or wanted is None:
        present = wanted if mine is None else mine
        assert present is not None, "a path comes from one side or the other"
        return present
    return plus(mine, -wanted)


def _norm(tensors: list[Tensor]) -> float:
    dense = (tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors)
    return math.sqrt(sum(float(tensor.abs().double().square().sum()) for tensor in dense))


def _apart(mine: Tensor | None, wanted: Tensor) -> float:
    """‖mine − wanted‖ / ‖wanted‖ of one tensor."""
    if mine is None or mine.shape != wanted.shape:
        return math.inf
    difference, scale = _norm([mine - wanted]), _norm([wanted])
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)


def _larger(*values: float) -> float:
    """The largest, or NaN if one is."""
    return math.nan if any(map(math.isnan, values)) else max(values)
