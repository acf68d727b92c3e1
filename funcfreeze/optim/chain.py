"""Transforms one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from funcfreeze.declare.selectors import Leaf
from funcfreeze.optim.algorithm import Algorithms
from funcfreeze.optim.skip import as_its_parts, keep_if
from funcfreeze.optim.transform import Note, OptState, PyTree, Transform, in_place_options


def chain(*transforms: Transform) -> Transform:
    """The transforms one after the other: each takes the updates of the one before as its gradients.

    The state is the tuple of theirs. The in-place form is the last transform's, on what the others make of the
    gradients; there is none if the last has none.

    >>> import torch
    >>> from funcfreeze.optim import clip_by_global_norm, sgd
    >>> tx = chain(clip_by_global_norm(1.0), sgd(0.1))
    >>> params = {"w": torch.zeros(2)}
    >>> tx.update({"w": torch.tensor([30.0, 40.0])}, tx.init(params), params)
    ({'w': tensor([-0.0600, -0.0800])}, ((), {'w': {}}))
    >>> chain(sgd(0.1), "clip")
    Traceback (most recent call last):
        ...
    TypeError: chain(...) takes Transforms, made by sgd, adam, clip_by_global_norm and so on; got str: 'clip'
    """
    if not transforms:
        raise ValueError("chain(...) takes at least one Transform, got none")
    for given in transforms:
        if not isinstance(given, Transform):
            raise TypeError(
                "chain(...) takes Transforms, made by sgd, adam, clip_by_global_norm and so on; "
                f"got {type(given).__name__}: {given!r}"
            )

    def init(params: PyTree) -> OptState:
        return tuple(transform.init(params) for transform in transforms)

    def update(
        grads: PyTree, state: OptState, params: PyTree, *, step: int | Tensor | None = None
    ) -> tuple[PyTree, OptState]:
        _check_state(state, len(transforms))
        return _through(transforms, grads, state, params, step)

    *first, last = transforms
    finish = last.in_place

    def in_place(
        grads: PyTree,
        state: OptState,
        params: PyTree,
        *,
        step: int | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Callable[[], OptState]:
        assert finish is not None
        _check_state(state, len(transforms))
        updates, begun = _through(first, grads, state[:-1], params, step)
        kept = begun if found_inf is None else keep_if(found_inf, state[:-1], begun)
        commit = finish(updates, state[-1], params, **in_place_options(step, found_inf))
        return lambda: (*kept, commit())

    def bind(leaves: Sequence[Leaf]) -> Transform:
        return chain(*(given.bind(leaves) if given.bind is not None else given for given in transforms))

    def measuring(note: Note) -> Transform:
        return chain(*(given.measuring(note) if given.measuring is not None else given for given in transforms))

    choosing = any(given.bind is not None for given in transforms)
    return Transform(
        init,
        update,
        None if finish is None else as_its_parts(in_place, [finish]),
        bind if choosing else None,
        _algorithms(transforms),
        measuring if any(given.measuring is not None for given in transforms) else None,
    )


def _algorithms(transforms: Sequence[Transform]) -> Algorithms | None:
    """Those of the only transform that has any: of two, nobody could tell which torch.optim would mean."""
    found = [given.algorithms for given in transforms if given.algorithms is not None]
    return found[0] if len(found) == 1 else None


def _through(
    transforms: Sequence[Transform], grads: PyTree, state: OptState, params: PyTree, step: int | Tensor | None
) -> tuple[PyTree, tuple[OptState, ...]]:
    states = []
    for transform, before in zip(transforms, state, strict=True):
        grads, after = transform.update(grads, before, params, step=step)
        states.append(after)
    return grads, tuple(states)


def _check_state(state: OptState, length: int) -> None:
    if not isinstance(state, tuple) or len(state) != length:
        seen = f"a tuple of {len(state)}" if isinstance(state, tuple) else type(state).__name__
        raise ValueError(f"chain: the state is a tuple of {length}, one for each transform; got {seen}")
