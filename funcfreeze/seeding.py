"""The global random number generators of Python, NumPy and torch at a seed for a while, and as they were afterwards."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


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
    of_python, of_numpy = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[*(devices or ())]):
        (torch.default_generator.manual_seed if devices is None else torch.manual_seed)(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(of_python)
            if numpy:
                numpy.random.set_state(of_numpy)
