"""Whether code runs for its result, or for a compiler that writes down what it does."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler is looking on, or the tensor only stands for one.

    What Dynamo hands on to be traced by others (`nonstrict_trace`) counts as compiling for `torch.compiler` since 2.13
    only; the tensors are stand-ins then, as they are in a `FakeTensorMode` without any compiler.

    >>> from torch._subclasses import FakeTensorMode
    >>> with FakeTensorMode():
    ...     is_traced(torch.ones(1))
    True
    >>> is_traced(torch.ones(1))
    False
    """
    return torch.compiler.is_compiling() or is_stand_in(tensor)


def is_stand_in(tensor: Tensor) -> bool:
    """Whether it is a `FakeTensor` or a `FunctionalTensor`, by which compilers trace."""
    return type(tensor).__module__.startswith("torch._subclasses.f")
