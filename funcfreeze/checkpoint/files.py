"""Writing files so that they are there after a power cut, or not at all; and knowing that they are whole."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSORS = "tensors.safetensors"

_BLOCK = 2**24
"""Bytes that are hashed at a time.

`hashlib.file_digest` takes 2**18, and beside a busy loop a thread waits for a turn each time: 500 MB took 12 to 20
seconds, and 1.3 to 2.4 like this.
"""


class Damaged(Exception):
    """A file is missing, cut short or changed."""


@dataclass(frozen=True)
class File:
    """A file of a checkpoint, as it was written.

    Attributes:
        name: in its folder.
        bytes: how long it is.
        sha256: of all of it.
    """

    name: str
    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> File:
        """The file as it is now."""
        digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(block):
                digest.update(block[:read])
        return File(path.name, path.stat().st_size, digest.hexdigest())

    def problem_in(self, folder: Path) -> str | None:
        """What is wrong with the file in a folder."""
        path = folder / self.name
        if not path.is_file():
            return f"{path}: it is missing"
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"{path}: {size:,} bytes, {self.bytes:,} were written"
            return None if File.of(path) == self else f"{path}: its bytes are not those that were written (sha256)"
        except OSError as error:
            return f"{path}: it cannot be read: {error.strerror}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write tensors of the CPU as a safetensors file.

    Raises:
        OSError: it cannot be written.

    Returns:
        Of each tensor the file that it is in, its dtype and shape, and its strides if they are others than those of its
        shape: what such a file does not say of complex tensors and memory formats.
    """
    safetensors = required()
    kept = {name: _as_plain(tensor) for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(kept, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # its own word for a disk that is full
        raise OSError(f"{path}: {error}") from error
    synced(path)
    return {name: {"file": path.name, **_form(tensor)} for name, tensor in tensors.items()}


def read_tensors(
    path: Path,
    pieces: Mapping[str, Mapping[str, Any]],
    wanted: Callable[[str], bool] = lambda name: True,
    place: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Tensor]:
    """The tensors of such a file, in memory of their own, in the form that `write_tensors` told of them.

    Args:
        path: of the file.
        pieces: what `write_tensors` returned.
        wanted: by name, which are read.
        place: puts each where it is to be, before the next one is read.

    Raises:
        ValueError: it is none.
    """
    safetensors = required()
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {
                name: place(name, _in_form(file.get_tensor(name), pieces.get(name, {})))
                for name in file.keys()  # noqa: SIM118  # it is no mapping
                if wanted(name)
            }
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file: {error}. What torch.save wrote is read by torch.load"
        ) from error


def synced(path: Path) -> None:
    """Have a file, or what a folder lists, on the disk; the latter where the system can."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # there a folder cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file, and have it on the disk."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _as_plain(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()).contiguous()


def _form(tensor: Tensor) -> dict[str, Any]:
    form = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    of_shape = torch.empty(tensor.shape, device="meta").stride()  # where a size is 1, others are contiguous, too
    return form if tensor.stride() == of_shape else {**form, "stride": list(tensor.stride())}


def _in_form(tensor: Tensor, form: Mapping[str, Any]) -> Tensor:
    own = tensor.clone()  # it may be a part of the file, which may go, and where no complex number may begin
    found = torch.view_as_complex(own) if form.get("dtype", "").startswith("complex") else own
    if "stride" not in form:
        return found
    return torch.empty_strided(found.shape, form["stride"], dtype=found.dtype, device=found.device).copy_(found)


def required() -> Any:
    """The library whose files these are.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("checkpoints are safetensors files: pip install 'funcfreeze[checkpoint]'") from error
    return safetensors
