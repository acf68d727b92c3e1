"""A batch in parts: how it is split, what each part weighs, and one half of a step from the halves of all parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcfreeze.computation.half import Half
from funcfreeze.declare.selectors import closest
from funcfreeze.gradients.sums import plus
from funcfreeze.model.containers import LEAVES, flatten, hidden_tensors
from funcfreeze.optim.transform import lines

Count = Callable[[Any], int | float | Tensor]
"""From a part of a batch to how much a mean over it counts: the number of its tokens, say."""

Shares = Mapping[str, Tensor | None]
"""Loss -> the weight of a part in its mean, 0-d; None where it counts 0: a mean over nothing is NaN, also times 0."""


class Microbatches(tuple[Any, ...]):
    """Batches that make one step together, as a loader gave them one by one.

    >>> import torch
    >>> from torch import nn
    >>> import funcfreeze as ff
    >>> losses = lambda model, x: {"fit": model(x).square().mean()}
    >>> step = ff.Step(nn.Linear(2, 1), losses, {"fit": "*"}, optimizer=ff.optim.sgd(0.1))
    >>> state, metrics = step(step.init(), ff.Microbatches([torch.ones(3, 2), torch.zeros(3, 2)]))
    >>> metrics["fit"].shape, state.step
    (torch.Size([]), tensor(1))
    """

    def __new__(cls, batches: Iterable[Any]) -> Microbatches:
        if isinstance(batches, Tensor | Mapping | str):
            raise TypeError(f"Microbatches takes a list of batches, got {type(batches).__name__}")
        made = super().__new__(cls, batches)
        if not made:
            raise ValueError("Microbatches takes at least one batch, got none")
        return made


@dataclass(frozen=True, eq=False)
class Splitting:
    """How batches are split, and what the parts weigh.

    Attributes:
        number: into how many parts; None where only `Microbatches` are in parts.
        counts: loss -> how much its mean over a part counts; each 1 for a loss without.
        shares: loss -> 0-d tensor, the weight of the part that is computed now. The same tensors at every call, so that
            a compiled graph reads them anew.
    """

    number: int | None
    counts: Mapping[str, Count]
    shares: Mapping[str, Tensor]

    @staticmethod
    def of(number: object, counts: object, losses: Sequence[str], device: torch.device) -> Splitting:
        """What was declared, checked.

        Raises:
            TypeError, ValueError: what is wrong with it.
        """
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(
                f"microbatches is the number of parts that a batch is split into, at least 1; got {number!r}; batches "
                "that came one by one are given as funcfreeze.Microbatches([...])"
            )
        if counts is not None and not isinstance(counts, Mapping):
            raise TypeError(
                f'counts is a mapping such as {{"lm": lambda batch: (batch["labels"] != -100).sum()}}, got {counts!r}'
            )
        given = {} if counts is None else dict(counts)
        problems = [f"no loss is called {name!r}{closest(str(name), losses)}" for name in given if name not in losses]
        problems += [
            f"{name!r}: a function from a part of the batch to a number, got {count!r}"
            for name, count in given.items()
            if not callable(count)
        ]
        if problems:
            raise ValueError(lines("counts:", problems))
        ones = {name: torch.ones((), dtype=torch.float64, device=device) for name in losses}
        return Splitting(number, given, ones)

    def splits(self, batch: Any) -> bool:
        """Whether it comes in parts."""
        return self.number is not None or isinstance(batch, Microbatches)

    def parts(self, batch: Any) -> Sequence[Any] | None:
        """The parts of a batch, or None where it is taken whole.

        Raises:
            ValueError: it does not split into as many parts.
        """
        if isinstance(batch, Microbatches):
            return batch
        if self.number is None:
            return None
        uneven = len(self.counts) == len(self.shares)
        return split(batch, self.number, uneven)

    def weights(self, parts: Sequence[Any]) -> list[dict[str, Tensor | None]]:
        """For every part, loss -> its count over the sum of all counts. Waits for no device."""
        rows: list[dict[str, Tensor | None]] = [{} for _ in parts]
        for name, share in self.shares.items():
            count = self.counts.get(name)
            found = [1.0 if count is None else _checked(name, count(part)) for part in parts]
            values = [torch.as_tensor(value, dtype=share.dtype).to(share.device, non_blocking=True) for value in found]
            total = torch.stack(values).sum()
            for row, value, given in zip(rows, values, found, strict=True):
                row[name] = None if _is_zero(given) else value / total
        return rows

    def accumulated(
        self, parts: Sequence[Any], run: Callable[[Any, Shares, Mapping[str, Tensor], Mapping[str, Tensor]], Half]
    ) -> Half:
        """One half from those of all parts, computed one after another.

        Args:
            parts: of the batch.
            run: computes a part: (the part, its shares, the buffers and the parameters written so far by path) -> its
                half.
        """
        weights = self.weights(parts)
        gradients, rows = Sums(), {name: Sums() for name in self.shares}
        halves: list[Half] = []
        buffers: Mapping[str, Tensor] = {}
        written: dict[str, Tensor] = {}
        for part, row in zip(parts, weights, strict=True):
            for name, weight in row.items():
                if weight is not None:
                    self.shares[name].copy_(weight)
            shares = {name: None if row[name] is None else share for name, share in self.shares.items()}
            half = run(part, shares, buffers, written)
            gradients.add(half.gradients)
            for name, own in half.per_loss.items():
                rows[name].add(own)
            buffers, written = half.buffers, {**written, **half.written}
            halves.append(half.replace(gradients={}, per_loss={}, buffers={}, written={}))
            del half  # its gradients are not to be alive beside the sums and those of the next part
        names = {name: None for half in halves for name in half.metrics}
        metrics = {name: tuple(half.metrics.get(name) for half in halves) for name in names}
        has_rows = any(sums.sums for sums in rows.values())
        apart = {name: sums.sums for name, sums in rows.items() if has_rows}
        return Half(gradients.sums, _means(halves, weights), metrics, buffers, written, apart)


@dataclass(frozen=True)
class Sums:
    """Sums of gradients by path.

    Attributes:
        sums: path -> sum.
        own: the paths whose sum is in memory of its own. A gradient may be another parameter's, or a view.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add gradients, in place where the memory is our own."""
        for path, gradient in gradients.items():
            if path not in self.sums:
                self.sums[path] = gradient
            elif path in self.own and gradient.layout is torch.strided:
                self.sums[path].add_(gradient)
            else:
                self.sums[path] = total = plus(self.sums[path], gradient)
                if total.layout is torch.strided:
                    self.own.add(path)


def _means(halves: Sequence[Half], weights: Sequence[Shares]) -> dict[str, Tensor]:
    """Every loss's mean over the parts in which it is present, by their weights."""
    means = {}
    for name in {name: None for half in halves for name in half.losses}:
        there = [
            (half.losses[name], share)
            for half, row in zip(halves, weights, strict=True)
            if name in half.losses and (share := row[name]) is not None
        ]
        total = torch.stack([weight for _, weight in there]).sum()
        mean = torch.stack([value.to(weight.dtype) * weight for value, weight in there]).sum() / total
        means[name] = mean.to(there[0][0].dtype)
    return means


def times(loss: Tensor | None, share: Tensor | None) -> Tensor | None:
    """A loss as a part of its mean; absent where it counts nothing."""
    return None if loss is None or share is None else loss * share.to(loss.dtype)


def _is_zero(count: int | float | Tensor) -> bool:
    """Whether it is known to be 0 without waiting for a device."""
    return bool(count == 0) if not isinstance(count, Tensor) or count.is_cpu else False


def _checked(name: str, value: object) -> int | float | Tensor:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.detach()
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        seen = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"counts[{name!r}] gave {seen}; it gives a number of at least 0, or a 0-d tensor")
    return value


def split(batch: Any, number: int, uneven: bool = False) -> list[Any]:
    """A batch in so many parts, every tensor split along its first dimension; all else is in every part.

    Args:
        batch: tensors in containers of any kind; those without dimensions are in every part.
        number: of parts.
        uneven: whether parts may differ by one row.

    Raises:
        ValueError: the tensors have different first dimensions, or too few rows, or the parts would not be equal.

    >>> import torch
    >>> [part["x"].tolist() for part in split({"x": torch.arange(4), "scale": 2.0}, 2)]
    [[0, 1], [2, 3]]
    """
    leaves, structure = flatten(batch)
    problem = next(_problems(leaves, number, uneven), None)
    if problem is not None:
        raise ValueError(f"microbatches={number}: {problem}")
    chunks = {
        index: leaf.tensor_split(number)
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.ndim > 0
    }
    return [
        structure.unflatten([chunks[index][part] if index in chunks else leaf for index, leaf in enumerate(leaves)])
        for part in range(number)
    ]


def _problems(leaves: Sequence[Any], number: int, uneven: bool) -> Iterator[str]:
    whole = "; give the parts yourself, as funcfreeze.Microbatches([...])"
    hidden = [type(leaf).__name__ for leaf in leaves if type(leaf) not in LEAVES and any(hidden_tensors(leaf))]
    if hidden:
        yield f"the batch holds tensors where they cannot be split, in {', '.join(dict.fromkeys(hidden))}{whole}"
    rows = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0}
    if len(rows) != 1:
        seen = f"tensors with {', '.join(map(str, sorted(rows)))} rows" if rows else "none with rows"
        yield f"every tensor of the batch is split along its first dimension, and there are {seen}{whole}"
        return
    (size,) = rows
    if size < number:
        yield f"the batch has {size} rows{whole}"
    elif size % number and not uneven:
        yield (
            f"the batch has {size} rows, which is no multiple: a mean over parts of different sizes is not the mean "
            "over the batch. Give counts={...} for every loss, or let the loader drop what is left over"
        )
