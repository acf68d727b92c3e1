"""Peak memory by exact count, as torch's own allocators record it."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(f: Callable[[], object]) -> int:
    """The most bytes of the CPU's allocator that were held at one time during a call, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        f()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def peak_of(step: Callable[[], object], device: torch.device) -> dict[str, int | str]:
    """The peak of one step. On CUDA also what the process reserved for itself so far.

    A CUDA graph replays in memory that its recording reserved, and allocates nothing: for it the latter counts.
    """
    if device.type != "cuda":
        return {"bytes": peak_bytes(step), "by": "torch's profiler"}
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return {
        "bytes": torch.cuda.max_memory_allocated(device) - before,
        "reserved": torch.cuda.memory_reserved(device),
        "by": "torch.cuda.max_memory_allocated",
    }
