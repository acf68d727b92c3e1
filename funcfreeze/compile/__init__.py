"""The whole step as one compiled graph: forward, routed backward, optimizer, and the state written in place.

- `options`, `backends`: what `Step(compile=...)` means, and the compiler it names.
- `compiled`: the programs of one step, and which of them is right now.
- `program`: one trace of the step, what it returns, and its compilation; `layout`: a state's tensors in one list.
- `guards`: Dynamo as the keeper of what must hold of the batch and of torch's global settings.
- `reading`, `watch`: what the trace may read from Python, found by following code, and whether it is still the same.
- `tracing`, `outside`: the surroundings of a trace; tensors from elsewhere become inputs of the graph.
- `problems`: what a compiler says, in the terms of the user's code.
"""

from funcfreeze.compile.compiled import CompiledStep
from funcfreeze.compile.options import Options, resolve

__all__ = ["CompiledStep", "Options", "resolve"]
