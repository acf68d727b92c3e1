"""What a gradient transformation is, and how it knows parameters: by their paths in any pytree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcfreeze.declare.selectors import Leaf, closest
from funcfreeze.model.pytree import flatten_by_path
from funcfreeze.model.ties import Tied
from funcfreeze.optim.algorithm import Algorithms

PyTree = Any  # of tensors: a tensor, or nested containers of them that optree knows
OptState = Any  # a pytree whose structure is the transform's own affair


Note = Callable[[str, Tensor], None]
"""Takes a measurement by its name, a 0-d tensor."""


class Transform(NamedTuple):
    """A pure gradient transformation over any pytree of parameters, in optax's manner.

    Gradients and updates have the structure of the parameters, with None where a parameter is untouched (for a flat
    dict, a gradient that is not there says the same). An untouched parameter's state comes out as the very same
    objects.

    Attributes:
        init: `init(params) -> state`.
        update: `update(grads, state, params, *, step=None) -> (updates, state)`; changes none of its inputs. `step` is
            the number of steps taken so far, which schedules read.
        in_place: the same on a flat dict of parameters, overwriting it:
            `in_place(grads, state, params, *, step=None) -> commit` finds whatever is wrong and changes nothing;
            `commit() -> state` then overwrites the parameters and the state's tensors by torch's fused kernels.
            None where there is no such form. Where steps are skipped (by a loss scale, or `on_nonfinite`) it is given
            `found_inf` too, a 0-d float32 tensor: if that is 1, a commit leaves every bit as it was. Of one that does
            not take it the pure form is used.
        bind: `bind(leaves) -> Transform`, for transforms that choose by selector: the same transform with its
            selectors resolved against these leaves, whose ties and module types a bare pytree cannot tell. None
            where there is nothing to choose.
        algorithms: for paths of parameters, what torch.optim calls the optimizer that each has, by which a running
            optimizer's state is taken over. None where torch.optim has no name for it.
        measuring: `measuring(note) -> Transform`, the same transform, which tells `note` what it measures on the way
            (the norm of the gradients). None where it measures nothing.

    >>> import torch
    >>> from funcfreeze.optim import sgd
    >>> tx = sgd(0.1)
    >>> params = {"a": torch.ones(2), "b": torch.ones(2)}
    >>> updates, state = tx.update({"a": torch.ones(2), "b": None}, tx.init(params), params)
    >>> updates
    {'a': tensor([-0.1000, -0.1000]), 'b': None}
    """

    init: Callable[[PyTree], OptState]
    update: Callable[..., tuple[PyTree, OptState]]
    in_place: Callable[..., Callable[[], OptState]] | None = None
    bind: Callable[[Sequence[Leaf]], Transform] | None = None
    algorithms: Algorithms | None = None
    measuring: Callable[[Note], Transform] | None = None


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """`params + updates` as a new pytree; where the update is None, the parameter itself.

    >>> import torch
    >>> apply_updates([torch.zeros(2), torch.zeros(2)], [torch.ones(2), None])
    [tensor([1., 1.]), tensor([0., 0.])]
    >>> apply_updates([torch.zeros(2)], [torch.ones(3)])
    Traceback (most recent call last):
        ...
    ValueError: the updates do not fit the parameters:
      0: the update has shape (3,), the parameter has shape (2,)
    """
    named = by_path(params)
    moved = {path: named[path] + update for path, update in match(updates, named, noun="update").items()}
    return named.rebuild({**named.leaves, **moved})


@dataclass(frozen=True)
class Named:
    """A pytree's tensors by their paths, and the way back to the pytree.

    Attributes:
        leaves: path -> tensor, or None where the pytree has None.
        flat: whether the pytree is one dict of tensors, so that paths may be left out of its gradients.
        rebuild: path -> value, back into the pytree's structure; None for paths that are not given.
    """

    leaves: Mapping[str, Tensor | None]
    flat: bool
    rebuild: Callable[[Mapping[str, Tensor | None]], PyTree]

    def __getitem__(self, path: str) -> Tensor:
        tensor = self.leaves[path]
        assert tensor is not None, path
        return tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The paths that hold a tensor."""
        return {path: tensor for path, tensor in self.leaves.items() if tensor is not None}


def by_path(tree: PyTree) -> Named:
    """The pytree by paths, which are its keys joined by dots.

    >>> import torch
    >>> list(by_path({"enc": [torch.ones(1), None], "enc.1": None}).leaves)
    Traceback (most recent call last):
        ...
    ValueError: two leaves of one pytree have the path 'enc.1'; rename a key
    """
    tree = dict(tree) if type(tree) is Tied else tree
    if type(tree) is dict and all(type(key) is str for key in tree) and all(map(_is_leaf, tree.values())):
        return Named(tree, True, lambda values: {path: values.get(path) for path in tree})
    paths, leaves, structure = flatten_by_path(tree)
    named: dict[str, Tensor | None] = dict(zip(paths, leaves, strict=True))
    for path, leaf in named.items():
        if not _is_leaf(leaf):
            raise TypeError(f"{path or 'the pytree'} is no tensor but {type(leaf).__name__}: {leaf!r}")
    return Named(named, False, lambda values: optree.tree_unflatten(structure, [values.get(path) for path in paths]))


def apart(given: Mapping[str, Tensor], params: Iterable[Tensor]) -> dict[str, Tensor]:
    """Gradients or updates, with copies of those that share memory with a parameter that is about to be overwritten.

    An old-style `autograd.Function` may return a parameter itself as another's gradient.
    """
    memories = {_memory(param) for param in params} - {None}
    return {path: tensor.clone() if _memory(tensor) in memories else tensor for path, tensor in given.items()}


def _memory(tensor: Tensor) -> int | None:
    """Its storage, the same for all tensors that share it, also while a compiler traces; None if it is sparse."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def match(given: PyTree, params: Named, *, noun: str = "gradient") -> dict[str, Tensor]:
    """The gradients (or updates) that are there, by path, each found to fit its parameter."""
    named = by_path(given)
    present = named.tensors
    problems = [
        f"{path}: there is no such parameter{closest(path, params.leaves)}"
        for path in named.leaves
        if path not in params.leaves
    ]
    problems += [
        f"{path or 'the tensor'}: {problem}"
        for path, tensor in present.items()
        if path in params.leaves
        for problem in misfits(tensor, params.leaves[path], noun)
    ]
    if not params.flat:
        problems += [
            f"{path}: the {noun} is missing; where a parameter is untouched there must be None"
            for path in params.leaves
            if path not in named.leaves
        ]
    if problems:
        raise ValueError(lines(f"the {noun}s do not fit the parameters:", problems))
    return present


def misfits(tensor: Tensor, param: Tensor | None, noun: str) -> list[str]:
    """In what a gradient or an update does not fit its parameter."""
    if param is None:
        return [f"there is a {noun}, but the parameter is None"]
    wanted_dtype = _accepted_dtype(tensor, param, noun)
    if tensor.shape == param.shape and tensor.dtype == wanted_dtype and tensor.device == param.device:
        return []
    return [
        f"the {noun} has {what} {seen}, the parameter has {what} {wanted}"
        for what, seen, wanted in (
            ("shape", tuple(tensor.shape), tuple(param.shape)),
            ("dtype", tensor.dtype, wanted_dtype),
            ("device", tensor.device, param.device),
        )
        if seen != wanted
    ]


def _accepted_dtype(tensor: Tensor, param: Tensor, noun: str) -> torch.dtype:
    """The parameter's dtype; a gradient in half precision may come as float32, where unscaling has put it."""
    halves = (torch.float16, torch.bfloat16)
    unscaled = noun == "gradient" and tensor.dtype == torch.float32 and param.dtype in halves
    return torch.float32 if unscaled else param.dtype


def in_place_options(step: int | Tensor | None, found_inf: Tensor | None) -> dict[str, Any]:
    """How an in-place form is called; one that knows no `found_inf` need not, as long as there is no loss scale."""
    return {"step": step} if found_inf is None else {"step": step, "found_inf": found_inf}


def lines(head: str, problems: Iterable[str]) -> str:
    """An error message that tells all problems at once, one a line."""
    return "\n  ".join([head, *problems])


def _is_leaf(value: object) -> bool:
    return value is None or isinstance(value, Tensor)
