"""Data that can say where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Resumable(Protocol):
    """A loader, a sampler or a stream that goes on where another one was, as torchdata's `StatefulDataLoader` does."""

    def state_dict(self) -> Mapping[str, Any]:
        """Where it is, as plain data."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Go there."""
        ...


def checked_data(data: object) -> Resumable | None:
    """The data, if it can say where it is.

    Raises:
        TypeError: it cannot.
    """
    if data is None or isinstance(data, Resumable):
        return data
    raise TypeError(
        f"data= is something with `state_dict` and `load_state_dict`, such as torchdata's StatefulDataLoader; "
        f"{type(data).__name__} cannot say where it is"
    )
