"""Batches of a data set in an order that a seed decides, which can say where they are and go on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from operator import index
from typing import Any, NamedTuple, SupportsIndex, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from funcfreeze.seeding import seeded


class Batches:
    """A loader whose order, and whatever is drawn for a batch, follow from a seed, the epoch and the batch's number.

    So they do not depend on how many workers there are, on what else draws random numbers, or on whether the run was
    stopped in between: iterating goes on where it was, and through one epoch. Python's, NumPy's and torch's global
    generators (of the CPU) are seeded for every batch while it is made, `collate_fn` included, and put back; one that a
    data set keeps for itself is not known here (without workers, `generators=` of `save` and `resume` take it). Two in
    one run get a seed each, by which one is not taken for the other.

    Args:
        dataset: with a length, and items by number.
        batch_size: items a batch.
        seed: of all that is drawn.
        shuffle: whether every epoch has an order of its own.
        drop_last: whether a last batch that is not full is left out.
        options: of `torch.utils.data.DataLoader`: `num_workers`, `collate_fn`, `pin_memory` and so on.

    Raises:
        TypeError: the data set has no length or no items by number, or an option is decided here.
        ValueError: there is no batch.

    >>> batches = Batches(range(7), 3, seed=1)
    >>> first = next(iter(batches))
    >>> kept = batches.state_dict()
    >>> rest = list(batches)
    >>> again = Batches(range(7), 3, seed=1)
    >>> again.load_state_dict(kept)
    >>> [torch.equal(one, other) for one, other in zip(again, rest, strict=True)]
    [True, True]
    >>> batches.epoch, len(batches)
    (1, 3)
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError("Batches takes a data set with items by number; an iterable one decides its own order")
        own = sorted({"sampler", "batch_sampler", "generator"} & options.keys())
        if own:
            raise TypeError(f"Batches decides the order itself: leave out {', '.join(own)}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is a number of items, at least 1, got {batch_size!r}")
        if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
            raise TypeError(f"seed is a whole number, got {type(seed).__name__}")
        self._items, self._size, self._drop_last = len(dataset), batch_size, drop_last
        self._seed, self._shuffle = index(seed), shuffle
        if len(self) == 0:
            why = f"its {self._items} items are left out by drop_last" if self._items else "the data set has no items"
            raise ValueError(f"there is no batch in Batches of {batch_size}: {why}")
        self.epoch, self.position = 0, 0
        # the loader's own generator: from the global one it would draw once more where a run is resumed
        drawing = _Drawing(dataset, self._seed, options.pop("collate_fn", None) or default_collate)
        self._loader: DataLoader[Any] = DataLoader(
            drawing,
            batch_sampler=cast("Any", _Ahead(self)),
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            **options,
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._items // self._size if self._drop_last else -(-self._items // self._size)

    def __iter__(self) -> Iterator[Any]:
        """The rest of this epoch.

        Raises:
            RuntimeError: somebody else iterates, too, and would take batches away.
        """
        at = self.epoch, self.position
        for batch in self._loader:
            self._refuse_elsewhere(at)
            self.position += 1
            at = self.epoch, self.position
            yield batch
        self._refuse_elsewhere(at)
        self.epoch, self.position = self.epoch + 1, 0

    def _refuse_elsewhere(self, at: tuple[int, int]) -> None:
        if (self.epoch, self.position) != at:
            raise RuntimeError(
                f"these Batches were moved from {_named(at)} to {_named((self.epoch, self.position))} while they were "
                "iterated; for an evaluation on the same data make a loader of its own"
            )

    def numbered(self) -> Iterator[Numbered]:
        """What the rest of the epoch is made of: the items' numbers, batch by batch."""
        generator = torch.Generator().manual_seed(_seed(self._seed, self.epoch, "order"))
        inside = range(self._items)
        order = torch.randperm(self._items, generator=generator, device="cpu").tolist() if self._shuffle else inside
        for number in range(self.position, len(self)):
            yield Numbered([*order[number * self._size : (number + 1) * self._size]], self.epoch, number)

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"epoch": self.epoch, "position": self.position, **self._declared}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go there.

        Raises:
            ValueError: other data, or another batch size, seed or order: tells all.
        """
        differing = [
            f"{name} was {state.get(name)!r}, is {mine!r}"
            for name, mine in self._declared.items()
            if state.get(name) != mine
        ]
        if differing:
            raise ValueError(f"the position is that of other batches: {'; '.join(differing)}")
        self.epoch, self.position = state["epoch"], state["position"]

    @property
    def _declared(self) -> dict[str, Any]:
        return {
            "items": self._items,
            "batch_size": self._size,
            "drop_last": self._drop_last,
            "shuffle": self._shuffle,
            "seed": self._seed,
        }


class Numbered(NamedTuple):
    """The numbers of a batch's items, and which batch it is; as such it comes to a worker."""

    items: list[int]
    epoch: int
    number: int


class _Ahead:
    """What the loader asks for batches, as far ahead as its workers are."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Numbered]:
        return self._batches.numbered()

    def __len__(self) -> int:
        return len(self._batches) - self._batches.position


class _Drawing(Dataset[Any]):
    """A data set that makes a batch, items and what is made of them, under a seed of the batch's own."""

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._seed, self._collate = dataset, seed, collate

    def __getitems__(self, batch: Numbered) -> Any:
        with seeded(_seed(self._seed, batch.epoch, batch.number)):
            together = getattr(self._dataset, "__getitems__", None)
            numbers = batch.items
            items = together(numbers) if together is not None else [self._dataset[index] for index in numbers]
            return self._collate(items)


def _named(at: tuple[int, int]) -> str:
    return f"batch {at[1]} of epoch {at[0]}"


def _as_it_is(batch: Any) -> Any:
    return batch


def _seed(seed: int, epoch: int, what: object) -> int:
    """A seed of its own for every epoch and batch, 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch} {what}".encode()).digest()[:8], "big") >> 1
