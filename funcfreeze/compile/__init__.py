"""The whole step as one compiled graph: forward, routed backward, optimizer, and the state written in place.

- `options`: what `Step(compile=...)` means.
- `guards`: Dynamo as the keeper of what holds for the batch and for torch's global settings.
- `watch`: what the trace read from Python beside them, so that no graph is ever used when that has changed.
- `outside`: tensors that the computation reads from elsewhere; they become inputs of the graph.
- `program`: one trace of the step, and what it returns.
- `compiled`: the programs of one step.
"""

from funcfreeze.compile.compiled import CompiledStep
from funcfreeze.compile.options import Options, resolve

__all__ = ["CompiledStep", "Options", "resolve"]
