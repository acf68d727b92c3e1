"""What a contender costs in a process of its own, with cold caches: time to the first step, and peak memory.

`python -m bench.alone WORKLOAD PEER DEVICE SCALE MEASURE...` prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench import workloads
from bench.contender import Absent, Contender
from bench.machine import settle
from bench.memory import peak_of
from bench.peers import PEERS

MEASURES = ("first-step", "memory")


def in_fresh_process(
    workload: str, peer: str, device: str, scale: str, measures: Sequence[str], limit: float = 1800.0
) -> dict[str, Any]:
    """The measures, taken in a subprocess whose compilers find nothing that was compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        return with_caches(folder, workload, peer, device, scale, measures, limit)


def with_caches(
    folder: str, workload: str, peer: str, device: str, scale: str, measures: Sequence[str], limit: float = 1800.0
) -> dict[str, Any]:
    """The measures, taken in a subprocess whose compilers keep what they make in a folder."""
    command = [sys.executable, "-m", "bench.alone", workload, peer, device, scale, *measures]
    caches = {name: os.path.join(folder, name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= caches
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {measure: {"failed": f"not done after {limit:.0f} s"} for measure in measures}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {measure: {"failed": last} for measure in measures}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(workload: str, peer: str, device: str, scale: str, measures: Sequence[str]) -> dict[str, Any]:
    """The measures, taken here. Imports and the model are not part of the time; what the first step builds is."""
    settle()
    place, made = torch.device(device), workloads.make(workload, scale)
    for name in () if PEERS[peer].missing else PEERS[peer].requires:
        importlib.import_module(name)
    torch.optim.Adam([torch.zeros(1, device=place)])  # imports Dynamo, and wakes the device
    start, worked = time.perf_counter(), _cpu_seconds()
    contender = PEERS[peer].build(made, place)
    if isinstance(contender, Absent):
        return {name: contender.to_dict() for name in measures}
    contender()
    first, worked = time.perf_counter(), _cpu_seconds() - worked
    contender()
    second = time.perf_counter()
    found: dict[str, Any] = {
        "first-step": {
            "seconds": first - start,
            "cpu seconds": worked,
            "second step": second - first,
            "graphs from a cache": torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"],
            "graphs made": torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"],
        }
    }
    if "memory" in measures:
        contender()  # recordings and caches that grow at the second step are there now
        found["memory"] = memory(contender, place)
    return {name: found[name] for name in measures}


def _cpu_seconds() -> float:
    """Of this process and of the compilers that it called."""
    spent = os.times()
    return time.process_time() + spent.children_user + spent.children_system  # the first is finer than a clock tick


def memory(contender: Contender, device: torch.device) -> Any:
    """By the contender's own account if torch's allocators do not see what it allocates."""
    own = contender.measured.get("memory")
    return peak_of(contender, device) if own is None else own()


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:5], sys.argv[5:])))
