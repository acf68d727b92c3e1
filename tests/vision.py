"""torchvision, also beside a torch that its wheel was not built for."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import pytest
import torch

ABSENT = "operator torchvision::nms does not exist"


def torchvision() -> ModuleType:
    """The package, whose models are Python; a test that asks for it is skipped where it is not installed."""
    make_importable()
    return pytest.importorskip("torchvision")


def make_importable() -> None:
    """Let torchvision be imported, here or by others (transformers does), if it is installed.

    PyPI's wheel is of the CUDA build: beside a CPU build of torch its library of operators does not load, and its
    import ends at the first of them that it wants to describe. Only then are their names defined here. Defined before
    a library that does load, they end the process.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if ABSENT not in str(error):
            raise
        _operator_names()


@cache
def _operator_names() -> torch.library.Library:
    """Operators without kernels, defined for as long as the library is held."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
