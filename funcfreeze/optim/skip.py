"""A step that is skipped without asking the device: whether anything is not finite, and values chosen by the answer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.optim.transform import OptState, PyTree, Transform, by_path
from funcfreeze.tracing import is_traced

InPlace = Callable[..., Callable[[], OptState]]


def find_non_finite(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """1.0 if an element of any gradient is infinite or NaN, else 0.0: a 0-d float32 tensor on the device.

    Nothing waits for the device. The numbers are those that torch's fused optimizers take as `found_inf`.

    >>> find_non_finite([torch.ones(2), torch.tensor([1.0, float("nan")])], torch.device("cpu"))
    tensor(1.)
    >>> find_non_finite([], torch.device("cpu"))
    tensor(0.)
    """
    return is_any_infinite(largest([*gradients], device))


def is_any_infinite(sizes: Tensor) -> Tensor:
    """1.0 if one of these is infinite or NaN, else 0.0: a 0-d float32 tensor."""
    return (~sizes.isfinite().all()).to(torch.float32)


def largest(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The size of each gradient's largest element, NaN if one is NaN, 0 if there is none: one vector, on the device.

    >>> largest([torch.tensor([1.0, -3.0]), torch.ones(0), torch.tensor([1.0, float("nan")])], torch.device("cpu"))
    tensor([3., 0., nan])
    """
    values = [_real_values(gradient) for gradient in gradients]
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        if value.numel():  # nothing has no largest element
            alike.setdefault((value.device, value.dtype), []).append(index)
    sizes = [torch.zeros((), dtype=torch.float32, device=device)] * len(values)
    for group in alike.values():
        norms = torch._foreach_norm([values[index] for index in group], math.inf)
        for index, norm in zip(group, norms, strict=True):
            sizes[index] = norm.to(device)
    return torch.stack(sizes) if sizes else torch.zeros(0, dtype=torch.float32, device=device)


def _real_values(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        # Half precision may overflow where coalescing adds up, which GradScaler looks at too.
        gradient = (gradient.coalesce() if gradient.dtype == torch.float16 else gradient)._values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def unless(found_inf: Tensor, update: Tensor) -> Tensor:
    """The update, or one that changes no bit of what it is added to: -0.0, since 0.0 would make 0.0 of -0.0.

    >>> unless(torch.tensor(1.0), torch.tensor([3.0, float("nan")]))
    tensor([-0., -0.])
    """
    if update.is_sparse:
        return torch.sparse_coo_tensor(
            update._indices(),
            unless(found_inf, update._values()),
            update.shape,
            is_coalesced=update.is_coalesced(),
            check_invariants=False,
        )
    return torch.where(found_inf.to(update.device) > 0, -torch.zeros_like(update), update)


def choose(found_inf: Tensor, old: Tensor, new: Tensor, what: str = "a tensor") -> Tensor:
    """The old tensor if anything was found, else the new one, bit by bit.

    Where the two differ in shape, dtype, device or layout, the host has to know which it is: that waits for the device.

    Args:
        found_inf: 1.0 or 0.0.
        old: what was there.
        new: what the step would put in its place.
        what: what it is, for a message.

    Raises:
        ValueError: they differ so, in a step that is compiled.

    >>> choose(torch.tensor(1.0), torch.tensor([-0.0, 1.0]), torch.tensor([2.0, float("nan")]))
    tensor([-0., 1.])
    """
    if old is new:
        return new
    if _form(old) != _form(new) or new.layout is not torch.strided:
        return old if is_found(found_inf, f"{what} changes its shape, dtype or device") else new
    skipped = found_inf.to(new.device) > 0
    if new.is_floating_point() and new.itemsize <= 2:  # compilers compute in float32, which has one NaN for all
        bits = torch.int16 if new.itemsize == 2 else torch.uint8
        return torch.where(skipped, old.view(bits), new.view(bits)).view(new.dtype)
    return torch.where(skipped, old, new)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def is_found(found_inf: Tensor, because: str) -> bool:
    """Whether anything was found, read from the device.

    Args:
        found_inf: 1.0 or 0.0.
        because: why that cannot be left to the device.

    Raises:
        ValueError: in a step that is compiled, which cannot ask.
    """
    if is_traced(found_inf):
        raise ValueError(
            f"{because}, and this step is skipped where something is not finite: which of the two it is cannot be "
            "chosen in compiled code. Let a Step with compile=False take the steps in which that happens (the two "
            "share a State)"
        )
    return bool(found_inf > 0)


def keep_if(found_inf: Tensor, old: OptState, new: OptState) -> OptState:
    """The old state if anything was found, else the new one, leaf by leaf; what is the same object stays it.

    Where they differ in more than tensors (what `from_torch` keeps may, at the first gradient), the host has to know
    which of them it is: that waits for the device.

    >>> keep_if(torch.tensor(0.0), {"step": torch.tensor(1.0)}, {"step": torch.tensor(2.0)})
    {'step': tensor(2.)}
    """
    before, structure = optree.tree_flatten(old)
    after, other = optree.tree_flatten(new)
    if structure != other or any(map(_differ_as_numbers, before, after)):
        return old if is_found(found_inf, "what the optimizer keeps changes its form") else new
    return optree.tree_unflatten(structure, [_chosen(found_inf, *pair) for pair in zip(before, after, strict=True)])


def are_alike(one: OptState, other: OptState, device: torch.device) -> bool:
    """Whether the two have one form, with no number and no tensor on another device that the host would wait for."""
    leaves, structure = optree.tree_flatten(one)
    others, renewed = optree.tree_flatten(other)
    return structure == renewed and not any(
        _differ_as_numbers(before, after)
        or (isinstance(after, Tensor) and _form(before) != _form(after))
        or (isinstance(after, Tensor) and after.device != device)
        for before, after in zip(leaves, others, strict=True)
    )


def update_unless(
    found_inf: Tensor, transform: Transform, grads: PyTree, state: OptState, params: PyTree, step: int | Tensor | None
) -> tuple[PyTree, OptState]:
    """The transform's update and new state, or updates that change nothing and the old state if anything was found."""
    updates, after = transform.update(grads, state, params, step=step)
    named = by_path(updates)
    moved = {path: unless(found_inf, update) for path, update in named.tensors.items()}
    return named.rebuild(moved), keep_if(found_inf, state, after)


def skippable(transform: Transform) -> Transform:
    """The transform, without an in-place form that takes no `found_inf`: by its pure form any step can be skipped."""
    if transform.in_place is None:
        return transform
    if takes_found_inf(transform.in_place):
        return transform
    measure = transform.measuring
    return transform._replace(
        in_place=None, measuring=None if measure is None else lambda note: skippable(measure(note))
    )


def takes_found_inf(in_place: Callable[..., Any]) -> bool:
    """Whether an in-place form can skip."""
    taken: Mapping[str, inspect.Parameter] = inspect.signature(in_place).parameters
    return "found_inf" in taken or any(each.kind is each.VAR_KEYWORD for each in taken.values())


def as_its_parts(in_place: InPlace, parts: Iterable[InPlace]) -> InPlace:
    """An in-place form made of others, which takes `found_inf` if all of those do."""
    if all(map(takes_found_inf, parts)):
        return in_place

    def never_skipped(
        grads: PyTree, state: OptState, params: PyTree, *, step: int | Tensor | None = None
    ) -> Callable[[], OptState]:
        return in_place(grads, state, params, step=step)

    return never_skipped


def _differ_as_numbers(before: Any, after: Any) -> bool:
    return not (isinstance(before, Tensor) and isinstance(after, Tensor)) and before is not after and before != after


def _chosen(found_inf: Tensor, before: Any, after: Any) -> Any:
    return choose(found_inf, before, after, "what the optimizer keeps") if isinstance(after, Tensor) else after
