"""The examples that run in several processes, against the plain sum with gradient-scaling layers in the same loops."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from plain_ways import ROOT, SLOW

PROGRAM = pathlib.Path(__file__).parent / "on_ranks.py"
pytestmark = [SLOW, pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")]


def found_on_ranks(name, folder):
    paths = [ROOT, ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    running = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), "2", str(folder / "meet"), name],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(*process.communicate(timeout=300), process.returncode) for process in running]
    for out, errors, code in ended:
        assert code == 0, out + errors
    return [json.loads(out.splitlines()[-1]) for out, _, _ in ended]


def test_ddp(tmp_path):
    pytest.importorskip("sklearn")
    for found in found_on_ranks("ddp", tmp_path):
        assert found["distance"] < 1e-10
        assert found["from the sum"] > 1e-4


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed(tmp_path):
    for found in found_on_ranks("deepspeed", tmp_path):
        assert found["distance"] < 1e-6
        assert found["from the sum"] > 1e-4
