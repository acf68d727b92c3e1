"""Dynamo as the keeper of guards: what must hold of a batch, and of torch's global settings, for a graph to be used.

Dynamo sees a function that does nothing but look at the batch's tensors. So it guards their number, shapes, strides,
dtypes, devices and aliasing, turns a size that changes into a dynamic one, and watches autocast, the default dtype and
the like; the step itself, and the hundreds of tensors of a state, it never sees. What the step needs of its state is
checked once, when the state is made.
"""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from funcfreeze.compile.problems import explained, other_than_the_steps

_NUMBERS = itertools.count(1)
_LIBRARY = torch.library.Library("funcfreeze", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("batch(Tensor[] leaves) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.register_fake("funcfreeze::batch", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake(leaves: list[Tensor]) -> Tensor:
    return torch.empty(0)


def _look(leaves: list[Tensor]) -> Tensor:
    seen: Tensor = torch.ops.funcfreeze.batch.default(leaves)
    return seen


_LIBRARY.impl("batch", _fake, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # if Dynamo is switched off

Build = Callable[[Sequence[Any], Sequence[int]], Callable[[Sequence[Any]], Any]]
"""(inputs, which of them are the batch's tensors) -> what to call with such inputs.

Inputs are tensors, and sizes where they are dynamic.
"""


class Guarded:
    """Calls what was built for batches like the one at hand, and has it built if there is none.

    Args:
        build: called inside Dynamo's compilation, with its fake mode and its shape environment in place.
        dynamic: as for `torch.compile`.
    """

    def __init__(self, build: Build, dynamic: bool | None) -> None:
        self._build = weakref.WeakMethod(build)
        self._runs: list[Callable[[Sequence[Any]], Any]] = []
        self._result: Any = _NOTHING
        self._error: Exception | None = None
        number = next(_NUMBERS)
        # Dynamo keeps what it compiled with the code object, and which sizes it saw change with its name and line:
        # everyone gets a code object, a name and a line of their own
        code = _look.__code__.replace(co_name=f"look_{number}", co_firstlineno=number)
        look = types.FunctionType(code, _look.__globals__)
        self._look = torch.compile(look, fullgraph=True, dynamic=dynamic, backend=_backend_of(weakref.ref(self)))
        self._anchor = torch.empty(0)  # a batch without tensors would be a graph without inputs, never compiled

    def __call__(self, leaves: Sequence[Tensor]) -> Any:
        """What the built callable returns for these leaves.

        Raises:
            RuntimeError: Dynamo is switched off, or has compiled too many times for different sizes.
        """
        self._error, self._result = None, _NOTHING
        try:
            self._look([*leaves, self._anchor])
        except Exception as error:
            if self._error is None:
                raise other_than_the_steps(error) from error.__cause__
            raise self._error from self._error.__cause__  # as it was raised, not as Dynamo wraps it
        result, self._result = self._result, _NOTHING
        if result is _NOTHING:
            raise RuntimeError(
                "torch.compile is switched off (torch.compiler.set_stance, TORCHDYNAMO_DISABLE), and this Step is to "
                "be compiled; build it with compile=False"
            )
        return result

    def add(self, inputs: Sequence[Any], leaves: Sequence[int]) -> int:
        """Build what to call for inputs like these; returns its number, for `run`."""
        build = self._build()
        assert build is not None, "whoever builds is gone"
        try:
            self._runs.append(build(inputs, leaves))
        except Exception as error:
            self._error = explained(error)
            raise
        return len(self._runs) - 1

    def run(self, number: int, inputs: Sequence[Any]) -> None:
        """Call what was built, and keep what it returns."""
        self._result = self._runs[number](inputs)


_NOTHING = object()


def _backend_of(owner: weakref.ref[Guarded]) -> Callable[[GraphModule, list[Any]], Callable[..., tuple[Tensor]]]:
    """The backend that Dynamo calls, and keeps for good: it must not keep its owner, and the model with that."""

    def alive() -> Guarded:
        guarded = owner()
        assert guarded is not None, "whoever compiles is gone"
        return guarded

    def backend(module: GraphModule, inputs: list[Any]) -> Callable[..., tuple[Tensor]]:
        place = {node: index for index, node in enumerate(module.graph.find_nodes(op="placeholder"))}
        (look,) = module.graph.find_nodes(op="call_function", target=torch.ops.funcfreeze.batch.default)
        *leaves, anchor = (place[node] for node in look.args[0])
        used = [index for index in range(len(inputs)) if index != anchor]
        number = alive().add([inputs[index] for index in used], [used.index(leaf) for leaf in leaves])
        nothing = (torch.empty(0),)

        def call(*given: Any) -> tuple[Tensor]:
            alive().run(number, [given[index] for index in used])
            return nothing

        return call

    return backend
