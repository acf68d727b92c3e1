"""What of a batch a trace takes for granted: its structure, and the leaves that are no tensors."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import optree
from torch import Tensor

from funcfreeze.compile.reading import PLAIN
from funcfreeze.model.containers import Structure, flatten, opens, parts_of


class Constant(NamedTuple):
    """A plain value in the batch: 1, 1.0 and True are three different ones, and every NaN is the same."""

    kind: type
    shown: str
    leaf: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self[:2] == other[:2]

    def __hash__(self) -> int:
        return hash(self[:2])


class Form(NamedTuple):
    """All of a batch but its tensors. Compares by value.

    Attributes:
        structure: that of its containers, in which the keys of dicts are sorted.
        orders: the keys of its dicts as they come, since `losses` may go by that.
        constants: the leaves that are no tensors, by position.
    """

    structure: Structure
    orders: tuple[tuple[Any, ...], ...]
    constants: dict[int, Constant]

    @staticmethod
    def of(batch: Any) -> tuple[Form, list[Tensor]]:
        """The form of a batch, and its tensors."""
        leaves, structure = flatten(batch, _data_alone)
        constants = {
            index: Constant(type(leaf), repr(leaf), leaf)
            for index, leaf in enumerate(leaves)
            if not isinstance(leaf, Tensor)
        }
        form = Form(structure, tuple(_orders(batch)), constants)
        return form, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def batch(self, tensors: Iterator[Tensor]) -> Any:
        """A batch of this form."""
        number = self.structure.num_leaves
        return self.structure.unflatten(
            self.constants[index].leaf if index in self.constants else next(tensors) for index in range(number)
        )

    def difference(self, other: Form) -> str:
        """What another has that is different."""
        if self.structure != other.structure:
            return "the batch has another structure"
        if self.orders != other.orders:
            return "a dict in the batch has its keys in another order"
        return f"a Python value in the batch changed from {_shown(self.constants)} to {_shown(other.constants)}"

    def check(self) -> None:
        """Refuse leaves that are neither tensors nor plain values.

        Raises:
            TypeError: naming all of them.
        """
        names = self.structure.names() if self.constants else []
        problems = [
            f"batch{names[index]}: {kind.__name__}" if names[index] else kind.__name__
            for index, (kind, _, value) in self.constants.items()
            if not isinstance(value, PLAIN)
        ]
        if problems:
            raise TypeError(
                "a compiled step takes batches of tensors, numbers and strings in dicts, lists, tuples, dataclasses "
                "and mappings, got\n"
                + "\n".join(f"  - {problem}" for problem in problems)
                + "\nturn it into one of these (torch.as_tensor, dict(...)), or build the Step with compile=False"
            )


def _orders(value: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        yield tuple(value)
        for inner in value.values():
            yield from _orders(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _orders(inner)
    elif opens(value):
        yield from _orders(parts_of(value))


def _data_alone(container: Any) -> Any:
    """A `UserDict` without the attributes that hold other things than data: a tokenizer keeps its own objects there."""
    if not isinstance(container, UserDict):
        return container
    others = [name for name, held in vars(container).items() if name != "data" and not _is_data(held)]
    return _without(container, others) if others else container


def _is_data(held: Any) -> bool:
    return all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in optree.tree_leaves(held))


def _without(container: UserDict[Any, Any], names: list[str]) -> UserDict[Any, Any]:
    copied = copy.copy(container)
    vars(copied).update(dict.fromkeys(names))
    return copied


def _shown(constants: dict[int, Constant]) -> str:
    return ", ".join(constant.shown for constant in constants.values())
