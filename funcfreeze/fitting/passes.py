"""Through the data once, so many times, or without end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from funcfreeze.checkpoint.batches import Batches


def batch_after_batch(data: Iterable[Any], epochs: int | None) -> Iterator[Any]:
    """Batch after batch: through the data so many times, or without end where it can be gone through again."""
    passes = empty = 0
    while True:
        if epochs is not None and (data.epoch if isinstance(data, Batches) else passes) >= epochs:
            return
        empty += 1
        for batch in data:
            empty = 0
            yield batch
        passes += 1
        if empty > 1 or isinstance(data, Iterator):  # a pass that was stopped at its very end has nothing left
            return


def end_of(data: Any, epochs: int, count: int) -> int | None:
    """The count at which so many epochs end, if the data says how long it is."""
    if isinstance(data, Batches):
        return count + (epochs - data.epoch) * len(data) - data.position
    try:
        return count + epochs * len(data)
    except TypeError:  # a stream, or a loader of one
        return None
