"""The law as a function transform, over any pytree of parameters: `grad` and `grad_and_value`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.declare.overlaps import Merge
from funcfreeze.declare.plan import refuse_rules_of_steps, refuse_what_steps_do, resolve_plan
from funcfreeze.declare.selectors import Leaf
from funcfreeze.gradients import Engine, Routing, find_engine
from funcfreeze.gradients.functorch import is_transforming, refuse_constants
from funcfreeze.gradients.meeting import meet
from funcfreeze.model.own_code import with_own_code
from funcfreeze.model.pytree import flatten_by_path

Losses = Callable[..., Any]
"""`losses(params, *args)` -> a mapping name -> scalar; with `has_aux` a pair of that and anything."""


def grad_and_value(
    losses: Losses,
    routes: object,
    *,
    engine: str = "routed",
    has_aux: bool = False,
    merge: Merge | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """A function that computes every loss once and the merged gradient of all, in `torch.func`'s order.

    Args:
        losses: `losses(params, *args)` returns a mapping name -> 0-d floating tensor (None, and nothing else: absent
            this time); with `has_aux` a pair of that and a pytree.
        routes: loss name -> which parameters it may update (see `Route`), or a `Plan`. The paths of a pytree are its
            keys joined by dots: `{"enc": [w]}` has `enc.0`. Timed routes are refused: there is no count of steps here.
        engine: "routed", "reference" or "toggle".
        has_aux: whether `losses` returns something beside the losses. Its tensors follow the rule below, in containers
            of the same types (dataclasses and mappings of any kind among them).
        merge: a rule for where losses meet, or selector -> rule (see `Step`); one that keeps a state is for a `Step`.
            Rules that draw do so from torch's global generator.

    Returns:
        `f(params, *args) -> (grads, losses)`, or `(grads, (losses, aux))`. `grads` has the structure of `params`, with
        None where a parameter is untouched; losses are by name.

        All of it can be differentiated, by torch.func's rule: where grad mode is on, what depends on a tensor that
        requires grad (a parameter, another argument, one that `losses` reads from a closure or makes itself) carries a
        graph to it. So MAML, Hessian-vector products, `grad` over `grad` and gradients of hyperparameters are as
        autograd has them. Elsewhere, and always under `torch.no_grad()`, everything is detached and memory is freed as
        it goes. So a training loop over `nn.Parameter`s belongs under `torch.no_grad()`: outside of it, parameters that
        are moved by such gradients hold the graph of every step so far.

        Under transforms of `torch.func` (and in a dual level of forward-mode differentiation), too, where "routed"
        computes as "reference" does; `losses` must be what torch.func accepts there.

        Inside `torch.compile`, too. There `aux` holds tensors and numbers in dicts, lists and tuples, and what `losses`
        reads from closures and globals stays as it was when it was compiled: pass what changes in `*args`.

    Raises:
        RouteError: from `f`, everything that is wrong with the declaration.
        RuntimeError: from `f`, where it would have to cut off a graph: engine "toggle" where something requires grad
            or under a transform; inside `torch.compile`, where `losses` reads a tensor that requires grad and is none
            of its arguments; where `losses` writes to a parameter that requires grad.

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

    A step of MAML: the gradient of a loss after a step, and it reaches through that step's gradient.

    >>> w = torch.tensor(1.0, requires_grad=True)
    >>> inner = grad(lambda p: {"task": p ** 3}, {"task": "*"})
    >>> adapted = w - 0.1 * inner(w)
    >>> torch.autograd.grad(adapted ** 2, w)  # 2 (w - 0.3 w²) (1 - 0.6 w)
    (tensor(0.5600),)
    >>> with torch.no_grad():
    ...     inner(w).requires_grad
    False
    """
    chosen = find_engine(engine)
    known: dict[tuple[Any, ...], Routing] = {}

    def computed(losses: Losses, params: Any, args: tuple[Any, ...]) -> tuple[list[Tensor | None], Any, Any]:
        """The gradient or None for every leaf of the pytree, the pytree's structure, and what else is returned."""
        paths, leaves, structure = flatten_by_path(params)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        key = tuple((paths[place], leaves[place].shape, leaves[place].dtype) for place in places)
        if key not in known:
            refuse_what_steps_do(routes)
            known.clear()  # a loop has one structure
            plan = resolve_plan(routes, [_leaf(paths[place], leaves[place]) for place in places], merge)
            refuse_rules_of_steps(plan)
            known[key] = Routing.of(plan)

        def evaluate(given: list[Tensor]) -> tuple[Any, Any]:
            returned = losses(optree.tree_unflatten(structure, _with(leaves, places, given)), *args)
            return _pair(returned) if has_aux else (returned, None)

        able = _under_transforms(engine) if is_transforming() else chosen
        routing = known[key]
        outcome = able.merged(evaluate, [leaves[place] for place in places], routing, None)
        values = dict(outcome.losses)
        merged = [*outcome.gradients]
        if routing.places:
            for leaf, gradient in meet(routing, outcome.apart, values, None, {})[0].items():
                merged[leaf] = gradient
        gradients = _with([None] * len(leaves), places, merged)
        return gradients, structure, (values, outcome.rest) if has_aux else values

    def traced(params: Any, *args: Any) -> tuple[dict[int, Tensor], Any]:
        """The same for a graph, which returns no None: the gradients there are, by the leaf's place."""
        gradients, _, beside = computed(_followed(losses) if torch.is_grad_enabled() else losses, params, args)
        return {place: gradient for place, gradient in enumerate(gradients) if gradient is not None}, beside

    # In a graph of torch.compile this is one opaque call for Dynamo; what compiles it looks inside. Where Dynamo
    # breaks its graph instead, it is not to take the engine apart frame by frame, which comes out wrong.
    opaque = torch._dynamo.nonstrict_trace(torch.compiler.disable(traced))  # type: ignore[no-untyped-call]
    eager = torch.compiler.disable(computed)  # type: ignore[no-untyped-call]

    def transformed(params: Any, *args: Any) -> tuple[Any, Any]:
        if torch.compiler.is_compiling():
            if engine == "toggle" and torch.is_grad_enabled():
                _refuse_in_a_graph([params, args])
            touched, beside = opaque(params, *args)
            leaves, structure = optree.tree_flatten(params, none_is_leaf=True)
            gradients = [touched.get(place) for place in range(len(leaves))]
        else:
            gradients, structure, beside = eager(losses, params, args)
        return optree.tree_unflatten(structure, gradients), beside

    return with_own_code(transformed)


def grad(
    losses: Losses,
    routes: object,
    *,
    engine: str = "routed",
    has_aux: bool = False,
    merge: Merge | None = None,
) -> Callable[..., Any]:
    """As `grad_and_value`, without the losses: `f(params, *args) -> grads`, or `(grads, aux)` with `has_aux`.

    >>> import torch
    >>> f = grad(lambda p: {"y": p["b"] + p["a"], "z": p["c"] * p["a"]}, {"y": "b", "z": "*"})
    >>> f({"a": torch.tensor(2.0), "b": torch.tensor(3.0), "c": torch.tensor(4.0)})
    {'a': tensor(4.), 'b': tensor(1.), 'c': tensor(2.)}
    """
    both = grad_and_value(losses, routes, engine=engine, has_aux=has_aux, merge=merge)

    def transformed(params: Any, *args: Any) -> Any:
        grads, values = both(params, *args)
        return (grads, values[1]) if has_aux else grads

    return with_own_code(transformed)


def _with(values: Sequence[Any], places: Sequence[int], given: Sequence[Any]) -> list[Any]:
    """The values with those given at their places."""
    exchanged = list(values)
    for place, value in zip(places, given, strict=True):
        exchanged[place] = value
    return exchanged


def _leaf(path: str, tensor: Tensor) -> Leaf:
    """In a pytree every tensor that can have a gradient is a parameter, whatever its `requires_grad` says."""
    return Leaf((path,), tensor, trainable=tensor.is_floating_point() or tensor.is_complex())


def _refuse_in_a_graph(given: Any) -> None:
    """What the engine would refuse by itself, said where Dynamo passes it on: it hides errors of an opaque call."""
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in optree.tree_leaves(given)):
        raise RuntimeError(
            "engine='toggle' inside torch.compile computes gradients that carry no graph, and grad mode is on while an "
            "argument requires grad; use engine='routed' or 'reference', or call it under torch.no_grad()"
        )


def _under_transforms(engine: str) -> Engine:
    """The engine that transforms can be nested around: the one that is made of transforms itself."""
    if engine == "toggle":
        raise RuntimeError(
            "engine='toggle' calls backward(), which transforms of torch.func and forward-mode differentiation do "
            "not see; use engine='reference' under them, or 'routed', which then computes as that does"
        )
    return find_engine("reference")


def _followed(losses: Losses) -> Losses:
    """The same, for a compiler that follows gradients to the arguments of a graph only: refused where they go on."""

    def followed(*args: Any) -> Any:
        returned = losses(*args)
        tensors = optree.tree_leaves(returned, none_is_leaf=True)
        refuse_constants(tensor for tensor in tensors if isinstance(tensor, Tensor))
        return returned

    return followed


def _pair(returned: Any) -> tuple[Any, Any]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"with has_aux=True `losses` returns a pair (losses, aux), got {type(returned).__name__}")
    return returned
