"""The mode in which waiting for a CUDA device is an error does not outlive its test; torch's part is played here."""

from __future__ import annotations

import warnings

import pytest
import torch

from waiting import waiting_is_an_error

MODES = {"default": 0, "warn": 1, "error": 2}


@pytest.fixture
def modes(monkeypatch):
    """Every mode that was set, the first from before. Like torch it warns, of a prototype, after setting it."""
    modes = [MODES["warn"]]

    def set_mode(mode):
        modes.append(MODES.get(mode, mode))
        if len(modes) == 2:
            warnings.warn("a prototype", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return modes


@pytest.mark.filterwarnings("ignore:a prototype")
def test_it_is_as_it_was_after_a_test_that_passes_and_one_that_fails(modes):
    with waiting_is_an_error():
        assert modes == [1, 2]
    with pytest.raises(ZeroDivisionError), waiting_is_an_error():
        raise ZeroDivisionError
    assert modes == [1, 2, 1, 2, 1]


def test_it_is_as_it_was_where_the_warning_is_an_error(modes):
    with pytest.raises(UserWarning, match="a prototype"), waiting_is_an_error():
        pytest.fail("must not be entered")
    assert modes == [1, 2, 1]


@pytest.mark.parametrize(
    "text",
    [
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
        "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider",
        "\nOnline softmax is disabled on the fly since Inductor decides to\nsplit the reduction. Cut an issue",
    ],
    ids=["synchronization", "TensorFloat32", "softmax"],
)
def test_what_torch_says_on_a_cuda_device_is_no_error_here(text):
    warnings.warn(text, stacklevel=1)
    with pytest.raises(UserWarning):
        warnings.warn(f"something else: {text}", stacklevel=1)
