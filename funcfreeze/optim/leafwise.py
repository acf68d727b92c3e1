"""Transforms that update every parameter by itself: the pure and the in-place form from one short rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from funcfreeze.declare.selectors import Leaf
from funcfreeze.optim.algorithm import Algorithm
from funcfreeze.optim.cast import COUNT, cast, problem
from funcfreeze.optim.paces import Pace, Paces
from funcfreeze.optim.reals import add_
from funcfreeze.optim.skip import keep_if, unless
from funcfreeze.optim.transform import Named, OptState, PyTree, Transform, apart, by_path, lines, match
from funcfreeze.optim.unchanged import Checks
from funcfreeze.tracing import is_stand_in, is_traced

Entry = dict[str, Tensor]

Group = tuple[Pace, list[str]]
"""Parameters that have one learning rate and one weight decay."""

TOGETHER = 32
"""Parameters that one call of the fused kernel overwrites in a graph: compiling takes time that grows with the square
of it (106 s instead of 47 for all of 400 at once), and on CUDA a launch takes 36 at most anyway."""

_FUSED_DEVICES = ("cpu", "cuda")
_FUSED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rule:
    """How one optimizer updates one parameter.

    Attributes:
        name: the optimizer's name, for messages.
        algorithm: what torch.optim calls it, and its options but for the rate and the decay.
        slots: what it keeps for a parameter: `step`, a 0-d float32 count, and tensors like the parameter; all start
            at zero.
        pure: `(param, grad, entry, pace) -> (update, new entry)`, out of place.
        fused: `(params, grads, entries, pace, found_inf) -> run`, for parameters of one device; `run()` overwrites
            parameters and entries by torch's fused kernel (or those on lists, where there is none), or nothing if
            `found_inf` is there and 1. Gradients come in any memory order.
        takes_sparse: whether gradients may be sparse, where there is no weight decay.
        state_dtype: in which precision tensors are kept and all is computed; None for the parameter's own.
    """

    name: str
    algorithm: Algorithm
    slots: tuple[str, ...]
    pure: Callable[[Tensor, Tensor, Entry, Pace], tuple[Tensor, Entry]]
    fused: Callable[[list[Tensor], list[Tensor], list[Entry], Pace, Tensor | None], Callable[[], None]]
    takes_sparse: bool
    state_dtype: torch.dtype | None = None

    def dtype_for(self, param: Tensor) -> torch.dtype:
        """In which dtype the parameter's state is kept, and its update computed."""
        if self.state_dtype is None:
            return param.dtype
        return self.state_dtype.to_complex() if param.is_complex() else self.state_dtype

    def apply(self, param: Tensor, grad: Tensor, entry: Entry, pace: Pace) -> tuple[Tensor, Entry]:
        """The update, in the parameter's own dtype, and the new entry, out of place."""
        dtype = self.dtype_for(param)
        moved, after = self.pure(param.to(dtype), grad.to(dtype), entry, pace.near(grad))
        return moved.to(param.dtype), after


def leafwise(rule: Rule, paces: Paces) -> Transform:
    """The transform that applies the rule to every touched parameter."""

    def init(params: PyTree) -> OptState:
        tensors = by_path(params).tensors
        paces.check(tensors)
        return {path: _fresh(rule, param) for path, param in tensors.items()}

    def prepare(
        grads: PyTree, state: Mapping[str, Entry], named: Named, step: int | Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Entry], list[Group]]:
        touched = match(grads, named)
        groups = paces.at(step, named.tensors, touched)
        _check_layouts(rule, touched, groups)
        return touched, _entries(rule, state, {path: named[path] for path in touched}), groups

    def update(
        grads: PyTree, state: OptState, params: PyTree, *, step: int | Tensor | None = None
    ) -> tuple[PyTree, OptState]:
        named = by_path(params)
        touched, entries, groups = prepare(grads, state, named, step)
        results = {
            path: rule.apply(named[path], touched[path], entries[path], pace)
            for pace, paths in groups
            for path in paths
        }
        updates = named.rebuild({path: moved for path, (moved, _) in results.items()})
        return updates, {**state, **{path: entry for path, (_, entry) in results.items()}}

    checks = Checks()

    def known_to_fuse(
        grads: PyTree, state: OptState, params: PyTree, step: int | Tensor | None, found_inf: Tensor | None
    ) -> Callable[[], None] | None:
        """Runs of the fused kernel for all gradients, if these tensors were found fit for one a pace before."""
        if not _all_there(grads, state, params) or is_traced(next(iter(grads.values()))):
            return None
        touched, entries = [params[path] for path in grads], [state[path] for path in grads]
        kept = _kept(entries)
        if not checks.hold(tuple(grads), touched, kept, [*grads.values()]):
            return None
        return _together(
            [
                _fused_run(rule, paths, params, grads, state, pace, found_inf)
                for pace, paths in paces.at(step, params, grads)
            ]
        )

    def in_place(
        grads: PyTree,
        state: OptState,
        params: PyTree,
        *,
        step: int | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Callable[[], OptState]:
        known = known_to_fuse(grads, state, params, step, found_inf)
        if known is None:
            return checked(grads, state, params, step, found_inf)
        return lambda: _after(known, state)

    @torch.no_grad()
    def checked(
        grads: PyTree, state: OptState, params: PyTree, step: int | Tensor | None, found_inf: Tensor | None
    ) -> Callable[[], OptState]:
        named = by_path(params)
        touched, entries, groups = prepare(grads, state, named, step)
        touched = apart(touched, [named[path] for path in touched])
        fused = {path for path in touched if _fusable(rule, named[path], touched[path], entries[path])}
        runs = [
            _fused_run(rule, part, named.tensors, touched, entries, pace, found_inf)
            for pace, paths in groups
            for part in _parts([path for path in paths if path in fused], named)
        ]
        if len(fused) == len(touched) and len(runs) == len(groups) and _all_there(grads, state, params):
            checks.note(tuple(touched), [named[path] for path in touched], _kept(entries.values()), [*touched.values()])
        _check_writable({path: named[path] for path in touched if path not in fused})
        results = {
            path: rule.apply(named[path], touched[path], entries[path], pace)
            for pace, paths in groups
            for path in paths
            if path not in fused
        }
        if found_inf is not None:
            results = {
                path: (unless(found_inf, moved), keep_if(found_inf, entries[path], entry))
                for path, (moved, entry) in results.items()
            }

        @torch.no_grad()
        def commit() -> OptState:
            for run in runs:
                run()
            for path, (moved, entry) in results.items():
                add_(named[path], moved)
                for slot, value in entry.items():
                    entries[path][slot].copy_(value)
            return {**state, **entries}

        return commit

    def bind(leaves: Sequence[Leaf]) -> Transform:
        return leafwise(rule, paces.bind(leaves))

    def algorithms(paths: Collection[str]) -> Mapping[str, Algorithm]:
        return {path: rule.algorithm.at(*given) for path, given in paces.given(paths).items()}

    return Transform(
        init,
        update,
        in_place,
        bind if paces.are_by_selector else None,
        algorithms if paces.are_bound else None,
    )


def _all_there(grads: PyTree, state: OptState, params: PyTree) -> bool:
    """Whether there are gradients, all in flat dicts with an entry for each."""
    flat = type(grads) is dict and isinstance(params, dict) and isinstance(state, dict)
    return (
        flat
        and {Tensor}.issuperset(map(type, grads.values()))
        and params.keys() & state.keys() >= grads.keys() != set()
    )


def _kept(entries: Iterable[Entry]) -> list[Tensor]:
    return [tensor for entry in entries if type(entry) is dict for tensor in entry.values()]


@torch.no_grad()
def _after(run: Callable[[], None], state: OptState) -> OptState:
    run()
    return {**state}


def _fresh(rule: Rule, param: Tensor) -> Entry:
    return {
        slot: torch.zeros((), dtype=torch.float32, device=param.device)
        if slot == COUNT
        else torch.zeros_like(param, dtype=rule.dtype_for(param), requires_grad=False)
        for slot in rule.slots
    }


def _entries(rule: Rule, state: Mapping[str, Entry], params: Mapping[str, Tensor]) -> dict[str, Entry]:
    """What the state keeps for the parameters, checked, and cast where it is merely in another form.

    A parameter the state does not know starts fresh.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{rule.name}: the state is a dict path -> {{{', '.join(rule.slots)}}}, got {type(state).__name__}; "
            "was it made by another transform?"
        )
    entries = {path: state[path] if path in state else _fresh(rule, param) for path, param in params.items()}
    problems = []
    for path, param in params.items():
        if not _fits(rule, entries[path], param):
            entries[path], found = _cast(rule, entries[path], param)
            problems += [f"{path}: {problem}" for problem in found]
    if problems:
        raise ValueError(
            lines(f"{rule.name}: the state does not fit the parameters:", problems)
            + "\nwas it made by another transform? Steps that share a State need optimizers of one structure"
        )
    return entries


def _fits(rule: Rule, entry: Entry, param: Tensor) -> bool:
    """Whether all is as it is to be; asked of every parameter at every step, so quick."""
    if len(entry) != len(rule.slots):
        return False
    shape, dtype, device = param.shape, rule.dtype_for(param), param.device
    for slot in rule.slots:
        kept = entry.get(slot)
        if not isinstance(kept, Tensor) or kept.device != device:
            return False
        if slot == COUNT:
            if kept.dtype != torch.float32 or kept.ndim != 0:
                return False
        elif kept.dtype != dtype or kept.shape != shape:
            return False
    return True


def _cast(rule: Rule, entry: Entry, param: Tensor) -> tuple[Entry, list[str]]:
    """What is kept for a parameter as the rule keeps it, and what in it cannot be that."""
    if entry.keys() != set(rule.slots):
        kept, wanted = (", ".join(names) or "nothing" for names in (entry, rule.slots))
        return entry, [f"the state has {kept}; {rule.name} with these options keeps {wanted}"]
    found: Entry = {}
    problems = []
    for slot in rule.slots:
        shape, dtype = _form(rule, slot, param)
        tensor = cast(entry[slot], slot, shape, dtype, param.device)
        if tensor is None:
            problems.append(f"{slot} {problem(entry[slot], shape, dtype)}")
        else:
            found[slot] = tensor
    return found, problems


def _form(rule: Rule, slot: str, param: Tensor) -> tuple[torch.Size, torch.dtype]:
    """The shape and dtype of what is kept."""
    return (torch.Size(), torch.float32) if slot == COUNT else (param.shape, rule.dtype_for(param))


def _check_layouts(rule: Rule, grads: Mapping[str, Tensor], groups: Sequence[Group]) -> None:
    problems = [
        f"{path}: layout {grads[path].layout}"
        for pace, paths in groups
        for path in paths
        if grads[path].layout is not torch.strided
        and not (rule.takes_sparse and not pace.decays and grads[path].layout is torch.sparse_coo)
    ]
    if problems:
        raise ValueError(
            lines(f"{rule.name} with these options takes no such sparse gradients:", problems)
            + "\nuse ff.optim.sgd without weight_decay, or partition with from_torch(torch.optim.SparseAdam), "
            "or make the layer dense (nn.Embedding(sparse=False))"
        )


def _check_writable(params: Mapping[str, Tensor]) -> None:
    """An expanded tensor cannot be overwritten; found now, because a commit must not fail halfway."""
    problems = [
        f"{path}: shape {tuple(param.shape)}, strides {param.stride()}"
        for path, param in params.items()
        if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True))
    ]
    if problems:
        raise ValueError(lines("expanded tensors cannot be updated in place; clone them first:", problems))


def _fusable(rule: Rule, param: Tensor, grad: Tensor, entry: Entry) -> bool:
    """Whether torch's fused kernels give the right answer: they walk raw memory, one order for all tensors.

    On the CPU they do not check that (they silently give wrong numbers where the strides differ), so this does.
    They compute in the parameter's own dtype alone.
    """
    device, strides = param.device, param.stride()
    if (
        not _is_ordinary(param)
        or device.type not in _FUSED_DEVICES
        or param.dtype not in _FUSED_DTYPES
        or param.dtype != rule.dtype_for(param)
        or grad.layout != torch.strided
        or not _dense(param)
    ):
        return False
    for slot, kept in entry.items():
        if not _is_ordinary(kept) or kept.device != device or (slot != COUNT and kept.stride() != strides):
            return False
    return True


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether it has no behaviour of its own, or stands for such a tensor while a compiler traces."""
    kind = type(tensor)
    return kind is Tensor or kind is nn.Parameter or is_stand_in(tensor)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _parts(paths: Sequence[str], params: Named) -> list[list[str]]:
    """Parameters that one call of the kernel takes: of one device and dtype, and few while a compiler traces."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for path in paths:
        groups.setdefault((params[path].device, params[path].dtype), []).append(path)
    return [
        group[start : start + most]
        for group in groups.values()
        for most in (TOGETHER if is_traced(params[group[0]]) else len(group),)
        for start in range(0, len(group), most)
    ]


def _fused_run(
    rule: Rule,
    paths: Sequence[str],
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    pace: Pace,
    found_inf: Tensor | None,
) -> Callable[[], None]:
    """A run of the fused kernel, for parameters of one device and dtype."""
    first = params[paths[0]]
    return rule.fused(
        [params[path] for path in paths],
        [grads[path] for path in paths],
        [entries[path] for path in paths],
        pace.near(first),
        None if found_inf is None else found_inf.to(first.device),
    )


def _together(runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for each in runs:
            each()

    return run
