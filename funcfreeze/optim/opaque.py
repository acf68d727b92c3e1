"""torch's fused optimizer kernels as operators that a compiler takes as they are.

Traced, an optimizer's formula becomes code for every single parameter, and compiling that takes longer than compiling
the model (0.2 s for each on two cores). One call of the kernel that eager steps use takes none. `torch.compile` refuses
those kernels themselves, so they are wrapped, with what they overwrite declared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("funcfreeze", "FRAGMENT")  # type: ignore[no-untyped-call]


KERNELS: dict[Any, Callable[..., None]] = {}
"""What each operator runs."""


def opaque(name: str, overwritten: Sequence[str], rest: str, kernel: Callable[..., None]) -> Callable[..., None]:
    """An operator `funcfreeze::name` that overwrites lists of tensors.

    Args:
        name: of the operator.
        overwritten: its first arguments, the lists that it overwrites.
        rest: the schema of the others.
        kernel: what it runs, with the same arguments.
    """
    lists = ", ".join(f"Tensor({letter}!)[] {each}" for letter, each in zip("abcdef", overwritten, strict=False))
    _LIBRARY.define(f"{name}({lists}, {rest}) -> ()")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"funcfreeze::{name}", _computes_nothing, lib=_LIBRARY)
    operator: Callable[..., None] = getattr(torch.ops.funcfreeze, name).default
    KERNELS[operator] = kernel
    return operator


def _computes_nothing(*args: Any, **kwargs: Any) -> None:
    """What is overwritten keeps its shape, and there is nothing else."""


def readable(grads: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in the parameters' memory order and dtype: they come in any (expanded after a sum, transposed)."""
    return [
        grad
        if grad.stride() == param.stride() and grad.dtype == param.dtype and not grad.is_neg()
        else torch.empty_like(param, requires_grad=False).copy_(grad)
        for grad, param in zip(grads, params, strict=True)
    ]
