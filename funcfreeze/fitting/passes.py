"""Through the data once, so many times, or without end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from funcfreeze.checkpoint.batches import Batches
from funcfreeze.checkpoint.resumable import Resumable


def batch_after_batch(data: Iterable[Any], epochs: int | None) -> Iterator[Any]:
    """Batch after batch: through the data so many times, or without end where it can be gone through again.

    Raises:
        ValueError: there is none.
    """
    passes = empty = 0
    is_all_empty = True
    while True:
        if epochs is not None and (data.epoch if isinstance(data, Batches) else passes) >= epochs:
            return
        empty += 1
        for batch in data:
            empty, is_all_empty = 0, False
            yield batch
        passes += 1
        if isinstance(data, Iterator):
            return
        if empty > isinstance(data, Resumable):  # what was stopped at its very end has nothing left once
            if is_all_empty:
                raise ValueError(f"data gave no batch: {type(data).__name__} is empty, or leaves out what it has")
            return


def end_of(data: Any, epochs: int, count: int) -> int | None:
    """The count at which so many epochs end, if the data says how long it is."""
    if isinstance(data, Batches):
        return count + (epochs - data.epoch) * len(data) - data.position
    try:
        return count + epochs * len(data)
    except TypeError:  # a stream, or a loader of one
        return None
