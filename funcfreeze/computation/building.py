"""What a step computes, put together from what the user gave. Every check of a declaration is made on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from funcfreeze.computation.arguments import check_arguments
from funcfreeze.computation.computation import Computation
from funcfreeze.computation.evaluation import Evaluation, Losses
from funcfreeze.computation.finite import Finite
from funcfreeze.computation.loss_scale import LossScale, scaled
from funcfreeze.computation.merging import keeping
from funcfreeze.computation.naming import Asked
from funcfreeze.computation.specification import Specification
from funcfreeze.computation.statistics import FrozenNorms
from funcfreeze.computation.targets import Target, Targets
from funcfreeze.declare.ema import Ema
from funcfreeze.declare.names import own_name_problems
from funcfreeze.declare.overlaps import Merge, refuse_crossings
from funcfreeze.declare.plan import chosen, raise_problems, resolve_plan
from funcfreeze.declare.routes import Selection
from funcfreeze.gradients import Timetable, find_engine
from funcfreeze.model.acceptance import as_module, refuse_unusable
from funcfreeze.model.functional import FunctionalModule
from funcfreeze.model.mapping import Model
from funcfreeze.model.sites import module_leaves
from funcfreeze.optim import Transform
from funcfreeze.optim.skip import skippable


@dataclass(frozen=True)
class Declarations:
    """The arguments of a `Step` that say what it computes, beside model, losses, routes and optimizer."""

    engine: str
    differentiable: Selection | None
    loss_scale: LossScale | None
    frozen_statistics: Selection | None
    targets: Mapping[str, Ema | Target] | None
    on_nonfinite: str
    merge: Merge | None


def built(
    model: Model, losses: Losses, routes: Any, optimizer: Transform, declared: Declarations
) -> tuple[Computation, Specification]:
    """What a step computes, and what its states look like.

    Raises:
        RouteError, TypeError, ValueError: see `Step`.
    """
    computing = find_engine(declared.engine)
    check_arguments(losses, optimizer)
    finite = Finite.of(declared.on_nonfinite, is_scaled=declared.loss_scale is not None)
    module = as_module(model)
    refuse_unusable(module)
    leaves = module_leaves(module)
    plan = resolve_plan(routes, leaves, declared.merge)
    if declared.engine != "routed":
        refuse_crossings(plan.merge, f"and engine={declared.engine!r} knows none of these; use engine='routed'")
    raise_problems([*own_name_problems("loss", plan.losses)])
    norms = FrozenNorms.of(module, declared.frozen_statistics, plan.frozen_statistics)
    twins = Targets.of(declared.targets, module, plan.targets, plan.paths)
    plan = replace(plan, frozen_statistics=norms.declared, targets=twins.declared)
    transform = keeping(optimizer if optimizer.bind is None else optimizer.bind(leaves), plan.merge)
    transform = scaled(transform if finite is None else skippable(transform), declared.loss_scale)
    timetable = Timetable(plan, chosen(declared.differentiable, leaves, "differentiable"))
    functional = FunctionalModule.of(module, twins.modules)
    functional.refuse_accumulation_hooks()
    evaluation = Evaluation(functional, losses, plan, norms, twins, Asked.by(losses))
    computation = Computation(evaluation, timetable, computing, transform, declared.loss_scale, finite)
    return computation, Specification.of(evaluation, transform)
