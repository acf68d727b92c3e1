"""Which hooks a module has. Dynamo does not guard that a part without hooks still has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from funcfreeze.compile.private import hooks_of_all_modules
from funcfreeze.gradients.hooks import handles_made
from funcfreeze.model.functional import FunctionalModule

_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
