"""What the members of an alternation share: run once a call, its graph alive for those that are routed into it.

A DCGAN's loop runs the generator once, steps the critic on what came out, and then walks back through the same graph
for the generator. Here the losses name `shared`, and the routes say who gets gradients: nobody has to detach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from funcfreeze.alternating.members import Progress
from funcfreeze.alternating.reach import Reach, raise_conflicts
from funcfreeze.computation.evaluation import Evaluation
from funcfreeze.computation.naming import Asked
from funcfreeze.computation.sharing import WithShared
from funcfreeze.computation.state import State
from funcfreeze.computation.statistics import FrozenNorms
from funcfreeze.declare.plan import Plan
from funcfreeze.declare.plans import Plans
from funcfreeze.gradients.hooks import noticing_hooks
from funcfreeze.gradients.law import Live
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.model.containers import LEAVES, flatten, hidden_tensors
from funcfreeze.model.memory import memory_of
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
        until = [*states][: [*states].index(asking[-1]) + 1]  # who walks has to know what others have updated by then
        wanted = frozenset[str]().union(*(_differentiable(self.steps[name], states[name]) for name in until))
        paths, params = self.evaluation.plan.paths, self._params(progress)
        finally_do: list[Callable[[], None]] = []
        buffers = self._buffers(progress, [*states], asking)
        with grad_mode(True):
            leaves = [param.detach().requires_grad_(path in wanted) for path, param in zip(paths, params, strict=True)]
            watch = None
            if not self.evaluation.seen.watched:
                watch = self.evaluation.watch(progress.params, buffers)
            try:
                with self._telling(), noticing_hooks() as noticed:
                    _, beside = self.evaluation.call(leaves, buffers, batch, finally_do, watch)
            finally:
                for end in finally_do:
                    end()
        assert beside is not None, "what is shared comes as a metric"
        value = beside.metrics["shared"]
        _refuse_hidden(value)
        live = {path: leaf for path, leaf in zip(paths, leaves, strict=True) if leaf.requires_grad}
        hooked = noticed.nodes if noticed.all_known else None
        reach = Reach.of(value, live)
        raise_conflicts(reach, routed, asking)
        walkers = [name for name in asking if reach.of_member(routed[name])]
        known = Live({}, frozenset(map(id, live.values())), hooked, False)
        detached = _detached(value, frozenset(map(memory_of, progress.params.values())) - {None})
        shared = Shared(value if walkers else None, detached, live, known, walkers, reach, routed)
        return shared, replace(
            progress,
            params={**progress.params, **beside.written} if beside.written else progress.params,
            buffers={**progress.buffers, **beside.buffers},
        )

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Inside, what is raised is noted to come from what is shared."""
        try:
            yield
        except Exception as error:
            error.add_note(f"raised by what the members of an alternation share: {name_of(self.function)}")
            raise

    def _params(self, progress: Progress) -> list[Tensor]:
        """The parameters, with copies of those that the function writes to, or may: its graph goes on with these."""
        if self.evaluation.seen.watched:
            return self.evaluation.leaves(progress.params)
        paths, frozen = self.evaluation.plan.paths, self.evaluation.unrouted
        return [progress.params[path].clone() if path in frozen else progress.params[path] for path in paths]

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
        value: what the function returned, on a live graph; None when nobody walks through it any more.
        detached: the same without the graph.
        leaves: path -> leaf of that graph, of those that require grad.
        live: that graph, as engines know it.
        walkers: the members that still have to walk through it, in their order.
        reach: which parameters it depends on.
        routed: member -> the parameters that it may update now.
    """

    value: Any
    detached: Any
    leaves: Mapping[str, Tensor]
    live: Live
    walkers: list[str]
    reach: Reach
    routed: Mapping[str, AbstractSet[str]]

    def given_to(self, member: str, batch: Any) -> WithShared:
        """The batch, and what is shared, as one member is given it."""
        value = self.value
        if member not in self.walkers:
            return WithShared(batch, self.detached, {}, None)
        self.walkers.remove(member)
        if not self.walkers:
            self.value = None
        order = [*self.routed]
        updated = frozenset[str]().union(*(self.routed[name] for name in order[: order.index(member)]))
        leaves = {path: self.leaves[path] for path in self.reach.at if path not in updated}
        others = frozenset(self.reach.at) - frozenset(leaves)
        return WithShared(batch, value, leaves, self.live._replace(retain=bool(self.walkers)), others)


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


def _differentiable(step: Step, state: State) -> frozenset[str]:
    """The parameters that require grad in a member's forward at the count of a state."""
    routing = step.computation.at(state).routing
    return frozenset(path for path, required in zip(routing.paths, routing.requires_grad, strict=True) if required)


def _refuse_hidden(value: Any) -> None:
    """Refuse tensors with a graph where nobody can exchange them.

    Raises:
        TypeError: naming the objects.
    """
    found = [
        f"a {type(leaf).__name__} with a tensor in {name}"
        for leaf in flatten(value)[0]
        if type(leaf) not in LEAVES
        for name, tensor in hidden_tensors(leaf)
        if tensor.requires_grad
    ]
    if found:
        raise TypeError(
            f"what is shared is tensors, in containers of any kind; got {', '.join(found)}: return the tensors, and "
            "make the object of them where it is used"
        )


def _detached(value: Any, memories: AbstractSet[int | None]) -> Any:
    """Without the graph, and without memory of parameters, which members overwrite."""

    def apart(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone() if memory_of(leaf) in memories else leaf.detach()

    leaves, structure = flatten(value)
    return structure.unflatten(map(apart, leaves))


def _as_metric(function: Function, model: Any, batch: Any, **named: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is shared in the place of a metric: no loss comes with it."""
    return {}, {"shared": function(model, batch, **named)}
