"""The second process does not compile again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import funcfreeze as ff

path, first = sys.argv[1], sys.argv[2] == "first"
if not first:
    with open(path, "rb") as file:
        torch.compiler.load_cache_artifacts(file.read())
torch.manual_seed(0)
step = ff.Step(
    nn.Linear(2, 1),
    lambda model, x: {"a": model(x).sum()},
    {"a": ff.Route("*", weight=ff.optim.dann_schedule(10))},
    optimizer=ff.optim.sgd(0.1),
    compile=True,
)
state, metrics = step(step.init(), torch.ones(3, 2))
if first:
    with open(path, "wb") as file:
        file.write(torch.compiler.save_cache_artifacts()[0])
print(counters["aot_autograd"]["autograd_cache_hit"], float(metrics["a"]), float(state.params["weight"].sum()))
"""


def started(path, cache, which):
    quick = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    environment = {**os.environ, **quick, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", PROGRAM, str(path), which]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.slow
def test_another_process_takes_the_compiled_step_from_saved_artifacts(tmp_path):
    path = tmp_path / "artifacts"
    misses, *wanted = started(path, tmp_path / "one", "first")
    hits, *found = started(path, tmp_path / "two", "second")
    assert (misses, hits) == ("0", "1")
    assert found == wanted
