"""Every framework in two processes, against the plain sum with gradient-scaling layers in the same loops."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from plain_ways import ROOT, skip_if_by_hand

PROGRAM = pathlib.Path(__file__).parent / "on_ranks.py"
NEEDED = {
    "ddp": "sklearn",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "trainer": "peft",
    "deepspeed": "deepspeed",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]


@pytest.mark.parametrize("name", NEEDED)
def test_as_the_plain_way(name, tmp_path):
    skip_if_by_hand(NEEDED[name])
    paths = [ROOT, ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launch, str(PROGRAM), name, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["distance"] < (1e-6 if name == "deepspeed" else 1e-10), "DeepSpeed computes in float32"
        assert found["from the sum"] > 1e-4
