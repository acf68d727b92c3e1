"""A state as JSON and tensors by name, and the state of a step that these are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funcfreeze.alternating.alternation import Alternation
from funcfreeze.checkpoint.plain import in_form_of, packed, unpacked
from funcfreeze.computation.state import FIELDS, State
from funcfreeze.step import Step

AnyStep = Step | Alternation


def packed_state(state: State, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of a state as JSON.

    Args:
        state: whose.
        tensors: gets its tensors by name, `params/encoder.weight`.
    """
    return {name: packed(getattr(state, name), name, tensors) for name in FIELDS}


def fields_of(made: Mapping[str, Any], tensors: Mapping[str, Tensor], fresh: State) -> dict[str, Any]:
    """The fields that `packed_state` made this of, in the form of a fresh state's."""
    fields = {name: unpacked(made[name], tensors) for name in FIELDS}
    return {**fields, "optimizer": in_form_of(fresh.optimizer, fields["optimizer"])}


def refuse_no_step(step: object, state: object) -> None:
    """Raise where these are not what they are called, and perhaps one another."""
    if not isinstance(step, AnyStep):
        raise TypeError(f"step is a Step or an alternation, got {type(step).__name__}")
    if not isinstance(state, State):
        raise TypeError(f"state is a State, such as step.init() gives, got {type(state).__name__}")


def refuse_others_state(step: AnyStep, state: State) -> None:
    """Raise where a state is not this step's, or spent."""
    step.call(state, lambda model: None)
