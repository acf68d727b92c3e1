"""Strict numerics: float64 unless a test says otherwise, fresh random numbers that a failure lets you repeat."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

SEED = int(os.environ["FUNCFREEZE_TEST_SEED"])

if "PYTEST_XDIST_WORKER" in os.environ:  # each has its share of the cores, or they wait for one another's threads
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture(autouse=True)
def _float64_and_fresh_numbers(request: pytest.FixtureRequest):
    torch.manual_seed(SEED + zlib.crc32(request.node.nodeid.encode()) % 1000)  # `hash` differs between processes
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    too_slow = pytest.mark.skip(reason="slow: set FUNCFREEZE_ALL_PROGRAMS=1 to run it, as CI does")
    for item in items:
        if item.get_closest_marker("slow") and "FUNCFREEZE_ALL_PROGRAMS" not in os.environ:
            item.add_marker(too_slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture
def seed() -> int:
    """A seed of this run, for tests that draw their own numbers."""
    return SEED
