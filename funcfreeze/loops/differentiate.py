"""The law as a function transform, over any pytree of parameters: `grad` and `grad_and_value`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.declare.plan import resolve_plan
from funcfreeze.declare.selectors import Leaf
from funcfreeze.gradients import Routing, find_engine
from funcfreeze.model.pytree import flatten_by_path

Losses = Callable[..., Any]
"""`losses(params, *args)` -> a mapping name -> scalar; with `has_aux` a pair of that and anything."""


def grad_and_value(
    losses: Losses, routes: object, *, engine: str = "routed", has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """A function that computes every loss once and the merged gradient of all, in `torch.func`'s order.

    Args:
        losses: `losses(params, *args)` returns a mapping name -> 0-d floating tensor (None, and nothing else: absent
            this time); with `has_aux` a pair of that and a pytree.
        routes: loss name -> which parameters it may update (see `Route`), or a `Plan`. The paths of a pytree are its
            keys joined by dots: `{"enc": [w]}` has `enc.0`.
        engine: "routed", "reference" or "toggle".
        has_aux: whether `losses` returns something beside the losses. Tensors in it come out detached, in containers of
            the same types (dataclasses and mappings of any kind among them).

    Returns:
        `f(params, *args) -> (grads, losses)`, or `(grads, (losses, aux))`; also inside `torch.compile`. There `aux`
        holds tensors and numbers in dicts, lists and tuples, and what `losses` reads from closures and globals stays as
        it was when it was compiled: pass what changes in `*args`. `grads` has the structure of `params`, with
        None where a parameter is untouched. Losses are detached, by name.

    Raises:
        RouteError: from `f`, everything that is wrong with the declaration.

    >>> import torch
    >>> def losses(params, x):
    ...     h = params["enc"] * x
    ...     return {"task": (params["head"] * h).sum(), "adv": (h ** 2).sum()}
    >>> f = grad_and_value(losses, {"task": "*", "adv": {"enc": -0.5}})
    >>> params = {"enc": torch.tensor(2.0), "head": torch.tensor(3.0), "unused": torch.tensor(0.0)}
    >>> grads, values = f(params, torch.tensor(1.0))
    >>> grads
    {'enc': tensor(1.), 'head': tensor(2.), 'unused': None}
    >>> values
    {'task': tensor(6.), 'adv': tensor(4.)}
    """
    chosen = find_engine(engine)
    known: dict[tuple[Any, ...], Routing] = {}

    def touched(params: Any, *args: Any) -> tuple[dict[int, Tensor], Any]:
        """The gradients by the leaf's place, where there are any, and what else is returned."""
        paths, leaves, structure = flatten_by_path(params)
        named = {path: leaf for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, Tensor)}
        key = tuple((path, tuple(tensor.shape), tensor.dtype) for path, tensor in named.items())
        if key not in known:
            known.clear()  # a loop has one structure
            known[key] = Routing.of(resolve_plan(routes, [_leaf(path, tensor) for path, tensor in named.items()]))

        def evaluate(given: list[Tensor]) -> tuple[Any, Any]:
            replaced = dict(zip(named, given, strict=True))
            exchanged = [replaced.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
            returned = losses(optree.tree_unflatten(structure, exchanged), *args)
            return _pair(returned) if has_aux else (returned, None)

        outcome = chosen.merged(evaluate, list(named.values()), known[key], None)
        pairs = zip(named, outcome.gradients, strict=True)
        values = dict(outcome.losses)
        found = {path: gradient for path, gradient in pairs if gradient is not None}
        gradients = {place: found[path] for place, path in enumerate(paths) if path in found}
        return gradients, (values, outcome.rest) if has_aux else values

    # in a graph of torch.compile this is one opaque call for Dynamo; what compiles the graph looks into it
    opaque = torch._dynamo.nonstrict_trace(touched)

    def transformed(params: Any, *args: Any) -> tuple[Any, Any]:
        gradients, beside = opaque(params, *args)
        leaves, structure = optree.tree_flatten(params, none_is_leaf=True)
        return optree.tree_unflatten(structure, [gradients.get(place) for place in range(len(leaves))]), beside

    return transformed


def grad(losses: Losses, routes: object, *, engine: str = "routed", has_aux: bool = False) -> Callable[..., Any]:
    """As `grad_and_value`, without the losses: `f(params, *args) -> grads`, or `(grads, aux)` with `has_aux`.

    >>> import torch
    >>> f = grad(lambda p: {"y": p["b"] + p["a"], "z": p["c"] * p["a"]}, {"y": "b", "z": "*"})
    >>> f({"a": torch.tensor(2.0), "b": torch.tensor(3.0), "c": torch.tensor(4.0)})
    {'a': tensor(4.), 'b': tensor(1.), 'c': tensor(2.)}
    """
    both = grad_and_value(losses, routes, engine=engine, has_aux=has_aux)

    def transformed(params: Any, *args: Any) -> Any:
        grads, values = both(params, *args)
        return (grads, values[1]) if has_aux else grads

    return transformed


def _leaf(path: str, tensor: Tensor) -> Leaf:
    """In a pytree every tensor that can have a gradient is a parameter, whatever its `requires_grad` says."""
    return Leaf((path,), tensor, trainable=tensor.is_floating_point() or tensor.is_complex())


def _pair(returned: Any) -> tuple[Any, Any]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"with has_aux=True `losses` returns a pair (losses, aux), got {type(returned).__name__}")
    return returned
