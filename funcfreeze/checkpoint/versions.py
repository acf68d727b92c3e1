"""The versions that a checkpoint was saved with."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

import torch


def versions() -> dict[str, str]:
    """Those of now."""
    return {"funcfreeze": version("funcfreeze"), "torch": torch.__version__, "python": platform.python_version()}


def other_versions(saved: Mapping[str, str]) -> str:
    """Which are others now than those that were saved, of what decides about bits; empty if none is."""
    present = versions()
    return ", ".join(
        f"{name} {saved[name]}, here is {present[name]}"
        for name in ("torch", "funcfreeze")
        if saved[name] != present[name]
    )
