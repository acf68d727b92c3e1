"""Any torch.optim optimizer as a transform."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from funcfreeze.optim.algorithm import Algorithm
from funcfreeze.optim.hyperparameters import rate_at
from funcfreeze.optim.skip import are_alike, choose, is_found, keep_if
from funcfreeze.optim.transform import Named, OptState, PyTree, Transform, by_path, lines, match
from funcfreeze.tracing import is_traced

Entry = dict[str, Any]


def from_torch(optimizer: type[Optimizer], **kwargs: Any) -> Transform:
    """A torch.optim optimizer, or one of your own, as a transform: `from_torch(torch.optim.NAdam, lr=1e-3)`.

    At each step the optimizer is built over copies of the touched parameters, given what it kept for them, and stepped
    once. The state of a parameter is what the optimizer keeps for it, numbers included: nothing until the first
    gradient. `lr` may be a schedule, whose value is read as a number: that waits for the device, the only one of these
    transforms to do so. Where steps are skipped (by a loss scale, or `on_nonfinite`) it waits too if the optimizer has
    yet to make its state, or keeps some of it as numbers or on another device, as counts are on the CPU without
    `capturable=True`: what is not there cannot be chosen on the device. An optimizer that needs a closure, or that
    keeps more than its state for each parameter, is refused.

    >>> tx = from_torch(torch.optim.Adagrad, lr=0.5)
    >>> params = {"w": torch.zeros(2)}
    >>> tx.update({"w": torch.tensor([1.0, -2.0])}, tx.init(params), params)[0]
    {'w': tensor([-0.5000,  0.5000])}
    >>> from_torch(torch.optim.LBFGS, lr=0.5)
    Traceback (most recent call last):
        ...
    ValueError: from_torch(LBFGS): its step() needs a closure that computes the loss again; a transform has only ...
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"from_torch(...) takes a torch.optim.Optimizer class, got {_described(optimizer)}")
    name = f"from_torch({optimizer.__name__})"
    if _needs_closure(optimizer):
        raise ValueError(
            f"{name}: its step() needs a closure that computes the loss again; a transform has only the gradients"
        )
    lr = kwargs.get("lr")
    by_selector = [option for option, value in kwargs.items() if isinstance(value, Mapping)]
    if by_selector:
        raise TypeError(
            f"{name}: {', '.join(by_selector)} by selector is for sgd, adam, adamw and rmsprop of ff.optim; give each "
            "part its own, by partition({selector: from_torch(...), ...})"
        )

    def build(params: list[nn.Parameter], step: int | Tensor | None) -> Optimizer:
        now = {"lr": float(rate_at(name, "lr", lr, step))} if callable(lr) else {}
        make: Callable[..., Optimizer] = optimizer  # takes more than the base class does
        try:
            return make(params, **{**kwargs, **now})
        except Exception as error:
            error.add_note(
                f"in {name}, built with {', '.join(f'{key}={kwargs[key]!r}' for key in kwargs) or 'defaults'}"
            )
            raise

    # Options that the optimizer refuses are found now. A matrix, because some optimizers take nothing else.
    tried = build([nn.Parameter(torch.zeros(2, 2))], torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def compute(
        grads: PyTree, state: OptState, named: Named, step: int | Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Entry]]:
        """The touched parameters after the step, and what the optimizer then keeps for them."""
        touched = match(grads, named)
        if not isinstance(state, Mapping):
            raise ValueError(f"{name}: the state is a dict path -> entry, got {type(state).__name__}")
        if not touched:
            return {}, {}
        if kwargs.get("fused") and any(map(is_traced, touched.values())):
            raise ValueError(
                f"{name}: fused=True in what is compiled; torch's fused kernels cannot be traced, and compilers make "
                "fused code of the others. Leave it out, or use ff.optim.sgd, adam or adamw, which call them as a whole"
            )
        copies = {path: nn.Parameter(named[path].detach().clone()) for path in touched}
        built = build([*copies.values()], step)
        for path, param in copies.items():
            param.grad = touched[path].detach().to(param.dtype, copy=True)
            if state.get(path):
                built.state[param] = _copied(state[path])
        _step(name, built, touched)
        _check_kept(name, built)
        return (
            {path: param.detach() for path, param in copies.items()},
            {path: dict(built.state.get(param, {})) for path, param in copies.items()},
        )

    def init(params: PyTree) -> OptState:
        return {path: {} for path in by_path(params).tensors}

    @torch.no_grad()
    def update(
        grads: PyTree, state: OptState, params: PyTree, *, step: int | Tensor | None = None
    ) -> tuple[PyTree, OptState]:
        named = by_path(params)
        moved, entries = compute(grads, state, named, step)
        return named.rebuild({path: param - named[path] for path, param in moved.items()}), {**state, **entries}

    @torch.no_grad()
    def in_place(
        grads: PyTree,
        state: OptState,
        params: PyTree,
        *,
        step: int | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Callable[[], OptState]:
        # All on copies: whatever the optimizer raises, nothing has changed.
        named = by_path(params)
        moved, entries = compute(grads, state, named, step)
        if found_inf is not None:
            before = {path: state.get(path, {}) for path in entries}
            if are_alike(before, entries, found_inf.device):
                moved = {path: choose(found_inf, named[path], param) for path, param in moved.items()}
                entries = keep_if(found_inf, before, entries)
            elif is_found(found_inf, f"{name} changes the form of what it keeps"):
                return lambda: state

        @torch.no_grad()
        def commit() -> OptState:
            for path, param in moved.items():
                named[path].copy_(param)
            return {**state, **{path: _overwritten(state.get(path, {}), entry) for path, entry in entries.items()}}

        return commit

    algorithm = Algorithm((optimizer,), {**tried.defaults, **({"lr": lr} if callable(lr) else {})}, slots=None)
    return Transform(init, update, in_place, algorithms=lambda paths: dict.fromkeys(paths, algorithm))


def _described(given: object) -> str:
    if isinstance(given, Optimizer):
        return f"an instance of {type(given).__name__}; give the class and its options instead"
    if isinstance(given, LRScheduler) or (isinstance(given, type) and issubclass(given, LRScheduler)):
        return f"the scheduler {given!r}; for schedulers there is ff.schedules.from_torch"
    return f"{type(given).__name__}: {given!r}"


def _needs_closure(optimizer: type[Optimizer]) -> bool:
    _, *arguments = inspect.signature(optimizer.step).parameters.values()
    return any(
        argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD)
        for argument in arguments
    )


def _copied(entry: Entry) -> Entry:
    # The global registry of optree, in which None is no leaf: lists and dicts in an entry are copied too.
    return optree.tree_map(lambda kept: kept.clone() if isinstance(kept, Tensor) else kept, entry)  # type: ignore[arg-type, return-value]


def _step(name: str, optimizer: Optimizer, grads: Mapping[str, Tensor]) -> None:
    """One step, after which the options of the parameter group are as before."""
    (group,) = optimizer.param_groups
    before = {option: (value, _version(value)) for option, value in group.items() if option != "params"}
    try:
        optimizer.step()
    except Exception as error:
        sparse = [f"{path}: layout {grad.layout}" for path, grad in grads.items() if grad.layout != torch.strided]
        if sparse:
            head = f"{name}: its step() failed ({error}), and these gradients are sparse:"
            raise ValueError(
                lines(head, sparse) + "\npartition them to from_torch(torch.optim.SparseAdam) or ff.optim.sgd"
            ) from error
        error.add_note(f"in {name}, for the parameters {', '.join(grads)}")
        raise
    now = {option: (value, _version(value)) for option, value in group.items() if option != "params"}
    changed = [option for option in {**before, **now} if not _same(before.get(option), now.get(option))]
    if changed:
        raise ValueError(
            f"{name}: its step() changed the options {', '.join(changed)} of the parameter group; such state is of the "
            "group, not of a parameter, and would be lost. Use the optimizer itself, with ff.backward"
        )


def _same(before: tuple[object, int] | None, now: tuple[object, int] | None) -> bool:
    if before is None or now is None:
        return before is now
    if isinstance(before[0], Tensor) or isinstance(now[0], Tensor):
        # By identity and version, since comparing values would wait for the device.
        return before[0] is now[0] and before[1] == now[1]
    return before == now


def _version(value: object) -> int:
    return value._version if isinstance(value, Tensor) else 0


def _check_kept(name: str, optimizer: Optimizer) -> None:
    params = {param for group in optimizer.param_groups for param in group["params"]}
    strangers = [str(key) for key in optimizer.state if key not in params]
    if strangers:
        raise ValueError(
            f"{name}: its step() keeps state under {', '.join(strangers)}, which is no parameter, and it would be "
            "lost. Use the optimizer itself, with ff.backward"
        )


def _overwritten(old: Entry, new: Entry) -> Entry:
    """The new entry in the old one's tensors, where they fit."""
    return {slot: _into(old.get(slot), value) for slot, value in new.items()}


def _into(old: object, new: object) -> object:
    if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
        return new
    fits = (old.shape, old.dtype, old.device, old.layout) == (new.shape, new.dtype, new.device, new.layout)
    return old.copy_(new) if fits else new
