"""Whether a graph in a user's own loop can carry hooks, above which losses must not be added up.

Autograd does not tell. But hooks have handles, and handles are counted: a graph is free of hooks if none was registered
since a moment before all of its nodes were made.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from funcfreeze.gradients.hooks import handles_made
from funcfreeze.gradients.routed import LiveGraph
from funcfreeze.model.attributes import nodes_made


@dataclass
class Moment:
    """A point in time as hooks and graphs see it.

    Attributes:
        handles: made in the process so far; those that an engine call of ours makes later, and undoes, are added.
        nodes: made in this thread.
        thread: this one.
    """

    handles: int
    nodes: int
    thread: int

    @staticmethod
    def now() -> Moment:
        """This moment."""
        return Moment(handles_made(), nodes_made(), threading.get_ident())


_LAST_CALL: ContextVar[Moment | None] = ContextVar("last_call", default=None)
"""When losses were last taken here in this context: before anything that is newer, as far as this thread made it."""


def note_call() -> Moment:
    """Note that the losses of this iteration are complete: what is made from now on belongs to the next one."""
    moment = Moment.now()
    _LAST_CALL.set(moment)
    return moment


def without_hooks_where_free(graph: LiveGraph, parameters: Sequence[Tensor]) -> LiveGraph:
    """The graph, which says that any node may carry hooks unless none can."""
    if _is_free_of_hooks(graph, parameters):
        return graph
    return hooked_anywhere(graph)


def hooked_anywhere(graph: LiveGraph) -> LiveGraph:
    """The graph, which says that any node may carry hooks."""
    return graph._replace(structure=graph.structure._replace(hooked=None))


def _is_free_of_hooks(graph: LiveGraph, parameters: Sequence[Tensor]) -> bool:
    last, now = _LAST_CALL.get(), Moment.now()
    if last is None or (last.handles, last.thread) != (now.handles, now.thread):
        return False
    ends = set(graph.structure.leaves[::2])  # what accumulates a gradient has no number; its hooks are the parameter's
    made = (node._sequence_nr() for index, node in enumerate(graph.nodes) if index not in ends)
    return all(last.nodes <= number < now.nodes for number in made) and not any(
        parameter._backward_hooks for parameter in parameters
    )
