"""On a CUDA device: what waits for it is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside of it operations that wait for the device raise. The mode is set back to what it was, whatever happens.

    What was started before is waited for first.
    """
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")  # in the try: it sets the mode also where its warning is an error
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
