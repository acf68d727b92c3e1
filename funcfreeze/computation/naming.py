"""What `losses` asks for by name, beside the model and the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import nn

NAMES = ("shared", "targets")
"""What may be asked for: what members of an alternation share, and averaged twins."""

_SOURCES = {
    "shared": "funcfreeze.alternate(..., shared=f) gives that to its members, and this is a lone Step, or an "
    "alternation without shared=",
    "targets": "neither this Step nor an alternation that it is a member of declares any: "
    'Step(..., targets={"teacher": funcfreeze.ema("online", 0.99)})',
}


@dataclass(frozen=True)
class Asked:
    """What a function asks for by name.

    Attributes:
        needed: what it cannot be called without.
        optional: what has a default.

    >>> Asked.by(lambda model, batch, *, targets: {})
    Asked(needed=('targets',), optional=())
    >>> Asked.by(lambda model, targets, shared=None: {})
    Asked(needed=(), optional=('shared',))
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...]

    @staticmethod
    def by(function: Callable[..., object]) -> Asked:
        """What the parameters after the first two say: those two are model and batch, however they are called."""
        called = function.forward if isinstance(function, nn.Module) else function  # which __call__ does not name
        try:
            parameters = [*inspect.signature(called).parameters.values()]
        except (TypeError, ValueError):  # written in C, without a signature
            return Asked((), ())
        positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        named = [
            one for one in parameters if one.name in NAMES and (one in positional[2:] or one.kind is one.KEYWORD_ONLY)
        ]
        return Asked(
            tuple(one.name for one in named if one.default is one.empty),
            tuple(one.name for one in named if one.default is not one.empty),
        )

    def __contains__(self, name: str) -> bool:
        return name in self.needed or name in self.optional

    def unmet(self, given: Collection[str]) -> Iterator[str]:
        """What is wrong where only these are given."""
        for name in self.needed:
            if name not in given:
                yield f"`losses` names {name!r}: {_SOURCES[name]}"
