"""The first state of a run: from the module's values, from a running optimizer, from another step's state."""

from __future__ import annotations

import torch

from funcfreeze.computation.adoption import Adoption, adopted, begun_state
from funcfreeze.computation.computation import Computation
from funcfreeze.computation.running import Running
from funcfreeze.computation.specification import Specification
from funcfreeze.computation.state import Lease, State, known_count, lease_of, make_state
from funcfreeze.computation.updating import apart_from, borrowed_in


def begin(
    computation: Computation,
    specification: Specification,
    copy: bool,
    optimizer: torch.optim.Optimizer | None,
    step: int | None,
) -> State:
    """A state from the module's present values.

    Args:
        computation: what the steps compute.
        specification: what their states look like.
        copy: whether the parameters that a loss may update, and buffers, are copied.
        optimizer: a running optimizer, whose state is taken.
        step: the number of steps taken so far; the optimizer's own count if not given.

    Raises:
        TypeError: `copy` or `step` is of another kind.
    """
    if not isinstance(copy, bool):
        raise TypeError(f"init(copy=...) is True or False, got {type(copy).__name__}; a batch is for the step itself")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise TypeError(f"init(step=...) is the number of steps taken so far, an int of at least 0; got {step!r}")
    with torch.inference_mode(False):
        functional, plan = computation.evaluation.functional, computation.evaluation.plan
        params = {path: tensor.detach() for path, tensor in functional.present_parameters().items()}
        own = functional.present_buffers()
        buffers = {path: own[path].detach() for path in specification.buffers}
        routed = plan.routed
        if copy:
            params |= {path: params[path].clone() for path in routed}
            buffers = {path: tensor.clone() for path, tensor in buffers.items()}
        borrowed = params.keys() - set(routed) if copy else set()
        buffers |= computation.evaluation.targets.begun({**params, **buffers})
        initial = computation.transform.init({path: params[path] for path in routed})
        if optimizer is not None:
            running = beside(optimizer, computation)
            step = running.counted() if step is None else step
            initial = running.taken(initial, step, copy)
        count = torch.full((), step or 0, dtype=torch.int64, device=params[routed[0]].device)
        fields = specification.named((params, buffers, apart_from(params, initial), count))
        return make_state(fields, Lease(borrowed=borrowed), specification, count=step or 0)


def beside(optimizer: torch.optim.Optimizer, computation: Computation) -> Running:
    """A running optimizer of torch.optim, beside the steps' own."""
    evaluation = computation.evaluation
    return Running.of(optimizer, computation.transform, evaluation.plan, evaluation.functional.present_parameters())


def take_over(state: State, computation: Computation, specification: Specification) -> tuple[State, Adoption]:
    """Another step's state, as far as it fits, and the rest from a fresh one of our own.

    Raises:
        TypeError: not a `State`.
        ValueError: it has nothing in common with ours.
    """
    if not isinstance(state, State):
        raise TypeError(f"adopt(state) takes another Step's State, got {type(state).__name__}")
    fresh = begin(computation, specification, True, None, None)
    with torch.inference_mode(False), torch.no_grad():
        own = {path: fresh.params[path] for path in computation.evaluation.plan.routed}
        begun = begun_state(computation.transform, fresh.optimizer, own, state.step)
        follows = computation.evaluation.targets.follows
        fields, adoption = adopted(state, fresh, begun, specification, follows)
    if not any(name.startswith("params.") for name in adoption.kept):
        raise ValueError(f"no parameter of this State is one of the Step's, by path and shape:\n{adoption}")
    lease = lease_of(state)
    lease.borrowed |= borrowed_in(fields[0], (state, fresh))  # the two may know a tied tensor by different names
    return make_state(specification.named(fields), lease, specification, count=known_count(state)), adoption
