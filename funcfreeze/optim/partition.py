"""Different transforms for different parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor

from funcfreeze.declare.selectors import Leaf, RouteError, Selector, label, resolve, to_selector
from funcfreeze.optim.algorithm import Algorithm, Algorithms
from funcfreeze.optim.transform import (
    Named,
    OptState,
    PyTree,
    Transform,
    apart,
    by_path,
    in_place_options,
    lines,
    match,
)

Claims = Mapping[str, tuple[str, ...]]  # path -> the labels of all parts whose selector takes it


def partition(parts: Mapping[Selector | str, Transform]) -> Transform:
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
    members, selectors = _checked(parts)
    known: dict[tuple[str, ...], Claims] = {}

    def claims(params: Mapping[str, Tensor]) -> Claims:
        # Matching is slow and its answer depends on the paths: once for each set of parameters, not at each step.
        paths = tuple(params)
        if paths not in known:
            known[paths] = _resolved(selectors, [Leaf((path,), param) for path, param in params.items()])
        return known[paths]

    def bind(leaves: Sequence[Leaf]) -> Transform:
        bound = _resolved(selectors, leaves)
        inner = {
            name: member.bind([leaf for leaf in leaves if bound[leaf.path] == (name,)])
            if member.bind is not None
            else member
            for name, member in members.items()
        }
        return _build(inner, lambda params: bound, bind, lambda paths: _algorithms(inner, bound, paths))

    return _build(members, claims, bind)


def _checked(
    parts: Mapping[Selector | str, Transform],
) -> tuple[dict[str, Transform], dict[str, Selector]]:
    """The members and their selectors by label, or a RouteError."""
    if not isinstance(parts, Mapping) or not parts:
        raise RouteError(f"partition(...) takes a mapping selector -> Transform with at least one entry, got {parts!r}")
    labels = [label(given) for given in parts]
    problems = [f"{name}: written twice" for name in dict.fromkeys(labels) if labels.count(name) > 1]
    problems += [
        f"{name}: not a Transform but {type(member).__name__}: {member!r}"
        for name, member in zip(labels, parts.values(), strict=True)
        if not isinstance(member, Transform)
    ]
    if problems:
        raise RouteError(lines("partition(...) takes a mapping selector -> Transform:", problems))
    selectors = dict(zip(labels, map(to_selector, parts), strict=True))
    return dict(zip(labels, parts.values(), strict=True)), selectors


def _resolved(selectors: Mapping[str, Selector], leaves: Sequence[Leaf]) -> Claims:
    found = {name: resolve(selector, leaves) for name, selector in selectors.items()}
    problems = [problem for _, wrong in found.values() for problem in wrong]
    if problems:
        raise RouteError(lines("partition: the selectors do not fit the parameters:", problems))
    return {
        leaf.path: tuple(name for name, (chosen, _) in found.items() if index in chosen)
        for index, leaf in enumerate(leaves)
    }


def _build(
    members: Mapping[str, Transform],
    claims: Callable[[Mapping[str, Tensor]], Claims],
    bind: Callable[[Sequence[Leaf]], Transform],
    algorithms: Algorithms | None = None,
) -> Transform:
    """The transform, given how the parameters are shared out."""

    def parts_of(params: Mapping[str, Tensor], relevant: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Each part's parameters; every relevant one belongs to exactly one part."""
        claimed = claims(params) if params else {}
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

    return Transform(init, update, in_place if len(forms) == len(members) else None, bind, algorithms)


def _algorithms(members: Mapping[str, Transform], claimed: Claims, paths: Collection[str]) -> Mapping[str, Algorithm]:
    found: dict[str, Algorithm] = {}
    for name, member in members.items():
        if member.algorithms is not None:
            found |= member.algorithms([path for path in paths if claimed.get(path) == (name,)])
    return found


def _check_claims(claimed: Claims, relevant: Iterable[str], labels: tuple[str, ...]) -> None:
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
