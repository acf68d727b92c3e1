"""What a step does where a loss or a gradient is not finite: it is skipped, on the device, or raises after that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcfreeze.declare.names import OWN
from funcfreeze.optim.skip import choose, is_any_infinite, largest

CHOICES = ("ignore", "skip", "raise")
"""What `on_nonfinite` may be."""

SKIPPED = f"{OWN}skipped"
"""The metric that tells whether a step was skipped."""

_NAMED = 4
"""So many parameters are named in an error."""


class Found(NamedTuple):
    """What of a step is not finite. Each of the flags is 1.0 or 0.0, 0-d float32, on the device.

    Attributes:
        skip: whether the step is to leave everything as it was: a loss or a gradient is not finite.
        overflow: whether a gradient is not, which is what a loss scale goes by.
        undone: whether the step is to raise, so that even a loss scale stays as it is; None where none ever does.
        largest: for each gradient of `paths` its largest element, where an error is to name them.
        paths: of parameters that have a gradient.
    """

    skip: Tensor
    overflow: Tensor
    undone: Tensor | None
    largest: Tensor | None
    paths: tuple[str, ...]

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What the step adds to the user's metrics."""
        return {SKIPPED: self.skip > 0}

    def kept(self, what: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The old tensors of these paths if the step is skipped, else the new ones."""
        return {path: choose(self.skip, old[path], value, f"{what} {path}") for path, value in new.items()}


@dataclass(frozen=True)
class Finite:
    """That what a step computes has to be finite: what `Step(..., on_nonfinite="skip" or "raise")` asks for.

    A step is skipped if a present loss, or a merged gradient, is infinite or NaN. Parameters, the optimizer's state
    with its counts, and buffers come out bit-identical then; the count of steps goes on, and the metric `ff/skipped`
    says so. Nothing waits for the device, but where a forward gives a buffer another shape, and for some `from_torch`.
    Random numbers are drawn as in any step, and the Python state of modules is as the forward left it.

    A step that raises is skipped too, and then a flag is read, which waits for the device. It is not counted, and the
    state that it was given is not spent.

    With a loss scale a gradient that overflows skips the step too, and the scale goes by the gradients as ever. It
    stays as it is only where a step raises.

    Attributes:
        raises: whether a step that is skipped raises.
        is_scaled: whether there is a loss scale: that gradients overflow is its affair then, and nothing to raise for.

    >>> from torch import nn
    >>> import funcfreeze as ff
    >>> losses = lambda model, x: {"fit": model(x).square().mean()}
    >>> model = nn.Linear(2, 1)
    >>> step = ff.Step(model, losses, {"fit": "*"}, optimizer=ff.optim.adam(0.1), on_nonfinite="skip")
    >>> state, metrics = step(step.init(), torch.full((3, 2), float("nan")))
    >>> is_same = torch.equal(state.params["bias"], model.bias)
    >>> metrics["ff/skipped"], state.step, state.optimizer["bias"]["step"], is_same
    (tensor(True), tensor(1), tensor(0.), True)
    >>> step = ff.Step(model, losses, {"fit": "*"}, optimizer=ff.optim.adam(0.1), on_nonfinite="raise")
    >>> step(state, torch.full((3, 2), float("nan")))
    Traceback (most recent call last):
        ...
    FloatingPointError: step 1 (counted from 0) was not taken, because not all that it computed is finite:
      losses: fit is nan
      gradients: weight, bias
    The State that was given is as it was and can be used: go on with the next batch, or look for the cause there, ...
    """

    raises: bool
    is_scaled: bool

    @staticmethod
    def of(on_nonfinite: object, is_scaled: bool) -> Finite | None:
        """What was asked for; None if nothing.

        >>> Finite.of("skip", is_scaled=False)
        Finite(raises=False, is_scaled=False)
        >>> Finite.of(True, is_scaled=False)
        Traceback (most recent call last):
            ...
        ValueError: on_nonfinite is 'ignore', 'skip' or 'raise', got True
        """
        if not isinstance(on_nonfinite, str) or on_nonfinite not in CHOICES:
            raise ValueError(f"on_nonfinite is 'ignore', 'skip' or 'raise', got {on_nonfinite!r}")
        return None if on_nonfinite == "ignore" else Finite(on_nonfinite == "raise", is_scaled)

    def look(self, gradients: Mapping[str, Tensor], lost: Tensor, device: torch.device) -> Found:
        """What of a step is not finite. Nothing waits for the device.

        Args:
            gradients: by path.
            lost: what `lost` gives for the losses.
            device: of the flags.
        """
        sizes = largest([*gradients.values()], device)
        overflow = is_any_infinite(sizes)
        skip = torch.maximum(overflow, lost)
        named = self.raises and not self.is_scaled
        undone = (skip if named else lost) if self.raises else None
        return Found(skip, overflow, undone, sizes if named else None, tuple(gradients))

    def refuse(self, found: Found, losses: Mapping[str, Any], step: Tensor) -> None:
        """Raise if the step is one that raises: one read of a flag, which waits for the device.

        Args:
            found: what was found in the step, which has been skipped.
            losses: by name.
            step: the number of steps that were taken before.

        Raises:
            FloatingPointError: naming losses and parameters.
        """
        if found.undone is not None and found.undone > 0:
            raise FloatingPointError("\n".join(_told(found, losses, int(step))))


def lost(losses: Mapping[str, Any], device: torch.device) -> Tensor:
    """1.0 if one of the losses is infinite or NaN, else 0.0: 0-d float32, on the device.

    >>> lost({"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))}, torch.device("cpu"))
    tensor(1.)
    """
    flags = [torch.as_tensor(loss).isfinite().all().to(device) for loss in losses.values()]
    if not flags:
        return torch.zeros((), dtype=torch.float32, device=device)
    return (~torch.stack(flags).all()).to(torch.float32)


def _told(found: Found, losses: Mapping[str, Any], step: int) -> Iterator[str]:
    values = {name: float(loss) for name, loss in losses.items() if not torch.as_tensor(loss).isfinite().all()}
    yield f"step {step} (counted from 0) was not taken, because not all that it computed is finite:"
    if values:
        shown = ", ".join(f"{name} is {value}" for name, value in values.items())
        yield f"  losses: {shown}" + _others(len(losses) - len(values), "finite")
    else:
        yield "  losses: all are finite: " + ", ".join(f"{name} is {float(loss):g}" for name, loss in losses.items())
    if found.largest is not None:
        wrong = _wrong(found.paths, found.largest)
        if wrong:
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            finite = _others(len(found.paths) - len(wrong), "finite")
            yield f"  gradients: {', '.join(wrong[:_NAMED])}{more}{finite}"
        else:
            yield "  gradients: all are finite"
    yield (
        "The State that was given is as it was and can be used: go on with the next batch, or look for the cause "
        "there, with step.gradients(state, batch) under torch.autograd.detect_anomaly(). "
        'on_nonfinite="skip" leaves such steps out without an error'
    )


def _wrong(paths: Sequence[str], sizes: Tensor) -> list[str]:
    return [path for path, is_finite in zip(paths, sizes.isfinite().tolist(), strict=True) if not is_finite]


def _others(number: int, how: str) -> str:
    return f"; {number} other{'s are' if number > 1 else ' is'} {how}" if number else ""
