"""The global random number generators of Python, NumPy and torch, as they were afterwards."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept(devices: Iterable[int] | None = None) -> Iterator[None]:
    """Whatever is drawn inside, all of them are as they were afterwards.

    Args:
        devices: the CUDA devices whose generators are meant; None is all, where CUDA is in use.

    >>> with kept():
    ...     first = torch.rand(2)
    >>> torch.equal(first, torch.rand(2))
    True
    """
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), numpy.random.get_state(legacy=False) if numpy else None
    with torch.random.fork_rng(devices=[*(_in_use() if devices is None else devices)]):
        try:
            yield
        finally:
            random.setstate(of_python)
            if numpy and of_numpy:
                numpy.random.set_state(of_numpy)


@contextmanager
def seeded(seed: int, devices: Iterable[int] | None = None) -> Iterator[None]:
    """Inside, all of them begin at a seed; NumPy's where the program has imported it.

    Args:
        seed: of 63 bits at most.
        devices: CUDA devices whose generators are as they were afterwards, and then all devices are seeded; None leaves
            all but the CPU's alone.

    >>> before = torch.get_rng_state()
    >>> with seeded(1):
    ...     first = torch.rand(2)
    >>> with seeded(1):
    ...     second = torch.rand(2)
    >>> torch.equal(first, second), torch.equal(torch.get_rng_state(), before)
    (True, True)
    """
    numpy = sys.modules.get("numpy")
    with kept(devices or ()):
        (torch.default_generator.manual_seed if devices is None else torch.manual_seed)(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        yield


def _in_use() -> Iterable[int]:
    """CUDA's devices, if the program has used one."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]  # torch's
