"""What two sides of a verification have in common, and what they must have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.computation.state import State
from funcfreeze.declare.plan import Plan, Row
from funcfreeze.declare.plan_table import group_rows
from funcfreeze.gradients.sums import plus
from funcfreeze.model.functional import FunctionalModule
from funcfreeze.proof.recipe import Recipe
from funcfreeze.proof.report import Check
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


@dataclass
class Seen:
    """The worst differences over all steps."""

    losses: float = 0.0
    touched: list[str] = field(default_factory=list)
    rounding: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    buffers: float = 0.0
    written: set[str] = field(default_factory=set)
    writes: float = 0.0

    def compare_buffers(self, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        """Take in the buffers after the first step; later ones follow parameters that have drifted apart."""
        floating = [path for path, tensor in theirs.items() if not _counts(tensor)]
        self.buffers = _larger(0.0, *(_apart(mine[path], theirs[path]) for path in floating))

    def compare_model(self, copied: AbstractSet[str], original: AbstractSet[str], is_any_active: bool) -> None:
        """Take in what the step touches on a copy of the model and on the model itself, which should be the same.

        Args:
            copied: what is touched on a copy.
            original: what is touched on the model itself.
            is_any_active: whether some route is active at the count of this.
        """
        for path in sorted(copied ^ original):
            self.touched.append(
                f"{path} is touched on {'a copy of the model' if path in copied else 'the model itself'} only; does "
                "`losses` use the model it is given?"
            )
        if not original and is_any_active:
            self.touched.append("no loss touches any parameter, so nothing was compared")

    def note_reads(self, read: Iterable[str], start: State, recipe: FunctionalModule) -> None:
        """Take in what a forward on a copy has read of the model itself: parameters, and buffers that have changed."""
        after = recipe.present_buffers()
        for path in read:
            if path in start.params or not _identical(start.buffers[path], after[path]):
                self.touched.append(
                    f"{path} of the model itself is used in a forward on a copy of it; does `losses` use the model it "
                    "is given?"
                )

    def compare_written(
        self, plan: Plan, start: Mapping[str, Tensor], mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
    ) -> None:
        """Take in how far forwards have moved the parameters that no loss may update, from the start."""
        still = set(plan.paths) - set(plan.routed)
        moved = {path for path in still if not _identical(start[path], theirs[path].detach())}
        self.written |= moved | {path for path in still if not _identical(start[path], mine[path])}
        apart = _norm([mine[path] - theirs[path].detach() for path in self.written])
        scale = _norm([theirs[path].detach() - start[path] for path in self.written])
        rounding = max((1e3 * _precision(start[path]) * _norm([start[path]]) for path in moved), default=0.0)
        if apart > 0:
            self.writes = _larger(self.writes, apart / max(scale, rounding) if max(scale, rounding) > 0 else math.inf)

    def compare(self, step: Step, turn: int, recipe: tuple[Any, Any], mine: tuple[Any, Any]) -> None:
        """Take in one step: losses and gradients of both sides."""
        (losses, gradients), (metrics, own) = recipe, mine
        self.take_in(gradients)
        self.compare_losses(losses, metrics)
        for path in gradients.keys() - own.keys():
            self.touched.append(f"step {turn}: {path} has a gradient in the recipe and none here")
        for path in own.keys() - gradients.keys():
            self.touched.append(f"step {turn}: {path} has a gradient here and none in the recipe")
        for title, error in by_group(step.plan.rows, own, gradients, GRADIENT_FLOOR).items():
            self.gradients[title] = _larger(self.gradients.get(title, 0.0), error)

    def take_in(self, gradients: Mapping[str, Tensor]) -> None:
        """Note what the recipe reaches at a step, and which of it is nothing but rounding."""
        self.reached |= gradients.keys()
        largest = max(
            (float(_size(gradient).max()) for gradient in gradients.values() if gradient.numel()), default=0.0
        )
        for path, gradient in gradients.items():
            self.rounding[path] = _is_rounding(_size(gradient), largest) | self.rounding.get(path, torch.tensor(False))

    def compare_losses(self, theirs: Mapping[str, Tensor], mine: Mapping[str, Any]) -> None:
        """Take in the losses of both sides at a step."""
        self.losses = _larger(self.losses, *(_apart(mine.get(name), loss) for name, loss in theirs.items()))

    def displacements(
        self, rows: Sequence[Row], start: Mapping[str, Tensor], mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """For every group of parameters how far apart the two sides have gone from the start."""
        moved = {path: self.beyond_rounding(path, mine[path] - start[path]) for path in self.reached}
        wanted = {path: self.beyond_rounding(path, theirs[path].detach() - start[path]) for path in self.reached}
        return by_group(rows, moved, wanted, DISPLACEMENT_FLOOR)

    def beyond_rounding(self, path: str, displacement: Tensor) -> Tensor:
        """A displacement without the elements whose gradient was nothing but rounding at some step."""
        return displacement.masked_fill(self.rounding[path].to(displacement.device), 0.0)


def _precision(tensor: Tensor) -> float:
    """The relative step from one number to the next; 0 where numbers are whole."""
    return 0.0 if _counts(tensor) else torch.finfo(tensor.dtype).eps


def _is_rounding(size: Tensor, largest: float) -> Tensor:
    """Elements that are not zero, but so small beside the largest of all that their sign means nothing.

    An adaptive optimizer makes whole steps of them: of a bias before BatchNorm, say.
    """
    return (size > 0) & (size < 1e3 * torch.finfo(size.dtype).eps * largest)


def _size(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).abs()


def coarsest(params: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype with the fewest digits."""
    floating = [tensor.dtype for tensor in params.values() if tensor.is_floating_point() or tensor.is_complex()]
    return max(floating, key=lambda kind: torch.finfo(kind).eps)


def checks(
    step: Step, seen: Seen, recipe: Recipe, start: State, end: State, tolerances: tuple[float, float]
) -> Iterator[Check]:
    near, far = tolerances
    names = step.plan.losses
    yield Check("losses", names, seen.losses, near)
    yield exactly("touched sets", seen.touched, f"{len(seen.reached)} touched", names)
    theirs = recipe.functional.present_parameters()
    displacement = seen.displacements(step.plan.rows, start.params, end.params, theirs)
    for group in group_rows([row for row in step.plan.rows if row.weights]):
        losses = tuple(name for name in names if name in group.rows[0].weights)
        missed = [row.path for row in group.rows if row.path not in seen.reached]
        yield Check(f"{group.title} gradients", losses, seen.gradients[group.title], near, _never_touched(missed))
        yield Check(f"{group.title} displacement", losses, displacement[group.title], far)
    still = set(step.plan.paths) - seen.reached - seen.written
    yield exactly(
        "untouched parameters",
        _moved(start.params, end.params, still),
        f"{len(still)} bit-identical" if still else "none: all are touched",
    )
    yield exactly("their optimizer state", _changed_entries(start.optimizer, end.optimizer, still), "bit-identical")
    if seen.written:
        shown = f"{', '.join(sorted(seen.written)[:3])}{', ...' if len(seen.written) > 3 else ''}"
        yield Check("written by the forward", (), seen.writes, far, shown)
    yield from buffer_checks(seen, end.buffers, recipe.functional.present_buffers(), near)
    yield from recipe.twins.checks(start, end, far)


def _never_touched(paths: Sequence[str]) -> str:
    """What to notice about parameters that a loss may update and no loss reaches."""
    if not paths:
        return ""
    return f"never touched, though routed: {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}"


def exactly(subject: str, problems: list[str], good: str, losses: tuple[str, ...] = ()) -> Check:
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


def buffer_checks(
    seen: Seen, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float
) -> Iterator[Check]:
    if not theirs:
        return
    whole = {path for path, tensor in theirs.items() if _counts(tensor)}
    wrong = [
        f"{path} is {_shown(mine[path])} here and {_shown(theirs[path])} in the recipe"
        for path in sorted(whole)
        if not _identical(mine[path], theirs[path])
    ]
    yield exactly("buffer counts", wrong, f"{len(whole)} equal")
    yield Check("buffers, one step", (), seen.buffers, tolerance)


def _counts(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def _shown(tensor: Tensor) -> str:
    return str(tensor.tolist()) if tensor.numel() <= 8 else f"of shape {tuple(tensor.shape)}"


def by_group(
    rows: Sequence[Row], mine: Mapping[str, Tensor], wanted: Mapping[str, Tensor], floor: float
) -> dict[str, float]:
    """For every group of parameters ‖mine − wanted‖ / ‖wanted‖, where the divisor is at least a part of the whole."""
    paths = mine.keys() | wanted.keys()
    least = floor * _norm([wanted[path] for path in wanted])
    errors = {}
    for group in group_rows([row for row in rows if row.weights]):
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
