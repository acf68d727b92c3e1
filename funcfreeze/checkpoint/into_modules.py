"""Parameters and buffers of a checkpoint, or of any safetensors file, for a plain module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from funcfreeze.checkpoint.files import TENSORS, read_tensors
from funcfreeze.checkpoint.folder import of_whole
from funcfreeze.checkpoint.manifest import MANIFEST, Manifest
from funcfreeze.checkpoint.plain import plainly
from funcfreeze.checkpoint.saving import wait_for

_OF_MODULE = ("params/", "buffers/")


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Write the parameters and buffers of a checkpoint, or of any safetensors file, into a plain module.

    Tensors are cast to the module's dtype and device, floating ones to floating ones alone.

    Args:
        model: what is written to; as it was if anything does not fit.
        path: a checkpoint, a folder of them, of which the newest is taken that is whole, or a file of tensors by the
            module's own names.

    Raises:
        ValueError: it is damaged, or not of this model: tells everything at once.

    >>> import tempfile
    >>> import safetensors.torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     safetensors.torch.save_file({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, f"{folder}/pretrained")
    ...     model = load_into(nn.Linear(2, 1), f"{folder}/pretrained")
    >>> model(torch.ones(2)).detach()
    tensor([2.])
    """
    path = Path(path)
    wait_for(path)
    wait_for(path.parent)
    own = _read(path)
    places = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    problems = [*_missing(model, places, own), *_misfits(places, own), *_torn(places, own)]
    if problems:
        raise ValueError("\n".join([f"{path} is of another model:", *(f"  - {problem}" for problem in problems)]))
    with torch.no_grad():
        for name, tensor in own.items():
            places[name].copy_(tensor)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors by the module's own names."""
    if path.name == TENSORS and (path.parent / MANIFEST).is_file():
        path = path.parent
    if path.is_file():
        return read_tensors(path, {})

    def read(at: Path, manifest: Manifest) -> dict[str, Tensor]:
        return read_tensors(at / TENSORS, manifest.pieces, wanted=lambda name: name.startswith(_OF_MODULE))

    return {plainly(name.split("/", 1)[1]): tensor for name, tensor in of_whole(path, read).items()}


def _missing(model: nn.Module, places: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[str]:
    persistent = model.state_dict().keys()
    given = {id(places[name]) for name in own if name in places}  # a tied one by any of its names
    for name, tensor in places.items():
        if name in persistent and id(tensor) not in given:
            yield f"{name}: the model has it, the file does not"
    for name in own:
        if name not in places:
            yield f"{name}: the file has it, the model does not"


def _misfits(places: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in own.items():
        place = places.get(name)
        if place is None:
            continue
        if place.shape != tensor.shape:
            yield f"{name}: the file has shape {tuple(tensor.shape)}, the model {tuple(place.shape)}"
        elif place.is_meta:
            yield f"{name}: the model's is on the meta device, which holds no numbers; model.to_empty(device=...) first"
        elif _kind(place.dtype) != _kind(tensor.dtype):
            yield f"{name}: the file has {tensor.dtype}, the model {place.dtype}"
        elif place.is_inference():
            yield f"{name}: the model's was made in inference mode, which allows no writing; clone it first"
        elif _overflows(tensor, place.dtype):
            yield f"{name}: the file has {tensor.dtype} with numbers that are too large for the model's {place.dtype}"
        elif any(stride == 0 and size > 1 for stride, size in zip(place.stride(), place.shape, strict=True)):
            yield f"{name}: the model's is expanded, so that elements share memory; clone it first"


def _torn(places: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[str]:
    """What is tied in the model and has several values in the file."""
    first: dict[int, str] = {}
    for name, tensor in own.items():
        if name in places:
            other = first.setdefault(id(places[name]), name)
            if other != name and not torch.equal(own[other], tensor):
                yield f"{name}: tied to {other} in the model, the file has other numbers for it"


def _overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    if tensor.dtype == dtype:
        return False
    there = tensor.to(dtype)
    if tensor.is_floating_point() or tensor.is_complex():
        return bool((_wide(tensor).isfinite() & ~_wide(there).isfinite()).any())
    return not torch.equal(there.to(tensor.dtype), tensor)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "floating"
    return "boolean" if dtype == torch.bool else "integer"
