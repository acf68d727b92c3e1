"""Data that can say where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from funcfreeze.checkpoint.batches import Batches


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
    if data is None or (isinstance(data, Resumable) and not isinstance(data, nn.Module)):
        return data
    raise TypeError(
        f"data= is something with `state_dict` and `load_state_dict`, such as torchdata's StatefulDataLoader; "
        f"{type(data).__name__} cannot say where it is"
    )


def position_of(data: Resumable) -> dict[str, Any]:
    """Where it is, and what it must be like to go there."""
    return {"state": data.state_dict(), "like": _likeness(data)}


def moved_to(data: Resumable, position: Mapping[str, Any]) -> None:
    """Let it go where other data was.

    Raises:
        ValueError: it is not like that data, and would go on with other batches; or it says so itself.
    """
    saved, present = position["like"], _likeness(data)
    differing = [
        f"{name} was {saved.get(name)!r}, is {present.get(name)!r}"
        for name in sorted(saved | present)
        if saved.get(name) != present.get(name)
    ]
    if differing:
        raise ValueError(f"the position is that of other data: {'; '.join(differing)}")
    data.load_state_dict(position["state"])


def _is_torchdatas(data: Any) -> bool:
    """Whose positions are of so many workers."""
    return any(kind.__module__.startswith("torchdata.") for kind in type(data).__mro__)


def _likeness(data: Any) -> dict[str, Any]:
    """What a loader tells of itself that decides where a position leads; `Batches` say so themselves."""
    if isinstance(data, Batches):
        return {}
    names = ("batch_size", "drop_last", *(("num_workers",) if _is_torchdatas(data) else ()))
    numbers = {name: getattr(data, name, None) for name in names}
    plain = {name: value for name, value in numbers.items() if isinstance(value, int)}
    try:
        length = {"len": len(data)}
    except (TypeError, NotImplementedError):  # a stream, or a loader of one
        length = {}
    return {**plain, **length}
