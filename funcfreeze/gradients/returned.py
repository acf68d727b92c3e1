"""What the user's `losses` returned, checked against what was declared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from funcfreeze.declare.plan import raise_problems
from funcfreeze.declare.selectors import closest
from funcfreeze.gradients.law import Routing
from funcfreeze.model.containers import LEAVES, flatten, hidden_tensors


def check_losses(
    returned: Any, routing: Routing, *, inside_func: bool = False, takes_vectors: bool = False
) -> list[Tensor | None]:
    """The returned losses in the routing's order, None for those that are absent this step.

    Absent is None, and nothing else: a number says that somebody wanted to say so, and so may a tensor that does not
    require grad. Such a tensor may also be a loss that hangs on frozen parameters alone; it is refused too, as
    `loss.backward()` refuses it in plain torch, since nobody can tell it from one that was detached by mistake. But for
    losses of which a route is not active now: what they hang on may be frozen for this count.

    Args:
        returned: what `losses` returned.
        routing: what was declared.
        inside_func: whether a transform of torch.func is at work, in which `requires_grad` does not tell what a loss
            depends on; whoever calls then looks for constants later, with `refuse_constants`.
        takes_vectors: whether a loss may be a vector, with a gradient from outside.

    Raises:
        TypeError: not a mapping.
        RouteError: a loss without a route, a route without a loss, a loss that is not a floating 0-d tensor or does
            not require grad; all of these at once.
    """
    if not isinstance(returned, Mapping):
        hint = ""
        if isinstance(returned, Tensor):
            hint = ': name it, {"loss": loss}'
        raise TypeError(
            f'`losses` returns a mapping such as {{"cls": loss_cls, "adv": loss_adv}} (or that and a mapping of '
            f"metrics), got {_described(returned)}{hint}"
        )
    returned = _with_fields_that_are_none(returned, routing.losses)
    raise_problems(
        [
            *_name_problems(returned, routing.losses),
            *_value_problems(returned, routing, inside_func, takes_vectors),
        ]
    )
    return [returned[name] for name in routing.losses]


def refuse_constants(names: Collection[str]) -> None:
    """Refuse losses that do not require grad.

    Raises:
        RouteError: naming each loss.
    """
    raise_problems([_constant(name) for name in names])


def _constant(name: str) -> str:
    return (
        f"loss {name!r} does not require grad, so it can update nothing; {_ABSENT}. If it is there: was it detached, "
        "made of a number (.item(), torch.tensor), or computed under torch.no_grad()? Or does it hang on frozen "
        "parameters alone, those that no route mentions among them?"
    )


_ABSENT = "return None for a loss that is absent this step"


def _with_fields_that_are_none(returned: Mapping[Any, Any], declared: Sequence[str]) -> Mapping[Any, Any]:
    """A mapping that is a dataclass too, as models' outputs in transformers are, leaves out fields that are None."""
    if not is_dataclass(returned):
        return returned
    names = [field.name for field in fields(returned) if field.name in declared]
    return {**{name: None for name in names if getattr(returned, name) is None}, **returned}


def _name_problems(returned: Mapping[Any, Any], declared: Sequence[str]) -> Iterator[str]:
    for name in returned:
        if name not in declared:
            yield (
                f"loss {name!r} has no route{closest(str(name), declared)} (route it, or return it beside the losses "
                "as a metric)"
            )
    for name in declared:
        if name not in returned:
            yield (
                f"there is a route for loss {name!r}, which `losses` did not return"
                f"{closest(name, map(str, returned))} ({_ABSENT})"
            )


def _value_problems(
    returned: Mapping[Any, Any], routing: Routing, inside_func: bool, takes_vectors: bool
) -> Iterator[str]:
    must_require_grad = frozenset(routing.losses) - routing.resting
    for name, loss in returned.items():
        if loss is None:
            continue
        if not isinstance(loss, Tensor):
            yield f"loss {name!r} is not a tensor but {_described(loss)}; {_ABSENT}"
        elif loss.ndim != 0:
            hint = f", or give its gradient={{{name!r}: ...}}" if takes_vectors else ""
            shape = tuple(loss.shape)
            yield f"loss {name!r} is not a scalar: its shape is {shape}; reduce it, for example by .mean(){hint}"
        elif not loss.is_floating_point():
            yield f"loss {name!r} is not a floating point number: its dtype is {loss.dtype}; {_ABSENT}"
        elif not loss.requires_grad and name in must_require_grad and not inside_func:
            yield _constant(name)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__}: {value!r}"[:120]


def nothing(_: Tensor) -> bool:
    """Keep nothing."""
    return False


def detached(tree: Any, keep: Callable[[Tensor], bool] = nothing) -> Any:
    """The same tree with every tensor detached that is not to be kept as it is, in new containers (see `exchanged`)."""
    return exchanged(
        tree,
        lambda tensor: tensor if keep(tensor) else tensor.detach(),
        lambda tensor: tensor.grad_fn is not None and not keep(tensor),
        "a tensor of the autograd graph",
    )


def exchanged(tree: Any, f: Callable[[Tensor], Tensor], must_go: Callable[[Tensor], bool], what: str) -> Any:
    """What came beside the losses with `f(tensor)` for every tensor, in new containers of the same kinds.

    An object that is no container (see `containers`) stays the object it is.

    Args:
        tree: what `losses` returned beside the losses.
        f: what to do with its tensors.
        must_go: which tensors may not stay as they are.
        what: a name for those.

    Raises:
        TypeError: an object that is no container holds such a tensor; names every one, and where in it the tensor is.
    """
    leaves, structure = flatten(tree)
    hidden = [
        f"{type(leaf).__name__}{name}"
        for leaf in leaves
        if type(leaf) not in LEAVES
        for name, tensor in hidden_tensors(leaf)
        if must_go(tensor)
    ]
    if hidden:
        shown = ", ".join(hidden[:3]) + ", ..." * (len(hidden) > 3)
        raise TypeError(
            f"what `losses` returned beside the losses holds {what} where it cannot be exchanged: {shown}; return "
            "tensors in dicts, lists, tuples, dataclasses or mappings, or put detached clones into such an object"
        )
    known = {id(leaf): f(leaf) for leaf in leaves if isinstance(leaf, Tensor)}  # one tensor in two places stays one
    return structure.unflatten([known.get(id(leaf), leaf) for leaf in leaves])
