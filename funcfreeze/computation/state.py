"""The state of training as one value: parameters, buffers, optimizer state and the step, spent when it is used up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import optree
from optree import registry
from torch import Tensor

from funcfreeze.model.functional import in_twin
from funcfreeze.model.ties import aliases_of, by_first_names, tied

FIELDS = ("params", "buffers", "optimizer", "step", "targets", "clocks")

FORMAT = 1
"""Of what is pickled. A number of its own, since files outlive versions."""

Fields = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Any, Tensor]
"""Params, buffers, optimizer and step of a state: what a lone step computes with."""

Whole = tuple[
    Mapping[str, Tensor], Mapping[str, Tensor], Any, Tensor, Mapping[str, Mapping[str, Tensor]], Mapping[str, Tensor]
]
"""All of a state's fields, in the order of `FIELDS`."""


@dataclass
class Lease:
    """Who may write to a set of tensors; shared by all states that hold them.

    Attributes:
        spent: whether a step has reused the tensors, so that they no longer hold what these states say.
        borrowed: the paths of parameters that someone outside may hold too: a step writes to a copy of those.
        borrowed_optimizer: the same for the whole optimizer state.
        gradients: on the CPU those of the step that made the state, alive until the next step starts, as `.grad` is in
            an eager loop. Freed at once, their pages go back to the system and are faulted in again at every step: 13 %
            of the step of the demo's speed table.
    """

    spent: bool = False
    borrowed: set[str] = field(default_factory=set)
    borrowed_optimizer: bool = False
    gradients: Sequence[Tensor] = ()


class State:
    """Everything a step changes. Frozen; a pytree whose children are the six fields.

    A step with `donate=True` reuses the storage of the state it is given. That state is *spent* then, and reading it
    raises, so that nobody takes the new values for the old. A state made by `replace` shares tensors with its origin
    and is spent with it. One made in any other way (the constructor, `optree.tree_map`, a deep copy) is independent:
    the first step that takes it copies what it would overwrite.

    What torch.optim keeps for a parameter is taken for `optimizer` in any form that means the same: counts of any dtype
    or as numbers, tensors in a narrower precision or on another device.

    Attributes:
        params: path -> tensor, all of the model's parameters, also those that no loss may update. A tied parameter is
            there once, by its first path, and any of its names is accepted as a key; so are tied buffers.
        buffers: path -> tensor.
        optimizer: the optimizer's own pytree; of an alternation member -> that member's.
        step: 0-d int64, the number of steps taken.
        targets: name -> the tensors of an averaged twin; empty without any.
        clocks: of an alternation member -> 0-d int64, the number of steps that the member took; else empty.

    >>> import torch
    >>> state = State({"w": torch.zeros(2)}, {}, {"w": {}}, torch.tensor(0))
    >>> state
    State(step=0, 1 parameters, 0 buffers)
    >>> optree.tree_map(lambda tensor: tensor + 1, state).step
    tensor(1)
    >>> state.step = torch.tensor(3)
    Traceback (most recent call last):
        ...
    AttributeError: a State is frozen; make another with state.replace(step=...)
    """

    __slots__ = ("_count", "_fields", "_fits", "_lease", "_listed")
    _fields: Whole
    _lease: Lease
    _fits: object
    _listed: object
    _count: int | None

    def __init__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        optimizer: Any,
        step: Tensor,
        targets: Mapping[str, Mapping[str, Tensor]] | None = None,
        clocks: Mapping[str, Tensor] | None = None,
    ) -> None:
        # nobody here knows who else holds these tensors: the first step copies what it would overwrite
        fields = params, buffers, optimizer, step, targets or {}, clocks or {}
        _fill(self, fields, Lease(False, {*params, *by_path(fields[4])}, True), None)

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Path -> tensor of every parameter."""
        return self._live[0]

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Path -> tensor of every buffer."""
        return self._live[1]

    @property
    def optimizer(self) -> Any:
        """The optimizer's state."""
        return self._live[2]

    @property
    def step(self) -> Tensor:
        """The number of steps taken, 0-d int64."""
        return self._live[3]

    @property
    def targets(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Name -> the tensors of an averaged twin."""
        return self._live[4]

    @property
    def clocks(self) -> Mapping[str, Tensor]:
        """Member of an alternation -> the number of steps it took, 0-d int64."""
        return self._live[5]

    @property
    def fields(self) -> Fields:
        """`params`, `buffers`, `optimizer` and `step`; the tensors of targets are among the buffers (see `in_twin`)."""
        params, buffers, optimizer, step, targets, _ = self._live
        return params, {**buffers, **by_path(targets)} if targets else buffers, optimizer, step

    @property
    def _live(self) -> Whole:
        if self._lease.spent:
            raise RuntimeError(
                "this State is spent: a step with donate=True has reused its storage for the state it returned. "
                "Use that one (state, metrics = step(state, batch)), or build the Step with donate=False"
            )
        return self._fields

    def replace(self, **changes: Any) -> State:
        """The same state with some fields exchanged; the others are shared, not copied.

        Raises:
            TypeError: there is no such field.
            ValueError: different tensors for two names of a tied parameter.
        """
        unknown = [name for name in changes if name not in FIELDS]
        if unknown:
            raise TypeError(f"a State has {', '.join(FIELDS)}; got {', '.join(unknown)}")
        named: dict[str, Any] = {
            name: by_first_names(changes[name], before)
            for name, before in (("params", self.params), ("buffers", self.buffers))
            if name in changes
        }
        if "targets" in changes:
            named["targets"] = self._twins_by_first_names(changes["targets"])
        changes |= named
        fields = dict(zip(FIELDS, self._live, strict=True)) | changes
        if "params" in changes:
            self._lease.borrowed |= set(changes["params"])
        if "targets" in changes:
            self._lease.borrowed |= by_path(changes["targets"]).keys()
        self._lease.borrowed_optimizer |= "optimizer" in changes
        count = None if "step" in changes else self._count
        return make_state(tuple(fields[name] for name in FIELDS), self._lease, count=count)

    def _twins_by_first_names(self, given: Any) -> dict[str, Mapping[str, Tensor]]:
        if not isinstance(given, Mapping) or not all(isinstance(tensors, Mapping) for tensors in given.values()):
            raise TypeError("targets goes by name and then by path, as in {'teacher': {'weight': tensor}}")
        return {name: by_first_names(tensors, self.targets.get(name, {})) for name, tensors in given.items()}

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a State is frozen; make another with state.replace({name}=...)")

    __delattr__ = __setattr__  # type: ignore[assignment]  # it raises whatever it is given

    def __reduce__(self) -> tuple[Any, ...]:
        params, buffers, optimizer, step, targets, clocks = self._live  # deep copies and pickles hold their own tensors
        plain = {name: dict(tensors) for name, tensors in targets.items()}
        names = {
            "params": dict(aliases_of(params)),
            "buffers": dict(aliases_of(buffers)),
            "targets": {name: dict(aliases_of(tensors)) for name, tensors in targets.items()},
        }
        fields = dict(params), dict(buffers), optimizer, step, plain, clocks
        return _restored, (FORMAT, dict(zip(FIELDS, fields, strict=True)), names)

    def __copy__(self) -> State:
        return make_state(
            self._live, self._lease, self._fits, count=self._count
        )  # a shallow copy holds the same tensors

    def __repr__(self) -> str:
        if self._lease.spent:
            return "State(spent)"
        return f"State(step={int(self.step)}, {len(self.params)} parameters, {len(self.buffers)} buffers)"


def _restored(format: int, fields: dict[str, Any], names: Mapping[str, Any]) -> State:
    if format > FORMAT:
        raise ValueError(
            f"this State was pickled in format {format}, this version of funcfreeze reads format {FORMAT}: update it"
        )
    named = {name: tied(fields[name], names[name]) for name in ("params", "buffers")}
    targets = {name: tied(tensors, names["targets"][name]) for name, tensors in fields["targets"].items()}
    return State(**{**fields, **named, "targets": targets})


def _fill(
    state: State, fields: Whole, lease: Lease, fits: object, listed: object = None, count: int | None = None
) -> None:
    object.__setattr__(state, "_fields", fields)
    object.__setattr__(state, "_lease", lease)
    object.__setattr__(state, "_fits", fits)
    object.__setattr__(state, "_listed", listed)
    object.__setattr__(state, "_count", count)


def make_state(
    fields: tuple[Any, ...], lease: Lease, fits: object = None, listed: object = None, count: int | None = None
) -> State:
    """A state under a lease that it may share, known to fit a specification.

    Args:
        fields: params, buffers, optimizer and step; targets and clocks, where there are any.
        lease: who may write to the tensors.
        fits: what `known_to_fit` answers with.
        listed: what `listing_of` answers with.
        count: the number of steps, if it is known without asking the device.
    """
    state = State.__new__(State)
    params, buffers, optimizer, step, *beside = fields
    targets, clocks = (*beside, {}, {})[:2]
    _fill(state, (params, buffers, optimizer, step, targets, clocks), lease, fits, listed, count)
    return state


def renew(state: State, fields: Whole, lease: Lease, fits: object, count: int) -> None:
    """Let a state go on with other values: after an error, in the place of tensors that were overwritten."""
    _fill(state, fields, lease, fits, None, count)


def gone_on(state: State, buffers: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> State:
    """The state in the middle of a step: with what a forward left in buffers, and in parameters that it wrote to."""
    params = {**state.params, **written} if written else state.params
    _, before, *rest = state.fields
    fields = params, {**before, **buffers}, *rest
    return make_state(fields, lease_of(state), count=known_count(state))


def by_path(targets: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of targets as a step computes with them."""
    return {in_twin(name, path): tensor for name, tensors in targets.items() for path, tensor in tensors.items()}


def count_of(state: State) -> int:
    """The number of steps, which schedules of Python's follow; of a state that no step made it is read once."""
    if state._count is None:
        object.__setattr__(state, "_count", int(state.step))
    count = state._count
    assert count is not None
    return count


def known_count(state: State, more: int = 0) -> int | None:
    """The number of steps and some more, if it is known without asking the device."""
    return None if state._count is None else state._count + more


def lease_of(state: State) -> Lease:
    """Who may write to the state's tensors."""
    return state._lease


def known_to_fit(state: State) -> object:
    """The specification the state was found to fit when it was made, so that it is not compared again, or None."""
    return state._fits


def listing_of(state: State) -> object:
    """What the compiled step that made the state noted of its tensors, for the next step to take them as they are."""
    return state._listed


optree.register_pytree_node(
    State,  # type: ignore[arg-type]  # optree's stub wants a Collection, its code does not
    lambda state: (state._live, None, FIELDS),  # type: ignore[attr-defined]
    lambda _, fields: State(*fields),  # type: ignore[arg-type, return-value]
    path_entry_type=optree.GetAttrEntry,
    namespace=vars(registry)["__GLOBAL_NAMESPACE"],  # every namespace: nobody should have to name one to map a State
)
