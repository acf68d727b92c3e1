"""What the members of an alternation share: run once a call, its graph alive for those that are routed into it.

A DCGAN's loop runs the generator once, steps the critic on what came out, and then walks back through the same graph
for the generator. Here the losses name `shared`, and the routes say who gets gradients: nobody has to detach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from funcfreeze.alternating.members import Progress
from funcfreeze.computation.evaluation import Evaluation
from funcfreeze.computation.naming import Asked
from funcfreeze.computation.sharing import WithShared
from funcfreeze.computation.state import State
from funcfreeze.computation.statistics import FrozenNorms
from funcfreeze.declare.plan import Plan
from funcfreeze.declare.plans import Plans
from funcfreeze.gradients.graph import NO_LEAF, Graph, gradient_edge, read_graph, refuse_reentrant
from funcfreeze.gradients.hooks import noticing_hooks
from funcfreeze.gradients.law import Live
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.model.containers import flatten
from funcfreeze.optim.transform import lines
from funcfreeze.step import Step

Function = Callable[..., Any]
"""`f(model, batch)` -> tensors in containers of any kind."""


@dataclass(frozen=True, eq=False)
class Sharing:
    """A function that members share.

    Attributes:
        function: the user's.
        steps: the members by name.
        evaluation: the function over the model.
    """

    function: Function
    steps: Mapping[str, Step]
    evaluation: Evaluation

    @staticmethod
    def of(function: Function, steps: Mapping[str, Step], plans: Plans) -> Sharing:
        """A function over the members' model. Norms that one of those who ask for it freezes are frozen in it."""
        some = next(iter(steps.values())).computation.evaluation
        rows = tuple(plans.rows)
        losses = tuple(f"{member}.{loss}" for member, plan in plans.items() for loss in plan.losses)
        evaluation = Evaluation(
            some.functional,
            partial(_as_metric, function),
            Plan(losses, rows),
            FrozenNorms.union(step.computation.evaluation.frozen_norms for step in steps.values() if asks(step)),
            some.targets,
            Asked.by(function),
        )
        return Sharing(function, steps, evaluation)

    def asks(self, member: str) -> bool:
        """Whether a member's losses name it."""
        return asks(self.steps[member])

    def run(self, progress: Progress, states: Mapping[str, State], batch: Any) -> tuple[Shared, Progress]:
        """Run it, for the members of one call.

        Args:
            progress: the state before the first of them.
            states: what each of them sees, in the order in which they run.
            batch: what the function is given.

        Raises:
            ValueError: a member would walk through it at parameters that another has updated by then.
        """
        routed = {name: _routed(self.steps[name], state) for name, state in states.items()}
        asking = [name for name in states if self.asks(name)]
        until = [*states].index(asking[-1]) + 1  # who walks has to know what others have updated by then
        wanted = frozenset[str]().union(*[*routed.values()][:until])
        paths, params = self.evaluation.plan.paths, self.evaluation.leaves(progress.params)
        finally_do: list[Callable[[], None]] = []
        buffers = self._buffers(progress, [*states], asking)
        with grad_mode(True):
            leaves = [param.detach().requires_grad_(path in wanted) for path, param in zip(paths, params, strict=True)]
            watch = None
            if not self.evaluation.seen.watched:
                watch = self.evaluation.watch(progress.params, buffers)
            try:
                with noticing_hooks() as noticed:
                    _, beside = self.evaluation.call(leaves, buffers, batch, finally_do, watch)
            finally:
                for end in finally_do:
                    end()
        assert beside is not None, "what is shared comes as a metric"
        value = beside.metrics["shared"]
        live = {path: leaf for path, leaf in zip(paths, leaves, strict=True) if leaf.requires_grad}
        hooked = noticed.nodes if noticed.all_known else None
        reach = Reach.of(value, live)
        raise_conflicts(reach, routed, asking)
        walkers = [name for name in asking if reach.of_member(routed[name])]
        known = Live({}, frozenset(map(id, live.values())), hooked, False)
        shared = Shared(value if walkers else _detached(value), live, known, walkers, reach, routed)
        return shared, replace(
            progress,
            params={**progress.params, **beside.written} if beside.written else progress.params,
            buffers={**progress.buffers, **beside.buffers},
        )

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Inside, what is raised is noted to come from what is shared."""
        try:
            yield
        except Exception as error:
            error.add_note(f"raised by what the members of an alternation share: {name_of(self.function)}")
            raise

    def _buffers(self, progress: Progress, names: Sequence[str], asking: Sequence[str]) -> Mapping[str, Tensor]:
        """The buffers, with copies of twins that a member moves before another may walk through their values."""
        if "targets" not in self.evaluation.asked:
            return progress.buffers
        movers = [name for name in names if self.steps[name].computation.evaluation.targets.declared]
        if not any(names.index(walker) > names.index(mover) for walker in asking for mover in movers):
            return progress.buffers
        constants = self.evaluation.functional.constants
        return {path: value.clone() if path in constants else value for path, value in progress.buffers.items()}


@dataclass(eq=False)
class Shared:
    """What one call shares. The graph is let go with the last member that walks through it.

    Attributes:
        value: what the function returned, on a live graph.
        leaves: path -> leaf of that graph, of those that require grad.
        live: that graph, as engines know it.
        walkers: the members that still have to walk through it, in their order.
        reach: which parameters it depends on.
        routed: member -> the parameters that it may update now.
    """

    value: Any
    leaves: Mapping[str, Tensor]
    live: Live
    walkers: list[str]
    reach: Reach
    routed: Mapping[str, AbstractSet[str]]

    def given_to(self, member: str, batch: Any) -> WithShared:
        """The batch, and what is shared, as one member is given it."""
        value = self.value
        if member not in self.walkers:
            return WithShared(batch, _detached(value), {}, None)
        self.walkers.remove(member)
        if not self.walkers:
            self.value = _detached(value)
        order = [*self.routed]
        updated = frozenset[str]().union(*(self.routed[name] for name in order[: order.index(member)]))
        leaves = {path: self.leaves[path] for path in self.reach.at if path not in updated}
        others = frozenset(self.reach.at) - frozenset(leaves)
        return WithShared(batch, value, leaves, self.live._replace(retain=bool(self.walkers)), others)


@dataclass(frozen=True)
class Reach:
    """Which parameters a graph depends on.

    Attributes:
        paths: of the leaves.
        graph: its structure.
        at: path -> the node in which the graph ends there.
    """

    paths: Sequence[str]
    graph: Graph
    at: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(value: Any, leaves: Mapping[str, Tensor]) -> Reach:
        """Of tensors in containers, down to these leaves."""
        tensors = [leaf for leaf in flatten(value)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
        graph, _ = read_graph([gradient_edge(tensor) for tensor in tensors], [*leaves.values()], None)
        refuse_reentrant(graph)
        paths = [*leaves]
        ends = zip(graph.leaves[::2], graph.leaves[1::2], strict=True)
        return Reach(paths, graph, {paths[leaf]: node for node, leaf in ends if leaf != NO_LEAF})

    def of_member(self, routed: AbstractSet[str]) -> list[str]:
        """The parameters that a member may update and that the graph depends on."""
        return [path for path in self.at if path in routed]

    def met(self, routed: AbstractSet[str]) -> set[str]:
        """The parameters below the nodes that lead to those that a member may update.

        Also what these nodes only look at: whether one has saved a value, or has it computed once more as activation
        checkpointing does, does not show.
        """
        above: dict[int, set[int]] = {}
        for node, below in enumerate(self._children):
            for child in below:
                above.setdefault(child, set()).add(node)
        leading = _walked([self.at[path] for path in self.of_member(routed)], lambda node: above.get(node, set()))
        found = _walked([*leading], self._children.__getitem__)
        return {path for path, node in self.at.items() if node in found}

    @cached_property
    def _children(self) -> list[set[int]]:
        children, start = [], 0
        for degree in self.graph.degrees:
            children.append({child for child in self.graph.edges[start : start + 2 * degree : 2] if child >= 0})
            start += 2 * degree
        return children


def _walked(start: Sequence[int], following: Callable[[int], AbstractSet[int]]) -> set[int]:
    """All nodes on the ways from some."""
    pending, seen = [*start], set(start)
    for node in pending:  # grows while it is walked
        new = following(node) - seen
        seen |= new
        pending += new
    return seen


def raise_conflicts(reach: Reach, routed: Mapping[str, AbstractSet[str]], asking: Sequence[str]) -> None:
    """Refuse members that walk through values which others have overwritten by then.

    Raises:
        ValueError: naming the members and the parameters.
    """
    problems = [*_conflicts(reach, routed, asking)]
    if problems:
        raise ValueError(
            lines(
                "what is shared is computed once, before any member runs, and these would walk back through it where "
                "its values are old by then:",
                [
                    *problems,
                    "let the member that walks run first, or compute in its own losses what depends on these",
                ],
            )
        )


def _conflicts(reach: Reach, routed: Mapping[str, AbstractSet[str]], asking: Sequence[str]) -> Iterator[str]:
    order = [*routed]
    for name in asking:
        met = reach.met(routed[name])
        for before in order[: order.index(name)]:
            if both := sorted(met & routed[before]):
                more = f" and {len(both) - 4} more" if len(both) > 4 else ""
                yield f"member {name!r}, after {before!r} has updated {', '.join(both[:4])}{more}"


def asks(step: Step) -> bool:
    """Whether a step's losses name what is shared."""
    return "shared" in step.computation.evaluation.asked


def name_of(function: Function) -> str:
    """What it is called, as far as it has a name."""
    return str(getattr(function, "__name__", type(function).__name__))


def _routed(step: Step, state: State) -> frozenset[str]:
    """The parameters that a member may update at the count of a state."""
    routing = step.computation.at(state).routing
    return frozenset(routing.paths[index] for index in routing.routed)


def _as_metric(function: Function, model: Any, batch: Any, **named: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is shared in the place of a metric: no loss comes with it."""
    return {}, {"shared": function(model, batch, **named)}


def _detached(value: Any) -> Any:
    leaves, structure = flatten(value)
    return structure.unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
