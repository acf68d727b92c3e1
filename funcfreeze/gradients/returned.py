"""What the user's `losses` returned, checked against what was declared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import optree
from torch import Tensor

from funcfreeze.declare.plan import raise_problems
from funcfreeze.declare.selectors import closest
from funcfreeze.gradients.law import Routing


def check_losses(returned: Any, routing: Routing) -> list[Tensor | None]:
    """The returned losses in the routing's order, None for those that are absent this step.

    Raises:
        TypeError: not a mapping.
        RouteError: a loss without a route, a route without a loss, a loss that is not a floating 0-d tensor; all of
            these at once.
    """
    if not isinstance(returned, Mapping):
        hint = ""
        if isinstance(returned, Tensor):
            hint = ': name it, {"loss": loss}'
        raise TypeError(
            f'`losses` returns a mapping such as {{"cls": loss_cls, "adv": loss_adv}} (or that and a mapping of '
            f"metrics), got {_described(returned)}{hint}"
        )
    raise_problems([*_name_problems(returned, routing.losses), *_value_problems(returned)])
    return [returned[name] for name in routing.losses]


def check_differentiable(names: Collection[str], routing: Routing) -> None:
    """Refuse losses that hang on no routed parameter, where that can only be a mistake.

    If some parameters are not routed, a loss may rightly depend on those alone; it then touches nothing.

    Raises:
        RouteError: naming each loss.
    """
    if len(routing.routed) == len(routing.paths):
        refuse_constants(names)


def refuse_constants(names: Collection[str]) -> None:
    """Refuse losses that autograd knows nothing of.

    Raises:
        RouteError: naming each loss.
    """
    raise_problems(
        [
            f"loss {name!r} does not require grad, so it depends on no parameter; was it detached, made by .item(), "
            "or computed under torch.no_grad()?"
            for name in names
        ]
    )


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
                f"{closest(name, map(str, returned))} (return None for a loss that is absent this step)"
            )


def _value_problems(returned: Mapping[Any, Any]) -> Iterator[str]:
    for name, loss in returned.items():
        if loss is None:
            continue
        if not isinstance(loss, Tensor):
            yield f"loss {name!r} is not a tensor but {_described(loss)}"
        elif loss.ndim != 0:
            yield f"loss {name!r} is not a scalar: its shape is {tuple(loss.shape)}; reduce it, for example by .mean()"
        elif not loss.is_floating_point():
            yield f"loss {name!r} is not a floating point number: its dtype is {loss.dtype}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__}: {value!r}"[:120]


def detached(tree: Any, keep: Callable[[Tensor], bool]) -> Any:
    """The same pytree with every tensor detached that is not to be kept as it is."""
    return optree.tree_map(
        lambda leaf: leaf.detach() if isinstance(leaf, Tensor) and not keep(leaf) else leaf, tree, none_is_leaf=True
    )
