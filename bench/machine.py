"""The machine, the versions, and the settings that are the same for every contender."""

from __future__ import annotations

import os
import pathlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import funcfreeze as ff

PACKAGES = ("torchjd", "jax", "jaxlib", "optax", "numpy")


def settle(*, double: bool = False) -> None:
    """Products and convolutions in float32 as it is, for everybody; no library takes the whole GPU for itself.

    With `double` everything is in float64. Called once, before jax is imported, by what runs as a program.
    """
    if double:
        torch.set_default_dtype(torch.float64)
        os.environ["JAX_ENABLE_X64"] = "1"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, as far as it matters for timings."""
    found = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def versions() -> dict[str, str | None]:
    """What is installed; None for what is not."""
    own = {"python": platform.python_version(), "torch": torch.__version__, "funcfreeze": ff.__version__}
    return own | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
