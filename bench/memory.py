"""Peak memory by exact count, as torch's own allocators record it."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(f: Callable[[], object]) -> int:
    """The most bytes of the CPU's allocator that were held at one time during a call, beyond the fewest before that.

    Beyond the fewest, and not beyond what was held at the start: a loop that lets the gradients of the step before go
    as its first act held them all along, and they are part of its peak.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        f()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    held = fewest = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        fewest = min(fewest, held)
        peak = max(peak, held - fewest)
    return peak


def peak_of(step: Callable[[], object], device: torch.device) -> dict[str, int | str]:
    """The peak of one step: on the CPU beyond what it began with, on CUDA all that was allocated, parameters included.

    And what the process has reserved on CUDA: a CUDA graph replays in memory that its recording reserved, and allocates
    nothing, so that for it the latter counts.
    """
    if device.type != "cuda":
        return {"bytes": peak_bytes(step), "by": "torch's profiler"}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return {
        "bytes": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "by": "torch.cuda.max_memory_allocated",
    }
