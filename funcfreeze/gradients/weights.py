"""What each loss does to the parameters below a node, and which cotangents may therefore travel together."""

from __future__ import annotations

from typing import NamedTuple

UNIT_WEIGHT = 0
"""The index of the weight 1, which multiplies nothing."""

LossWeights = tuple[tuple[int, int], ...]
"""For one loss: (leaf index, weight index) of every parameter it may update."""

Rest = tuple[tuple[int, int], ...]
"""What is left of a flow's weights below a node: (weight index, bit set of leaves)."""


class Flow(NamedTuple):
    """Cotangents that travel together: a bit set of losses, and whether the weight is in the cotangent."""

    losses: int
    folded: bool


class Weights:
    """What each loss does to the leaves below a node.

    Args:
        weights: of the losses.
        shared: weight indices from here on are each one loss's own: its gradient is to stay apart at these leaves.
    """

    def __init__(self, weights: tuple[LossWeights, ...], shared: int) -> None:
        self.shared = shared
        self.of_leaf = [dict(row) for row in weights]
        self.leaves_with = [_leaves_with(row) for row in weights]
        self.support = [sum(mask for _, mask in masks) for masks in self.leaves_with]
        self.routed = 0
        for mask in self.support:
            self.routed |= mask
        self._known: dict[tuple[int, int], tuple[Rest, int]] = {}

    def left_below(self, flow: Flow, reach: int) -> tuple[Rest, int]:
        """What is left of a flow's weights over the leaves in `reach`, and the weight to fold into its cotangent.

        Flows with equal rests may be added once each is multiplied by its weight.
        """
        loss = any_loss(flow.losses)
        if flow.folded:
            return ((UNIT_WEIGHT, self.support[loss] & reach),), UNIT_WEIGHT
        known = self._known.get((loss, reach))
        if known is None:
            rest = tuple((weight, mask & reach) for weight, mask in self.leaves_with[loss] if mask & reach)
            known = (((UNIT_WEIGHT, rest[0][1]),), rest[0][0]) if self.may_fold(rest) else (rest, UNIT_WEIGHT)
            self._known[loss, reach] = known
        return known

    def may_fold(self, rest: Rest) -> bool:
        """Whether what is left is one weight all over, which may go into the cotangent."""
        return len(rest) == 1 and rest[0][0] < self.shared

    def at_leaf(self, flow: Flow, leaf: int) -> int:
        """The weight that a flow's gradient still lacks at a leaf."""
        return UNIT_WEIGHT if flow.folded else self.of_leaf[any_loss(flow.losses)][leaf]


def _leaves_with(row: LossWeights) -> Rest:
    """For each weight of a loss, in order, the bit set of leaves that have it."""
    masks: dict[int, int] = {}
    for leaf, weight in row:
        masks[weight] = masks.get(weight, 0) | 1 << leaf
    return tuple(sorted(masks.items()))


def any_loss(bits: int) -> int:
    """The index of one loss of a bit set; all losses of a flow are treated alike where it flows."""
    return (bits & -bits).bit_length() - 1
