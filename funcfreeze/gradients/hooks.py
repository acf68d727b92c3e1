"""Noticing hooks that are registered on activations during a forward.

A hook may be anything but linear in its cotangent, so losses must not be added up above one: it runs as it would for
each loss alone. But a node of the autograd graph does not tell whether it carries hooks; they have to be noticed when
they are registered.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

OBSERVERS = frozenset({"torch.utils.module_tracker", "torch.distributed._tools.mod_tracker"})
"""Modules of torch whose hooks only note that they ran, as `FlopCounterMode` has them: they keep no losses apart."""


@dataclass
class Noticed:
    """The hooks registered during a forward.

    Attributes:
        nodes: the nodes of the activations that hooks were registered on.
        registrations: how many registrations were noticed, observers included.
        all_known: whether every hook handle made meanwhile belongs to one of those; if not, hooks may be anywhere.
    """

    nodes: list[Node] = field(default_factory=list)
    registrations: int = 0
    all_known: bool = True


def handles_made() -> int:
    """How many hook handles this process has made so far: unchanged over a while, no hook was registered in it."""
    return RemovableHandle.next_id


_noticed: ContextVar[Noticed | None] = ContextVar("noticed", default=None)


class noticing_hooks:  # a function by its use: `with noticing_hooks() as noticed:`
    """Notice the hooks registered inside the block, by this thread. `all_known` is set when it ends.

    Blocks may be nested: what is noticed in one is then known in the one around it, too. Nodes' own hooks, and those of
    other threads, are not seen, but they do make handles.
    """

    def __enter__(self) -> Noticed:
        """Begin."""
        self.noticed, self.before = Noticed(), handles_made()
        self.token = _noticed.set(self.noticed)
        _Exchange.enter()
        return self.noticed

    def __exit__(self, *error: object) -> None:
        """End, and tell the block around."""
        _Exchange.leave()
        _noticed.reset(self.token)
        noticed = self.noticed
        noticed.all_known = handles_made() - self.before == noticed.registrations
        around = _noticed.get()
        if around is not None:
            around.nodes += noticed.nodes
            around.registrations += noticed.registrations


def note_temporary_hooks(count: int) -> None:
    """Tell the block around, if there is one, of hooks that will be gone when it ends: they keep no losses apart."""
    noticed = _noticed.get()
    if noticed is not None:
        noticed.registrations += count


class _Exchange:
    """The exchange of what makes a handle, undone by the last of the threads that are noticing.

    Not of `Tensor.register_hook`: a write to the class `Tensor` empties Python's caches of what tensors and parameters
    have, and the step of a small network takes 2 % longer for it.
    """

    lock = threading.Lock()
    users = 0
    original: Callable[..., None] = RemovableHandle.__init__

    @classmethod
    def enter(cls) -> None:
        with cls.lock:
            cls.users += 1
            if cls.users == 1:
                cls.original = RemovableHandle.__init__
                RemovableHandle.__init__ = _make  # type: ignore[method-assign, assignment]  # that is the point

    @classmethod
    def leave(cls) -> None:
        with cls.lock:
            cls.users -= 1
            if cls.users == 0:
                RemovableHandle.__init__ = cls.original  # type: ignore[method-assign]  # put back


_REGISTER_HOOK = torch.Tensor.register_hook.__code__


def _make(handle: RemovableHandle, hooks_dict: Any, *, extra_dict: Any = None) -> None:
    """Make a handle; one that `Tensor.register_hook` makes is told by its caller, whose arguments say for what."""
    _Exchange.original(handle, hooks_dict, extra_dict=extra_dict)
    noticed, caller = _noticed.get(), sys._getframe(1)
    if noticed is not None and caller.f_code is _REGISTER_HOOK:
        noticed.registrations += 1
        if _defined_in(caller.f_locals["hook"]) not in OBSERVERS:
            noticed.nodes.append(get_gradient_edge(caller.f_locals["self"]).node)


def _defined_in(hook: Callable[[Tensor], Any]) -> str | None:
    """The module a hook's function was written in, also where torch wraps it to hook several tensors at once."""
    if getattr(hook, "__module__", None) == torch.autograd.graph.__name__ and inspect.isfunction(hook):
        return getattr(inspect.getclosurevars(hook).nonlocals.get("fn"), "__module__", None)
    return getattr(hook, "__module__", None)
