"""The whole step as one compiled graph: forward, routed backward, optimizer, and the state written in place.

- `options`: what `Step(compile=...)` means; `layout`: a state's tensors in one list; `stepping`: what a Step holds,
  of which `compiled` is what takes a batch, and `updated` an update by given gradients.
- `capturing`: at a call Dynamo runs its guards, captures `losses` (`captured`) on the user's module if they do not
  hold, and has the graph made a step. Meanwhile the module holds `stand_ins`; `hooks`: where Dynamo does not look.
- `graph`: what Dynamo's graph takes and gives; `checkpointing` in it; `program`: the step made of it, and compiled;
  `flat`: its trace; `outside`: what our own part reads from elsewhere; `tail`: what is called after the graph.
- `private`: all that is used of torch's private parts; `problems`: what a compiler says, in the user's terms.
"""

from funcfreeze.compile.options import Options, resolve
from funcfreeze.compile.stepping import CompiledStep

__all__ = ["CompiledStep", "Options", "resolve"]
