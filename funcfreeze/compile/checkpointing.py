"""Activation checkpointing in a step that is one graph: what runs again in the backward is traced again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from funcfreeze.compile.private import TorchDispatchMode, tree_map_only


def checkpointed(part: Callable[..., Any], *args: Any) -> Any:
    """Run a part of a captured graph now, and again in the backward.

    What requires no grad, as buffers that the part updates do, is not saved by it, and the second run gets copies.
    Random numbers are drawn once and kept: in one graph, an operator that runs again would draw others.
    """
    own = [index for index, given in enumerate(args) if isinstance(given, Tensor) and given.requires_grad]
    is_again = False

    def run(*given: Tensor) -> Any:
        nonlocal is_again
        full = [arg.clone() if is_again and isinstance(arg, Tensor) else arg for arg in args]
        for index, tensor in zip(own, given, strict=True):
            full[index] = tensor
        is_again = True
        return part(*full)

    def modes() -> tuple[_Drawing, _DrawnBefore]:
        drawn: list[Any] = []
        return _Drawing(drawn), _DrawnBefore(drawn)

    return checkpoint(run, *[args[index] for index in own], use_reentrant=False, context_fn=modes)


class _Drawing(TorchDispatchMode):
    """Keeps what random operators give."""

    def __init__(self, drawn: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._drawn = drawn

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._drawn.append(tree_map_only(Tensor, torch.clone if func._schema.is_mutable else Tensor.detach, given))
        return given


class _DrawnBefore(TorchDispatchMode):
    """Random operators give what was kept."""

    def __init__(self, drawn: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._drawn = drawn
        self._next = iter(drawn)

    def __enter__(self) -> Any:
        self._next = iter(self._drawn)  # every engine call that comes by runs the part again
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch's

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        drawn = next(self._next)
        return args[0].copy_(drawn) if func._schema.is_mutable else drawn
