"""Dynamo as the keeper of guards: what must hold of a batch, and of torch's global settings, for a graph to be used.

Dynamo sees a function that does nothing but look at the batch's tensors. So it guards their number, shapes, strides,
dtypes, devices and aliasing, turns a size that changes into a dynamic one, and watches autocast, the default dtype and
the like; the step itself, and the hundreds of tensors of a state, it never sees. What the step needs of its state is
checked once, when the state is made.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from funcfreeze.compile.problems import explained

_NUMBERS = itertools.count(1)
_LIBRARY = torch.library.Library("funcfreeze", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("batch(Tensor[] leaves) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.register_fake("funcfreeze::batch", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake(leaves: list[Tensor]) -> Tensor:
    return torch.empty(0)


def _look(leaves: list[Tensor]) -> Tensor:
    seen: Tensor = torch.ops.funcfreeze.batch.default(leaves)
    return seen


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
        self._build = build
        self._result: Any = None
        self._error: Exception | None = None
        # Dynamo keeps what it compiled with the code object, and which sizes it saw change with its name and line:
        # everyone gets a code object, a name and a line of their own
        number = next(_NUMBERS)
        code = _look.__code__.replace(co_name=f"look_{number}", co_firstlineno=number)
        look = types.FunctionType(code, _look.__globals__)
        self._look = torch.compile(look, fullgraph=True, dynamic=dynamic, backend=self._backend)
        self._anchor = torch.empty(0)  # a batch without tensors would be a graph without inputs, never compiled

    def __call__(self, leaves: Sequence[Tensor]) -> Any:
        """What the built callable returns for these leaves."""
        self._error = None
        try:
            self._look([*leaves, self._anchor])
        except Exception:
            if self._error is None:
                raise
            raise self._error from None  # as it was raised, not as Dynamo wraps it
        result, self._result = self._result, None
        return result

    def _backend(self, module: GraphModule, inputs: list[Any]) -> Callable[..., tuple[Tensor]]:
        place = {node: index for index, node in enumerate(module.graph.find_nodes(op="placeholder"))}
        (look,) = module.graph.find_nodes(op="call_function", target=torch.ops.funcfreeze.batch.default)
        *leaves, anchor = (place[node] for node in look.args[0])
        used = [index for index in range(len(inputs)) if index != anchor]
        try:
            run = self._build([inputs[index] for index in used], [used.index(leaf) for leaf in leaves])
        except Exception as error:
            self._error = explained(error)
            raise
        nothing = (torch.empty(0),)

        def call(*given: Any) -> tuple[Tensor]:
            self._result = run([given[index] for index in used])
            return nothing

        return call
