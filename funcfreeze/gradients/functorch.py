"""What has to be known of the transforms under way around a forward, and torch has no public question for.

`torch.func.grad`, `vmap` and their like wrap the tensors of the function that they transform: those cannot be made to
require grad and have no graph that could be planned, so what runs on them has to be made of transforms itself.
Forward-mode tangents would be lost where a tensor is detached. And AOTAutograd, tracing for `torch.compile`, follows
gradients to the inputs of its graph only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from funcfreeze.gradients.graph import gradient_edge, read_graph
from funcfreeze.model.wrappers import beneath


def is_transforming() -> bool:
    """Whether a transform of `torch.func` is under way, or forward-mode differentiation."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def refuse_constants(returned: Iterable[Tensor]) -> None:
    """While AOTAutograd traces, refuse tensors whose graph ends in one that requires grad and is no input.

    Raises:
        RuntimeError: with the shapes of those.
    """
    tensors = list(map(beneath, returned))
    if not any(isinstance(tensor, FunctionalTensor) for tensor in tensors):
        return
    graph, nodes = read_graph([gradient_edge(tensor) for tensor in tensors if tensor.requires_grad], (), None)
    ends = (getattr(nodes[index], "variable", None) for index in graph.leaves[::2])
    constants = [end for end in ends if isinstance(end, Tensor) and not isinstance(end, FunctionalTensor)]
    if constants:
        shapes = ", ".join(str(tuple(end.shape)) for end in constants)
        raise RuntimeError(
            f"inside torch.compile, `losses` depends on tensors that require grad and are none of its arguments, of "
            f"shape {shapes}: the compiled graph would hold them as constants, and gradients end there; pass them in "
            "params or *args, detach them, or call under torch.no_grad()"
        )
