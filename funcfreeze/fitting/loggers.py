"""Where metrics go: one small protocol, and files that any tool reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """Takes metrics as plain numbers."""

    def log(self, step: int, metrics: Mapping[str, float]) -> Any:
        """The metrics after so many steps."""
        ...


class JSONLines:
    """A line of JSON each time: `{"step": 50, "cls": 0.31}`. A run that goes on appends to it.

    A run that was killed goes on before its last lines: the later one of a step counts.

    What is not finite is written as Python's `json` reads it, `NaN`; a metric that is called `step` as `metrics.step`.

    Args:
        path: of the file; folders are made.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = _in_a_folder(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8") as file:
            others = {"metrics.step" if name == "step" else name: value for name, value in metrics.items()}
            file.write(json.dumps({"step": step, **others}) + "\n")


class CSV:
    """A row for each number, `step,name,value`: which metrics there are may change from step to step.

    Args:
        path: of the file; folders are made.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = _in_a_folder(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the rows."""
        is_new = not self._path.exists()
        with self._path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["step", "name", "value"])
            writer.writerows([step, name, value] for name, value in metrics.items())


def _in_a_folder(path: str | Path) -> Path:
    """The path of a file, in a folder that is there."""
    found = Path(path)
    if found.is_dir():
        raise IsADirectoryError(f"this logger writes a file, and {found} is a folder")
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


class TensorBoard:
    """Scalars for TensorBoard, which has to be installed.

    Args:
        folder: of the run.

    Raises:
        ImportError: it is not.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("this logger writes for TensorBoard: pip install tensorboard") from error
        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
