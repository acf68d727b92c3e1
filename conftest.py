"""What holds for every test and doctest: one seed, one thread for each worker, and whose deprecations count."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator

import pytest
import torch

from deprecations import ours_only

SEED = "FUNCFREEZE_TEST_SEED"
os.environ.setdefault(SEED, str(random.SystemRandom().randrange(2**31)))  # workers inherit it: one seed for all

if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many as there are cores; what they start inherits it too
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

with warnings.catch_warnings(action="ignore"):  # what torch 2.11 says once in a process, also to those who opt out
    torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (1,), check_invariants=False)


def pytest_report_header() -> str:
    return f"{SEED}={os.environ[SEED]}  torch {torch.__version__}, {torch.get_num_threads()} threads"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.keys() & {"failed", "error"}:
        terminalreporter.write_line(f"the same numbers again: {SEED}={os.environ[SEED]} pytest ...", bold=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    with ours_only():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    with ours_only():
        return (yield)
