"""Different transforms for different parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor

from funcfreeze.declare.selectors import Leaf, RouteError, label
from funcfreeze.optim.algorithm import Algorithm
from funcfreeze.optim.choice import BySelector, Choice, Found, by_label
from funcfreeze.optim.skip import as_its_parts
from funcfreeze.optim.transform import (
    Named,
    Note,
    OptState,
    PyTree,
    Transform,
    apart,
    by_path,
    in_place_options,
    lines,
    match,
)

Takers = Mapping[str, tuple[str, ...]]  # path -> the labels of all parts whose selector takes it


def partition(parts: BySelector[Transform]) -> Transform:
    """For each parameter the transform whose selector takes it: exactly one.

    The state is a dict of theirs, by selector. Only parameters that are given to `init` or have a gradient must belong
    somewhere.

    >>> import torch
    >>> from funcfreeze.optim import adam, sgd
    >>> tx = partition({"encoder": sgd(0.1), "head": adam(1e-3)})
    >>> params = {"encoder.weight": torch.zeros(2), "head.weight": torch.zeros(2)}
    >>> {label: list(state) for label, state in tx.init(params).items()}
    {'encoder': ['encoder.weight'], 'head': ['head.weight']}
    >>> partition({"encoder": sgd(0.1), "*.weight": adam(1e-3)}).init({**params, "head.bias": torch.zeros(1)})
    Traceback (most recent call last):
        ...
    funcfreeze.declare.selectors.RouteError: partition: every parameter belongs to exactly one part:
      encoder.weight: claimed by encoder and *.weight
      head.bias: claimed by none of encoder, *.weight
    """
    return _build(*_checked(parts))


def _checked(parts: BySelector[Transform]) -> tuple[dict[str, Transform], Choice]:
    """The members and their selectors by label, or a RouteError."""
    if not isinstance(parts, Mapping) or not parts:
        raise RouteError(f"partition(...) takes a mapping selector -> Transform with at least one entry, got {parts!r}")
    members, choice, twice = by_label(parts)
    problems = [f"{name}: written twice" for name in twice]
    problems += [
        f"{name}: not a Transform but {type(member).__name__}: {member!r}"
        for name, member in zip(map(label, parts), parts.values(), strict=True)
        if not isinstance(member, Transform)
    ]
    if problems:
        raise RouteError(lines("partition(...) takes a mapping selector -> Transform:", problems))
    return members, choice


def _takers(found: Found) -> Takers:
    problems = [problem for wrong in found.problems.values() for problem in wrong]
    if problems:
        raise RouteError(lines("partition: the selectors do not fit the parameters:", problems))
    return found.takers


def _build(members: Mapping[str, Transform], choice: Choice) -> Transform:
    """The transform, given how the parameters are shared out."""

    def bind(leaves: Sequence[Leaf]) -> Transform:
        bound = choice.bind(leaves)
        takers = _takers(bound.among({}))
        inner = {
            name: member.bind([leaf for leaf in leaves if takers[leaf.path] == (name,)])
            if member.bind is not None
            else member
            for name, member in members.items()
        }
        return _build(inner, bound)

    def parts_of(params: Mapping[str, Tensor], relevant: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Each part's parameters; every relevant one belongs to exactly one part."""
        claimed = _takers(choice.among(params)) if params else {}
        _check_claims(claimed, relevant, tuple(members))
        return {
            name: {path: param for path, param in params.items() if claimed.get(path) == (name,)} for name in members
        }

    def split(
        grads: PyTree, state: OptState, named: Named
    ) -> list[tuple[str, dict[str, Tensor], OptState, dict[str, Tensor]]]:
        """For each part its name, gradients, state and parameters."""
        if not isinstance(state, Mapping) or state.keys() != members.keys():
            seen = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"partition: the state is a dict with keys {', '.join(members)}; got {seen}")
        touched = match(grads, named)
        parts = parts_of(named.tensors, touched)
        return [
            (name, {path: grad for path, grad in touched.items() if path in params}, state[name], params)
            for name, params in parts.items()
        ]

    def init(params: PyTree) -> OptState:
        tensors = by_path(params).tensors
        return {name: members[name].init(part) for name, part in parts_of(tensors, tensors).items()}

    def update(
        grads: PyTree, state: OptState, params: PyTree, *, step: int | Tensor | None = None
    ) -> tuple[PyTree, OptState]:
        named = by_path(params)
        results = {
            name: members[name].update(part_grads, part_state, part_params, step=step)
            for name, part_grads, part_state, part_params in split(grads, state, named)
        }
        updates = {path: moved for part, _ in results.values() for path, moved in part.items()}
        return named.rebuild(updates), {name: after for name, (_, after) in results.items()}

    forms = {name: member.in_place for name, member in members.items() if member.in_place is not None}

    def in_place(
        grads: PyTree,
        state: OptState,
        params: PyTree,
        *,
        step: int | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Callable[[], OptState]:
        options, named = in_place_options(step, found_inf), by_path(params)
        # Every part finds what is wrong before any part changes something; and none changes what another reads.
        grads = apart(match(grads, named), named.tensors.values())
        commits = {
            name: forms[name](part_grads, part_state, part_params, **options)
            for name, part_grads, part_state, part_params in split(grads, state, named)
        }
        return lambda: {name: commit() for name, commit in commits.items()}

    def measuring(note: Note) -> Transform:
        return _build(
            {
                name: member.measuring(_under(name, note)) if member.measuring is not None else member
                for name, member in members.items()
            },
            choice,
        )

    def algorithms(paths: Collection[str]) -> Mapping[str, Algorithm]:
        return _algorithms(members, _takers(choice.among({})), paths)

    return Transform(
        init,
        update,
        as_its_parts(in_place, forms.values()) if len(forms) == len(members) else None,
        bind,
        algorithms if choice.bound is not None else None,
        measuring if any(member.measuring is not None for member in members.values()) else None,
    )


def _under(name: str, note: Note) -> Note:
    """Takes what a part measures, by the part's name."""
    return lambda measured, value: note(f"{measured}/{name}", value)


def _algorithms(members: Mapping[str, Transform], claimed: Takers, paths: Collection[str]) -> Mapping[str, Algorithm]:
    found: dict[str, Algorithm] = {}
    for name, member in members.items():
        if member.algorithms is not None:
            found |= member.algorithms([path for path in paths if claimed.get(path) == (name,)])
    return found


def _check_claims(claimed: Takers, relevant: Iterable[str], labels: tuple[str, ...]) -> None:
    relevant = list(relevant)
    strangers = [path for path in relevant if path not in claimed]
    if strangers:
        raise ValueError(lines("partition: bound to other parameters; these are unknown:", strangers))
    problems = [
        f"{path}: claimed by {' and '.join(claimed[path]) or 'none of ' + ', '.join(labels)}"
        for path in relevant
        if len(claimed[path]) != 1
    ]
    if problems:
        raise RouteError(lines("partition: every parameter belongs to exactly one part:", problems))
