"""The manifest of a checkpoint: what is in it, readable as JSON, under a checksum of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from funcfreeze.checkpoint.files import Damaged, File, write_text

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: the number of steps taken.
        files: all others of the folder.
        state: the fields of the state as JSON, tensors by name (see `plain`).
        pieces: of each tensor by name, the file that it is in, its dtype, its shape, and its strides if it is not
            contiguous.
        plan: which loss may update which parameters.
        extra: the user's own values.
        data: where the data is.
        random: the state of all generators.
        options: how the step was built.
        versions: of funcfreeze, torch and Python.
        saved: when, by the clock of the machine; for readers.
        format: of the manifest.
    """

    step: int
    files: tuple[File, ...]
    state: Any
    pieces: Mapping[str, Any]
    plan: Any
    extra: Any
    data: Any
    random: Any
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    saved: str
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into a folder. The checksum in the first line is that of all lines after it."""
        rest = json.dumps(asdict(self), indent=1).removeprefix("{\n") + "\n"
        write_text(folder / MANIFEST, f"{_first_line(rest.encode())}\n{rest}")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest in a folder.

        Raises:
            Damaged: it is not whole.
            ValueError: it is of a newer format.
        """
        path = folder / MANIFEST
        try:
            text = path.read_bytes()
        except OSError as error:
            raise Damaged(f"{path}: {error.strerror}") from error
        first, _, rest = text.partition(b"\n")
        if first.decode(errors="replace") != _first_line(rest):
            raise Damaged(f"{path}: its bytes are not those that were written (sha256)")
        given = json.loads(text)
        del given["sha256"]
        if given["format"] > FORMAT:
            raise ValueError(
                f"{path} is of format {given['format']}, this version of funcfreeze reads format {FORMAT}: update it"
            )
        return Manifest(**{**given, "files": tuple(File(**file) for file in given["files"])})

    def problems_in(self, folder: Path) -> list[str]:
        """What is wrong with the files beside it."""
        return [problem for file in self.files if (problem := file.problem_in(folder)) is not None]


def _first_line(rest: bytes) -> str:
    """With the checksum of all lines after it."""
    return f'{{"sha256": "{hashlib.sha256(rest).hexdigest()}",'
