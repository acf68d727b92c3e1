"""torch's fused optimizer kernels as operators that a compiler takes as they are.

Traced, an optimizer's formula becomes code for every single parameter, and compiling that takes longer than compiling
the model (0.2 s for each on two cores). One call of the kernel that eager steps use takes none. `torch.compile` refuses
those kernels themselves, so they are wrapped, with what they overwrite declared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("funcfreeze", "FRAGMENT")

Kernel = Callable[..., None]


def opaque(name: str, overwritten: tuple[str, ...], options: str, kernel: Kernel) -> Callable[..., None]:
    """An operator `funcfreeze::name`.

    Args:
        name: of the operator.
        overwritten: the lists of tensors that it overwrites, which come first, in this order; then come the gradients.
        options: the rest of its schema.
        kernel: what it runs.
    """
    lists = ", ".join(f"Tensor({letter}!)[] {each}" for letter, each in zip("abcdef", overwritten, strict=False))
    _LIBRARY.define(f"{name}({lists}, Tensor[] grads, {options}) -> ()")
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")

    @torch.library.register_fake(f"funcfreeze::{name}", lib=_LIBRARY)
    def fake(*args: Any, **kwargs: Any) -> None:
        return None

    operator: Callable[..., None] = getattr(torch.ops.funcfreeze, name).default
    return operator


def readable(grad: Tensor, param: Tensor, written: set[int]) -> Tensor:
    """The gradient in the parameter's memory order, and in memory that the kernel will not write to.

    Gradients come in any order (expanded after a sum, transposed after a matmul), and an old-style
    `autograd.Function` may return a parameter itself as another's gradient.
    """
    if grad.stride() == param.stride() and address(grad) not in written:
        return grad
    return torch.empty_like(param, requires_grad=False).copy_(grad)


def address(tensor: Tensor) -> int:
    """Of the memory a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()
