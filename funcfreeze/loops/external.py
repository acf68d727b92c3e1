"""Losses that are vectors, with a gradient from outside for each of their elements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from funcfreeze.declare.plan import raise_problems
from funcfreeze.declare.selectors import closest


def with_gradients(
    losses: Mapping[str, Tensor | None], gradient: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor | None]:
    """The losses, with Σ gradient · loss for those that have a gradient, which is what `loss.backward(gradient)` is.

    Args:
        losses: by name.
        gradient: by the name of a loss, of its shape; constants.

    Raises:
        TypeError: not a mapping.
        RouteError: every gradient that fits no loss.

    >>> import torch
    >>> q = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> with_gradients({"q": q}, {"q": torch.tensor([3.0, 4.0])})
    {'q': tensor(11., grad_fn=<SumBackward0>)}
    """
    if gradient is None or not isinstance(losses, Mapping):  # what is no mapping is refused later
        return losses
    if not isinstance(gradient, Mapping):
        raise TypeError(f'gradient= is a mapping by loss, such as {{"Q": cotangent}}, got {type(gradient).__name__}')
    raise_problems([*_problems(losses, gradient)])
    found = dict(losses)
    for name, given in gradient.items():
        loss = losses[name]
        if isinstance(loss, Tensor):  # what is neither that nor None is refused later
            found[name] = (loss * given.detach().to(loss.dtype)).sum()
    return found


def _problems(losses: Mapping[str, Tensor | None], gradient: Mapping[str, Tensor]) -> Iterator[str]:
    for name, given in gradient.items():
        if name not in losses:
            yield f"gradient[{name!r}]: there is no such loss{closest(str(name), map(str, losses))}"
            continue
        loss = losses[name]
        if loss is None:
            continue
        if not isinstance(given, Tensor):
            yield f"gradient[{name!r}] is a tensor of the loss's shape, got {type(given).__name__}"
        elif isinstance(loss, Tensor) and (loss.shape, loss.device) != (given.shape, given.device):
            yield (
                f"gradient[{name!r}] has shape {tuple(given.shape)} on {given.device}, the loss has shape "
                f"{tuple(loss.shape)} on {loss.device}"
            )
        elif isinstance(loss, Tensor) and given.is_complex() and not loss.is_complex():
            yield f"gradient[{name!r}] is {given.dtype}, the loss {loss.dtype}, and the imaginary part would be lost"
