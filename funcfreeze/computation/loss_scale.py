"""Dynamic loss scaling: gradients that float16 can hold, and steps skipped on the device where it could not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from funcfreeze.computation.finite import Found
from funcfreeze.optim import Transform
from funcfreeze.optim.skip import find_non_finite, keep_if, skippable, update_unless
from funcfreeze.optim.transform import OptState, PyTree, by_path, in_place_options, match

ScaleState = Mapping[str, Tensor]
"""`scale`, 0-d float32, and `growth_tracker`, 0-d int32: the steps since the scale last changed."""


@dataclass(frozen=True, init=False)
class LossScale:
    """A factor on every loss's backward pass that is as large as float16 lets it be; the numbers of GradScaler.

    Every loss starts its backward pass with the scale instead of 1, and gradients are divided by it before anyone sees
    them. If one is infinite or NaN then, the step changes no parameter and no optimizer state, counts included, and the
    scale backs off; after `growth_interval` steps without that it grows. All of it happens on the device: nothing
    waits. Parameters that no loss touches this time do not count, and a step that touches none leaves the scale alone.

    Args:
        init_scale: the scale of the first step.
        growth_factor: what it is multiplied by when it grows; at least 1.
        backoff_factor: what it is multiplied by after a skipped step; at most 1.
        growth_interval: after how many steps in a row that were not skipped it grows.
        init: `init_scale` as version 0.1.0 spelled it, which works still.

    >>> scale = LossScale(init_scale=8.0, growth_interval=2)
    >>> state = scale.start(torch.device("cpu"))
    >>> for found_inf in (0.0, 0.0, 1.0):
    ...     state = scale.update(state, torch.tensor(found_inf))
    ...     print(float(state["scale"]), int(state["growth_tracker"]))
    8.0 1
    16.0 0
    8.0 0
    >>> LossScale(backoff_factor=2.0)
    Traceback (most recent call last):
        ...
    ValueError: LossScale: backoff_factor must be above 0 and at most 1, got 2.0
    """

    init_scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        *,
        init: float | None = None,
    ) -> None:
        if init is not None and init_scale != 2.0**16:
            raise TypeError(f"LossScale: init is another name of init_scale; got {init_scale!r} and {init!r}")
        values = {
            "init_scale": init_scale if init is None else init,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        largest = torch.finfo(torch.float32).max
        _check("init_scale", self.init_scale, 0 < _number(self.init_scale) <= largest, "a finite number above 0")
        _check("growth_factor", self.growth_factor, 1 <= _number(self.growth_factor) < _ENDLESS, "at least 1")
        _check("backoff_factor", self.backoff_factor, 0 < _number(self.backoff_factor) <= 1, "above 0 and at most 1")
        if type(self.growth_interval) is not int or self.growth_interval < 1:
            raise ValueError(f"LossScale: growth_interval must be an int of at least 1, got {self.growth_interval!r}")

    @staticmethod
    def fixed(scale: float) -> LossScale:
        """A scale that never changes; steps with infinite gradients are skipped all the same.

        >>> LossScale.fixed(1024.0)
        LossScale(init_scale=1024.0, growth_factor=1.0, backoff_factor=1.0, growth_interval=2000)
        """
        return LossScale(scale, growth_factor=1.0, backoff_factor=1.0)

    @property
    def init(self) -> float:
        """`init_scale`, as version 0.1.0 spelled it."""
        return self.init_scale

    def start(self, device: torch.device) -> ScaleState:
        """The state before the first step."""
        return {
            "scale": torch.full((), self.init_scale, dtype=torch.float32, device=device),
            "growth_tracker": torch.zeros((), dtype=torch.int32, device=device),
        }

    def update(self, state: ScaleState, found_inf: Tensor) -> ScaleState:
        """The state after a step in which `found_inf` was 1 (something was not finite) or 0."""
        scale, tracker = state["scale"], state["growth_tracker"]
        skipped = found_inf.to(scale.device) > 0
        precise = scale.double()  # torch's kernels multiply by a double too
        grown = (precise * self.growth_factor).to(scale.dtype)
        due = tracker + 1 >= self.growth_interval
        going_on = torch.where(due & grown.isfinite(), grown, scale)
        return {
            "scale": torch.where(skipped, (precise * self.backoff_factor).to(scale.dtype), going_on),
            "growth_tracker": torch.where(skipped | due, torch.zeros_like(tracker), tracker + 1),
        }

    def around(self, transform: Transform) -> Transform:
        """The transform on unscaled gradients, skipped as a whole where one of them is not finite.

        Its state is `{"loss_scale": {"scale", "growth_tracker"}, "optimizer": the transform's own}`. Both of its forms
        take `found`, from those who have looked at the gradients already, and whose step may be skipped for the losses.
        """

        def init(params: PyTree) -> OptState:
            tensors = by_path(params).tensors.values()
            device = next((tensor.device for tensor in tensors), torch.device("cpu"))
            return {"loss_scale": self.start(device), "optimizer": transform.init(params)}

        def update(
            grads: PyTree,
            state: OptState,
            params: PyTree,
            *,
            step: int | Tensor | None = None,
            found: Found | None = None,
        ) -> tuple[PyTree, OptState]:
            scaling, own = state["loss_scale"], state["optimizer"]
            skip, after = judged(grads, params, scaling, found)
            if skip is None:
                updates, optimizer = transform.update(grads, own, params, step=step)
            else:
                updates, optimizer = update_unless(skip, transform, grads, own, params, step)
            return updates, {"loss_scale": after, "optimizer": optimizer}

        def judged(
            grads: PyTree, params: PyTree, scaling: ScaleState, found: Found | None
        ) -> tuple[Tensor | None, ScaleState]:
            """Whether the step is skipped, None if there is nothing to skip, and the scale's state after it."""
            touched = match(grads, by_path(params))
            if not touched:
                return None if found is None else found.skip, scaling
            if found is None:
                overflow = find_non_finite(touched.values(), scaling["scale"].device)
                return overflow, self.update(scaling, overflow)
            after = self.update(scaling, found.overflow)
            return found.skip, after if found.undone is None else keep_if(found.undone, scaling, after)

        run = transform.in_place

        def in_place(
            grads: PyTree,
            state: OptState,
            params: PyTree,
            *,
            step: int | Tensor | None = None,
            found: Found | None = None,
        ) -> Callable[[], OptState]:
            assert run is not None
            scaling, own = state["loss_scale"], state["optimizer"]
            skip, after = judged(grads, params, scaling, found)
            commit = run(grads, own, params, **in_place_options(step, skip))

            def both() -> OptState:
                optimizer = commit()
                return {
                    "loss_scale": {name: kept.copy_(after[name]) for name, kept in scaling.items()},
                    "optimizer": optimizer,
                }

            return both

        measure = transform.measuring
        return Transform(
            init,
            update,
            None if run is None else in_place,
            algorithms=transform.algorithms,
            measuring=None if measure is None else lambda note: self.around(measure(note)),
        )


def scaled(transform: Transform, loss_scale: object) -> Transform:
    """The transform with a loss scale around it, if there is one.

    Raises:
        TypeError: neither a `LossScale` nor None.
    """
    if loss_scale is None:
        return transform
    if not isinstance(loss_scale, LossScale):
        raise TypeError(
            f"loss_scale is a funcfreeze.LossScale, or None; got {type(loss_scale).__name__}: {loss_scale!r}"
        )
    return loss_scale.around(skippable(transform))


def scale_in(optimizer: OptState) -> Tensor:
    """The present scale, from the state of a transform that a loss scale is around."""
    scale: Tensor = optimizer["loss_scale"]["scale"]
    return scale


Key = TypeVar("Key")


def unscale(gradients: Mapping[Key, Tensor], scale: Tensor) -> dict[Key, Tensor]:
    """The gradients divided by the scale, by GradScaler's arithmetic.

    float16 becomes float32: what the scale has saved would be lost again in float16.

    >>> unscale({"w": torch.tensor([8.0, 2.0])}, torch.tensor(4.0))
    {'w': tensor([2.0000, 0.5000])}
    """
    with torch.inference_mode(False), torch.no_grad():
        factor = scale.double().reciprocal().float()
        return {path: _times(gradient, factor.to(gradient.device)) for path, gradient in gradients.items()}


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    if gradient.is_sparse:
        half = gradient.dtype == torch.float16
        gradient = gradient.coalesce() if half else gradient  # adding up may overflow, which the check is to see
        return torch.sparse_coo_tensor(
            gradient._indices(),
            _times(gradient._values(), factor),
            gradient.shape,
            is_coalesced=gradient.is_coalesced(),
            check_invariants=False,
        )
    wide = gradient.float() if gradient.dtype == torch.float16 else gradient
    return (wide * factor).to(wide.dtype)  # a 0-d gradient would be promoted


_ENDLESS = float("inf")


def _number(value: object) -> float:
    """The value, or NaN, which lies in no range, if it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"LossScale: {name} must be {wanted}, got {value!r}")
