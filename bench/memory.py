"""Peak memory by exact count: every allocation of torch's CPU allocator, as its profiler records them."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(f: Callable[[], object]) -> int:
    """The most bytes that were allocated at one time during a call, beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
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
