"""Hooks: which there are, since Dynamo does not guard that a part without hooks still has none; those on parameters.

The latter run in our own part of the graph, where Dynamo does not look. An operator calls them with the gradient of
every step, so that they read what they read then, and write what they write.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcfreeze.compile.private import OUTSIDE_CUDA_GRAPHS, hooks_of_all_modules
from funcfreeze.gradients.hooks import handles_made
from funcfreeze.model.functional import FunctionalModule

_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_LIBRARY = torch.library.Library("funcfreeze", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's
_SCHEMA = "hook(Tensor gradient, int number) -> Tensor"
_LIBRARY.define(_SCHEMA, tags=OUTSIDE_CUDA_GRAPHS)  # type: ignore[no-untyped-call]  # torch's
torch.library.register_fake("funcfreeze::hook", lambda gradient, number: torch.empty_like(gradient), lib=_LIBRARY)

Hook = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class Called:
    """A hook on a parameter, as an operator.

    Attributes:
        number: by which the operator knows it, as long as this is alive.
        hook: the user's function.
    """

    number: int
    hook: Hook

    def __call__(self, gradient: Tensor) -> Tensor:
        """What the hook makes of a gradient."""
        made: Tensor = torch.ops.funcfreeze.hook.default(gradient, self.number)
        return made


_NUMBERS = itertools.count()
_CALLED: weakref.WeakValueDictionary[int, Called] = weakref.WeakValueDictionary()


def _call(gradient: Tensor, number: int) -> Tensor:
    own = gradient.clone()
    made = _CALLED[number].hook(own)
    if made is None or made is own:
        return own
    if made.shape != gradient.shape:
        raise RuntimeError(
            f"a hook on a parameter returned shape {tuple(made.shape)} for a gradient of shape {tuple(gradient.shape)}"
        )
    return torch.empty_like(gradient).copy_(made)  # with the strides that were traced


_LIBRARY.impl("hook", _call, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # torch's


def parameter_hooks(params: Mapping[str, Tensor]) -> list[tuple[str, Called]]:
    """The hooks on these parameters, by path."""
    found = []
    for path, tensor in params.items():
        for hook in (tensor._backward_hooks or {}).values():
            called = Called(next(_NUMBERS), hook)
            _CALLED[called.number] = called
            found.append((path, called))
    return found


class Hooks:
    """The hooks of a module, its parts and its parameters, and of all modules.

    Every hook has a handle, and handles are counted: as long as their number is the same, no hook was added anywhere.
    """

    def __init__(self, functional: FunctionalModule) -> None:
        self._functional = functional
        self._made = -1
        self._present: list[tuple[Any, tuple[int, ...]]] = []
        self._known: list[tuple[tuple[int, tuple[int, ...]], ...]] = []
        self._number = 0

    def number(self) -> int:
        """A number for the set of hooks there is now."""
        if handles_made() != self._made or any(tuple(held) != ids for held, ids in self._present):
            self._made = handles_made()
            held = [*self._dicts()]
            self._present = [(hooks, tuple(hooks)) for hooks in held if hooks]
            census = tuple((index, tuple(hooks)) for index, hooks in enumerate(held) if hooks)
            if census not in self._known:
                self._known.append(census)
            self._number = self._known.index(census)
        return self._number

    def _dicts(self) -> Iterator[Any]:
        yield from hooks_of_all_modules()
        for module in self._functional.modules:
            own = vars(module)
            yield from (own[name] for name in _OF_MODULES)
        yield from (parameter._backward_hooks or {} for parameter in self._functional.present_parameters().values())
