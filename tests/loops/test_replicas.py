"""`ff.combine` under DistributedDataParallel, on ranks of its own; what runs there is in `ranks.py`."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

PROGRAM = pathlib.Path(__file__).parent / "ranks.py"
OTHERS = (
    *((mode, 2, "Branches") for mode in ("plain", "static", "static find")),
    *((mode, 2, kind) for mode in ("plain", "find", "static find") for kind in ("Vision", "Language")),
    *(("find", 4, kind) for kind in ("Branches", "Vision", "Language")),
)


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def with_this_project():
    paths = [str(PROGRAM.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_outputs_beside_the_combined_loss_and_wrappers_that_come_and_go(tmp_path):
    command = [sys.executable, str(PROGRAM.parent / "wrapped.py"), str(tmp_path / "meet")]
    run = subprocess.run(command, env=with_this_project(), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert max(found["worst"]) < 1e-14
    assert found["refused"] == [True, True, True]


@pytest.mark.parametrize(
    ("mode", "ranks", "model"),
    [("find", 2, "Branches"), *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)],
)
def test_as_one_process_that_sees_all_shares(mode, ranks, model, tmp_path):
    command = [sys.executable, str(PROGRAM), str(ranks), str(tmp_path), mode, model]
    run = subprocess.run(command, env=with_this_project(), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    for rank in range(ranks):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["worst"] < 1e-10
        assert set(found["sent"]) == {found["of one gradient"]}  # whatever the number of losses
        still = {"reached.weight", "reached.bias"} | ({"unused.weight", "unused.bias"} if "find" in mode else set())
        assert {name for name, moved in found["moved"].items() if not moved} == still
        assert found["unknown"].startswith(
            "head.weight, head.bias: DistributedDataParallel is around other parts of the"
        )
        assert "every rank would go on with its own. Use ff.combine(" in found["refused"]
