"""Autograd's modes, as a step wants them whatever is around it."""

from __future__ import annotations

import torch


class grad_mode:  # a function by its use: `with grad_mode(True):`
    """Grad mode on or off inside the block, and inference mode off; a few hundred nanoseconds where it was off before.

    >>> with torch.inference_mode(), grad_mode(True):
    ...     torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    (True, False)
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        """Set the modes."""
        self.inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
        if self.inference is not None:
            self.inference.__enter__()
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(self.enabled)

    def __exit__(self, *error: object) -> None:
        """Set them back."""
        torch.set_grad_enabled(self.before)
        if self.inference is not None:
            self.inference.__exit__(None, None, None)
