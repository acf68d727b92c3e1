"""Merge rules in a step: what they keep beside the optimizer's state, and what they tell as metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcfreeze.declare.names import OWN
from funcfreeze.declare.overlaps import Overlap
from funcfreeze.merge.deciding import Met
from funcfreeze.merge.rule import RuleState
from funcfreeze.optim import Transform
from funcfreeze.optim.skip import keep_if
from funcfreeze.optim.transform import OptState, PyTree, by_path

MERGE = "merge"
"""Where in an optimizer's state rules keep theirs: label of an overlap -> rule and losses -> what it keeps."""

KEYS = frozenset({MERGE, "optimizer"})


def keeping(transform: Transform, overlaps: Sequence[Overlap]) -> Transform:
    """The transform with the states of rules beside its own, if one of the rules has a state.

    Its state is `{"merge": {label: {rule: state}}, "optimizer": the transform's own}`. An update leaves the rules' as
    they are: they change where losses meet (see `after_meeting`).
    """
    kept = [overlap for overlap in overlaps if overlap.rule.init is not None and overlap.paths]
    if not kept:
        return transform

    def init(params: PyTree) -> OptState:
        tensors = by_path(params).tensors.values()
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        return {
            MERGE: {one.label: {one.kept_under: _begun(one, device)} for one in kept},
            "optimizer": transform.init(params),
        }

    def update(
        grads: PyTree, state: OptState, params: PyTree, *, step: int | Tensor | None = None
    ) -> tuple[PyTree, OptState]:
        updates, own = transform.update(grads, state["optimizer"], params, step=step)
        return updates, {**state, "optimizer": own}

    run = transform.in_place

    def in_place(grads: PyTree, state: OptState, params: PyTree, **options: Any) -> Callable[[], OptState]:
        assert run is not None
        commit = run(grads, state["optimizer"], params, **options)
        return lambda: {**state, "optimizer": commit()}

    measure = transform.measuring
    return Transform(
        init,
        update,
        None if run is None else in_place,
        algorithms=transform.algorithms,
        measuring=None if measure is None else lambda note: keeping(measure(note), overlaps),
    )


def _begun(overlap: Overlap, device: torch.device) -> RuleState:
    init = overlap.rule.init
    assert init is not None
    state: Any = init(len(overlap.losses))
    where = f"merge {overlap.label!r}: the state of {overlap.rule} is tensors by name"
    if not isinstance(state, Mapping):
        raise TypeError(f"{where}; its `init` gave {type(state).__name__}")
    others = [name for name, kept in state.items() if not isinstance(kept, Tensor)]
    if others:
        raise TypeError(f"{where}; {others[0]} is none")
    return {name: kept.detach().to(device, copy=True) for name, kept in state.items()}  # steps may overwrite them


def keeps_rules(optimizer: Any) -> bool:
    """Whether an optimizer's state, without a loss scale, has the states of rules beside it."""
    return isinstance(optimizer, Mapping) and optimizer.keys() == KEYS


def without_rules(optimizer: Any) -> Any:
    """An optimizer's own state, without a loss scale."""
    return optimizer["optimizer"] if keeps_rules(optimizer) else optimizer


def states_in(optimizer: Any, *, is_scaled: bool) -> dict[str, RuleState]:
    """What rules keep, by the label of their overlap."""
    own = optimizer["optimizer"] if is_scaled else optimizer
    if not keeps_rules(own):
        return {}
    return {label: state for label, by_rule in own[MERGE].items() for state in by_rule.values()}


def after_meeting(optimizer: Any, met: Mapping[str, Met], skip: Tensor | None, *, is_scaled: bool) -> Any:
    """The optimizer's state with what rules keep after they decided; as it was if the step is skipped."""
    if not met or not isinstance(optimizer, Mapping):
        return optimizer
    own = optimizer["optimizer"] if is_scaled else optimizer
    if not keeps_rules(own):
        return optimizer
    states = {
        label: {
            rule: _chosen(before, met[label].state, skip) if label in met else before
            for rule, before in by_rule.items()
        }
        for label, by_rule in own[MERGE].items()
    }
    own = {**own, MERGE: states}
    return {**optimizer, "optimizer": own} if is_scaled else own


def _chosen(before: RuleState, after: RuleState, skip: Tensor | None) -> RuleState:
    """Copies: a half keeps what it has."""
    if skip is None:
        return {name: after[name].detach().clone() for name in before}
    return {name: keep_if(skip, kept, after[name].detach()) for name, kept in before.items()}


def told(met: Mapping[str, Met]) -> dict[str, Tensor]:
    """What was seen where losses met, as metrics."""
    found: dict[str, Tensor] = {}
    for label, one in met.items():
        named = {"norm": one.norms, "cosine": one.cosines, "weight": one.weights, "share": one.shares}
        found |= {f"{OWN}{name}/{label}": value for name, value in named.items()}
    return found
