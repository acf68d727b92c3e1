"""What `backward` and `combine` are given: a live graph of losses, and the parameters that they may update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor

from funcfreeze.declare.plan import refuse_rules_of_steps, refuse_what_steps_do, resolve_plan
from funcfreeze.declare.selectors import Leaf, RouteError
from funcfreeze.gradients import Routing, Timetable
from funcfreeze.gradients.graph import NO_LEAF
from funcfreeze.gradients.meeting import meet
from funcfreeze.gradients.routed import Gradients, LiveGraph, read_losses
from funcfreeze.loops.replicas import unwrapped
from funcfreeze.model.acceptance import as_module, refuse_unusable
from funcfreeze.model.mapping import Model
from funcfreeze.model.sites import module_leaves


def leaves_of(model: Model) -> list[Leaf]:
    """The parameters of a model that can be used; `DistributedDataParallel` around it does not matter."""
    module = as_module(unwrapped(model))
    refuse_unusable(module)
    return module_leaves(module)


def parameters_and_routing(
    model: Model, routes: object, count: Tensor | None, merge: object = None
) -> tuple[list[Tensor], Routing]:
    """The parameters, and which loss may update which at a count of steps.

    Raises:
        RouteError: everything that is wrong with the routes; or a route is timed, and there is no count; or a merge
            rule keeps a state.
    """
    refuse_what_steps_do(routes)
    leaves = leaves_of(model)
    plan = resolve_plan(routes, leaves, merge)
    refuse_rules_of_steps(plan)
    number = int(count) if count is not None and plan.timings else None
    return [leaf.tensor for leaf in leaves], Timetable(plan).at(number)


def values_of(routing: Routing, losses: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The present losses by name, detached."""
    named = zip(routing.losses, losses, strict=True)
    return {name: loss.detach() for name, loss in named if loss is not None}


def with_rules(
    found: Gradients,
    routing: Routing,
    values: Mapping[str, Tensor],
    count: Tensor | None,
    unit: Tensor | None = None,
) -> list[Tensor | None]:
    """Every leaf's merged gradient, with what the rules make of those kept apart, times the unit (see `Rows`)."""
    if not routing.places:
        return found.merged
    ruled, _ = meet(routing, found.apart, values, count, {}, unit)
    return [ruled.get(leaf, gradient) for leaf, gradient in enumerate(found.merged)]


def as_count(step: int | Tensor | None) -> Tensor | None:
    """The count of steps, as schedules want it; `TypeError` says what is none."""
    if step is None:
        return None
    if isinstance(step, Tensor):
        is_count = step.ndim == 0 and step.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    else:
        is_count = isinstance(step, Integral) and not isinstance(step, bool) and step >= 0
    if not is_count:
        raise TypeError(f"step= is the number of steps taken so far, an int or a 0-d integer tensor; got {step!r}")
    return torch.as_tensor(step)


def read_live(losses: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> LiveGraph:
    """The losses' graph, of which nothing is known of hooks.

    Raises:
        RouteError: none of the parameters is in it.
    """
    graph = read_losses(losses, parameters, hooked=())
    if graph.nodes and all(leaf == NO_LEAF for leaf in graph.structure.leaves[1::2]):
        raise RouteError(
            "no parameter of this model is in the graph of the losses; were they computed from another model?"
        )
    return graph
