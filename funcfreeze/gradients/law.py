"""What every engine computes, in its own terms: losses and leaves by index, weights by index.

    g[p] = Σ_k w[k,p] · ∂L_k/∂θ_p        all L_k from the same forward

    p is touched  ⇔  for some active route (k, p) autograd delivers a gradient of L_k at p, be it zero

An untouched parameter has no gradient, which is not the same as a zero one. At a leaf under a merge rule the terms of
the sum are kept apart, for the rule to make one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.autograd.graph import Node

from funcfreeze.declare.plan import Plan, raise_problems
from funcfreeze.declare.routes import UNIT, Weight, weight_value
from funcfreeze.declare.timed_routes import timed_routes
from funcfreeze.gradients.sums import add
from funcfreeze.gradients.weights import LossWeights
from funcfreeze.merge.deciding import Met
from funcfreeze.merge.rule import PLACES, Rule

Evaluate = Callable[[list[Tensor]], tuple[Any, Any]]
"""The forward: parameters in the routing's order -> (what the user's `losses` returned, anything else)."""


class Live(NamedTuple):
    """A graph that was made before the forward, and that the losses hang on.

    Attributes:
        leaves: leaf index -> the leaf of that graph, which stands for the parameter in the forward, too.
        known: the ids of all leaves of that graph, also of those at which nobody differentiates now.
        hooked: the nodes of it that are known to carry hooks; None if any may.
        retain: whether somebody needs it afterwards.
    """

    leaves: Mapping[int, Tensor]
    known: frozenset[int]
    hooked: Sequence[Node] | None
    retain: bool


class Place(NamedTuple):
    """Where losses meet under a rule.

    Attributes:
        label: of the overlap.
        rule: what decides.
        leaves: the indices of its parameters.
        losses: the indices of the losses that may update one of them.
    """

    label: str
    rule: Rule
    leaves: tuple[int, ...]
    losses: tuple[int, ...]


@dataclass(frozen=True)
class Routing:
    """A plan in index space, at one count (see `timetable`).

    Attributes:
        losses: the names of the losses.
        paths: the path of each leaf.
        weights: for each loss, (leaf index, weight index) of every parameter it may update.
        terms: what each weight index stands for: weights that are added up. Index 0 is the weight 1.
        differentiable: leaves that no loss may update and that require grad in the forward all the same.
        active: of the plan's timings, in their order, which are active; stands for the routing beside others of a plan.
        resting: the losses of which some route is not active. They may hang on constants alone now.
        live: a graph that goes on into the losses', if there is one.
        places: where losses meet under a rule other than the sum, that looks at the parameters' gradients.
        crossings: the same for rules that look at the cotangents where the losses meet.
        owners: the losses of the last weights, each one's own: of what is kept apart at leaves under a rule.
    """

    losses: tuple[str, ...]
    paths: tuple[str, ...]
    weights: tuple[LossWeights, ...]
    terms: tuple[tuple[Weight, ...], ...]
    differentiable: frozenset[int] = frozenset()
    active: tuple[bool, ...] = ()
    resting: frozenset[str] = frozenset()
    live: Live | None = None
    places: tuple[Place, ...] = ()
    crossings: tuple[Place, ...] = ()
    owners: tuple[int, ...] = ()

    @staticmethod
    def of(plan: Plan, differentiable: Set[int] = frozenset()) -> Routing:
        """Number a plan's leaves and distinct weights.

        Raises:
            RouteError: a route is timed, so that it depends on a count what is active (see `timetable`).
        """
        if plan.timings:
            raise_problems(
                [f"loss {loss!r}: {route}: {_NO_COUNT}" for loss, route in timed_routes(plan.losses, plan.rows)]
            )
        terms: list[tuple[Weight, ...]] = [UNIT]
        weights = []
        for loss in plan.losses:
            routed = ((leaf, row.weights[loss]) for leaf, row in enumerate(plan.rows) if loss in row.weights)
            weights.append(tuple((leaf, _number(terms, given)) for leaf, given in routed))
        everywhere = _places(plan)
        places = tuple(place for place in everywhere if place.rule.at == PLACES[0])
        crossings = tuple(place for place in everywhere if place.rule.at != PLACES[0])
        rows, owners = _kept_apart(weights, terms, frozenset(leaf for place in places for leaf in place.leaves))
        routing = Routing(plan.losses, plan.paths, rows, tuple(terms), owners=owners)
        routing = replace(routing, places=places, crossings=crossings)
        return replace(routing, differentiable=frozenset(differentiable) - routing.routed)

    def says_as(self, other: Routing) -> bool:
        """Whether it says the same as another of the same plan."""
        mine, theirs = ((one.weights, one.resting, len(one.terms)) for one in (self, other))
        return mine == theirs and all(map(_alike, self.terms, other.terms))

    @cached_property
    def ruled(self) -> frozenset[int]:
        """The leaves at which a rule decides."""
        return frozenset(leaf for place in self.places for leaf in place.leaves)

    @cached_property
    def shared(self) -> int:
        """So many weights may be shared by losses; those after them are each one loss's own."""
        return len(self.terms) - len(self.owners)

    @cached_property
    def routed(self) -> frozenset[int]:
        """The leaves that some loss may update."""
        return frozenset(leaf for row in self.weights for leaf, _ in row)

    @cached_property
    def requires_grad(self) -> tuple[bool, ...]:
        """For every leaf, whether it requires grad in the forward."""
        wanted = self.routed | self.differentiable
        return tuple(leaf in wanted for leaf in range(len(self.paths)))

    def weight_values(self, step: Tensor | None) -> Sequence[float | Tensor]:
        """The value of every weight at a step."""
        return self._numbers or [weight_value(terms, step) for terms in self.terms]

    @cached_property
    def _numbers(self) -> Sequence[float | Tensor] | None:
        """The same at any step, where all weights are numbers."""
        changing = any(isinstance(weight, Tensor) or callable(weight) for terms in self.terms for weight in terms)
        return None if changing else [weight_value(terms, None) for terms in self.terms]


def _places(plan: Plan) -> tuple[Place, ...]:
    leaf = {path: index for index, path in enumerate(plan.paths)}
    number = {loss: index for index, loss in enumerate(plan.losses)}
    return tuple(
        Place(
            overlap.label,
            overlap.rule,
            tuple(leaf[path] for path in overlap.paths),
            tuple(number[loss] for loss in overlap.losses),
        )
        for overlap in plan.merge
        if overlap.paths and not overlap.rule.is_sum
    )


def _kept_apart(
    weights: Sequence[LossWeights], terms: list[tuple[Weight, ...]], leaves: frozenset[int]
) -> tuple[tuple[LossWeights, ...], tuple[int, ...]]:
    """The weights, with an index of its own for every loss at these leaves, and whose these last indices are.

    Terms are added for them.
    """
    own: dict[tuple[int, int], int] = {}
    first = len(terms)
    rows = tuple(
        tuple(
            (leaf, own.setdefault((loss, weight), first + len(own)) if leaf in leaves else weight)
            for leaf, weight in row
        )
        for loss, row in enumerate(weights)
    )
    terms += [terms[weight] for _, weight in own]
    return rows, tuple(loss for loss, _ in own)


_NO_COUNT = (
    "the route is timed, and there is no count of steps here; give ff.combine or ff.backward step=, or use ff.Step"
)


def _number(terms: list[tuple[Weight, ...]], given: tuple[Weight, ...]) -> int:
    """The index of a weight: equal numbers and schedules share one, tensors only with themselves."""
    for index, known in enumerate(terms):
        if _alike(known, given):
            return index
    terms.append(given)
    return len(terms) - 1


def _alike(one: tuple[Weight, ...], other: tuple[Weight, ...]) -> bool:
    return len(one) == len(other) and all(map(_same, one, other))


def _same(one: Weight, other: Weight) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return bool(one == other)


class OtherLeaf(NamedTuple):
    """A leaf of the losses' graph that is none of the parameters, and the losses that end in it.

    Attributes:
        tensor: the leaf.
        losses: the names of the losses.
        is_old: whether a node that leads to it was made before the forward began.
    """

    tensor: Tensor
    losses: tuple[str, ...]
    is_old: bool


@dataclass(frozen=True)
class Outcome:
    """What one forward and its backward gave.

    All of it is detached, but where grad mode was on: there it follows torch.func's rule, and what depends on a tensor
    outside the forward that requires grad carries a graph to it.

    Attributes:
        gradients: for each leaf its merged gradient, or None where it is untouched, or where they are apart.
        losses: every present loss, unweighted, by name.
        rest: what the forward returned beside the losses.
        other_leaves: where else the losses' graph ends, if the engine looks.
        apart: for each loss, leaf -> its gradient, at the leaves under a rule; empty without any.
        met: what was seen and decided above parameters, by the label of the overlap.
    """

    gradients: Sequence[Tensor | None]
    losses: Mapping[str, Tensor]
    rest: Any
    other_leaves: Sequence[OtherLeaf] = ()
    apart: Sequence[Mapping[int, Tensor]] = ()
    met: Mapping[str, Met] = field(default_factory=dict)


@dataclass(frozen=True)
class SeparateOutcome:
    """As `Outcome`, with the weighted gradients of each loss apart: for each loss, for each leaf. Always detached.

    Where a rule decides above parameters they say nothing of the merged ones, which are `crossed` then.
    """

    gradients: Sequence[Sequence[Tensor | None]]
    losses: Mapping[str, Tensor]
    rest: Any
    crossed: Outcome | None = None


def summed(outcome: SeparateOutcome, routing: Routing) -> Outcome:
    """The merged gradients, from those of each loss; apart where a rule decides."""
    ruled = routing.ruled
    gradients = [
        None if leaf in ruled else reduce(add, column)
        for leaf, column in enumerate(zip(*outcome.gradients, strict=True))
    ]
    rows = [
        {leaf: gradient for leaf in sorted(ruled) if (gradient := row[leaf]) is not None} for row in outcome.gradients
    ]
    return Outcome(gradients, outcome.losses, outcome.rest, apart=rows if ruled else ())


class Engine(Protocol):
    """A way to compute the law. All engines evaluate the forward exactly once.

    `seed` is the 0-d cotangent that every loss starts with, such as a loss scale; None is one. It multiplies gradients,
    not the losses that are reported.

    Attributes:
        finds_other_leaves: whether outcomes tell where else the losses' graph ends.
    """

    finds_other_leaves: bool

    def merged(
        self,
        evaluate: Evaluate,
        params: Sequence[Tensor],
        routing: Routing,
        step: Tensor | None,
        seed: Tensor | None = None,
    ) -> Outcome:
        """Every leaf's gradient, summed over the losses with their weights; apart at leaves under a rule."""
        ...

    def separate(
        self,
        evaluate: Evaluate,
        params: Sequence[Tensor],
        routing: Routing,
        step: Tensor | None,
        seed: Tensor | None = None,
    ) -> SeparateOutcome:
        """Every loss's weighted gradients apart."""
        ...


__all__ = ["Engine", "Evaluate", "Outcome", "Routing", "SeparateOutcome"]
