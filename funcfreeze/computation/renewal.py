"""Optimizer state that starts afresh for some parameters, as the optimizer's `init` makes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.computation.structure import is_entry
from funcfreeze.optim import Transform
from funcfreeze.optim.transform import lines


def renewed(transform: Transform, optimizer: Any, params: Mapping[str, Tensor], *, is_scaled: bool = False) -> Any:
    """The optimizer's state with fresh entries for these parameters, and all other tensors the very same.

    Args:
        transform: the optimizer.
        optimizer: its state.
        params: the parameters, by path.
        is_scaled: whether a loss scale is around it, which stays as it is.

    >>> from funcfreeze.optim import chain, clip_by_global_norm, sgd
    >>> transform = chain(clip_by_global_norm(1.0), sgd(0.1, momentum=0.9))
    >>> params = {"a": torch.zeros(1), "b": torch.zeros(1)}
    >>> _, state = transform.update({"a": torch.ones(1), "b": torch.zeros(1)}, transform.init(params), params)
    >>> renewed(transform, state, {"a": params["a"]})[1]["a"]
    {'momentum_buffer': tensor([0.])}
    """
    with torch.inference_mode(False), torch.no_grad():
        fresh = transform.init(params)
        # some optimizers begin with the parameters themselves, which a step overwrites
        fresh = optree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, fresh)
    if is_scaled:
        return {**optimizer, "optimizer": _with_fresh(optimizer["optimizer"], fresh["optimizer"], params)}
    return _with_fresh(optimizer, fresh, params)


def _with_fresh(kept: Any, fresh: Any, paths: Collection[str]) -> Any:
    if type(fresh) is tuple:
        return tuple(_with_fresh(one, other, paths) for one, other in zip(kept, fresh, strict=True))
    if isinstance(fresh, Mapping):
        return {**kept} | {
            key: entry if is_entry(key, entry, paths) or key not in kept else _with_fresh(kept[key], entry, paths)
            for key, entry in fresh.items()
        }
    return kept


def refuse_other_state(initial: Any, paths: Sequence[str], routed: Collection[str]) -> None:
    """Refuse to start parameters afresh under an optimizer that does not keep what it has by parameter.

    Args:
        initial: the optimizer's initial state, without a loss scale.
        paths: the parameters.
        routed: all that it is for.

    Raises:
        ValueError: naming them.
    """
    if paths and _is_kept_otherwise(initial, routed):
        raise ValueError(
            lines(
                "reset=True starts the optimizer's state of a parameter afresh, and this optimizer keeps tensors "
                "otherwise than by parameter and name, so that nobody can tell which are whose:",
                paths,
            )
        )


def _is_kept_otherwise(initial: Any, paths: Collection[str]) -> bool:
    if isinstance(initial, Mapping):
        return any(not is_entry(key, kept, paths) and _is_kept_otherwise(kept, paths) for key, kept in initial.items())
    return any(_is_kept_otherwise(part, paths) for part in initial) if type(initial) is tuple else True
