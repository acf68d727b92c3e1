"""What of a batch a trace takes for granted: its structure, and the leaves that are no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import optree
from torch import Tensor

from funcfreeze.compile.reading import PLAIN


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
        structure: as optree knows it, which sorts the keys of dicts.
        orders: the keys of its dicts as they come, since `losses` may go by that.
        constants: the leaves that are no tensors, by position.
    """

    structure: optree.PyTreeSpec
    orders: tuple[tuple[Any, ...], ...]
    constants: dict[int, Constant]

    @staticmethod
    def of(batch: Any) -> tuple[Form, list[Tensor]]:
        """The form of a batch, and its tensors."""
        leaves, structure = optree.tree_flatten(batch, none_is_leaf=True)
        constants = {
            index: Constant(type(leaf), repr(leaf), leaf)
            for index, leaf in enumerate(leaves)
            if not isinstance(leaf, Tensor)
        }
        form = Form(structure, tuple(_orders(batch)), constants)
        return form, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def batch(self, tensors: Iterator[Tensor]) -> Any:
        """A batch of this form."""
        leaves = [
            self.constants[index].leaf if index in self.constants else next(tensors)
            for index in range(self.structure.num_leaves)
        ]
        return optree.tree_unflatten(self.structure, leaves)

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
        paths = self.structure.paths() if self.constants else []
        problems = [
            f"batch[{']['.join(map(repr, paths[index]))}]: {kind.__name__}" if paths[index] else kind.__name__
            for index, (kind, _, value) in self.constants.items()
            if not isinstance(value, PLAIN)
        ]
        if problems:
            raise TypeError(
                "a compiled step takes batches of tensors, numbers and strings in dicts, lists and tuples, got\n"
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


def _shown(constants: dict[int, Constant]) -> str:
    return ", ".join(constant.shown for constant in constants.values())
