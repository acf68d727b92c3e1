"""On a CUDA device: a run that is stopped goes on bit for bit, its draws on the device included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import funcfreeze as ff

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def step_of(compile, device=DEVICE):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(0.3), nn.ReLU())
    model = nn.ModuleDict({"trunk": trunk, "a": nn.Linear(64, 8), "b": nn.Linear(64, 2)}).to(device)
    routes = {"a": ["trunk", "a"], "b": {"b": 1.0, "trunk": -0.1}}
    return ff.Step(model, losses, routes, optimizer=ff.optim.adamw(1e-2), compile=compile)


def losses(model, x):
    h = model["trunk"](x)
    return {"a": model["a"](h).sin().mean(), "b": model["b"](h).square().mean()}


def trained(step, state, steps, saved_to=None):
    for count in range(steps):
        state, _ = step(state, torch.randn(16, 32, device=DEVICE))
        if saved_to is not None and count == steps - 2:
            ff.checkpoint.save(saved_to, step, state, background=True)  # and the next step overwrites the state
    return state


@pytest.mark.parametrize(
    "compile", [False, True, {"mode": "reduce-overhead"}], ids=["eager", "inductor", "CUDA graphs"]
)
def test_a_run_that_is_stopped_goes_on_as_it_would_have(compile, tmp_path):
    step = step_of(compile)
    wanted = trained(step, step.init(), 9)
    step = step_of(compile)
    trained(step, step.init(), 6, saved_to=tmp_path)
    torch.manual_seed(99)  # another process, another model
    step = step_of(compile)
    torch.manual_seed(98)
    state, _ = ff.checkpoint.resume(tmp_path, step)
    assert int(state.step) == 5
    state = trained(step, state, 4)
    for field in ("params", "buffers"):
        mine, theirs = getattr(state, field), getattr(wanted, field)
        assert all(torch.equal(mine[path], theirs[path]) for path in theirs), field


def test_on_another_device(tmp_path):
    """Saved on the device, loaded on the CPU, and back."""
    step = step_of(compile=False)
    state = trained(step, step.init(), 2)
    at = ff.checkpoint.save(tmp_path, step, state)
    on_cpu = step_of(compile=False, device="cpu")
    there, _ = ff.checkpoint.load(at, on_cpu)
    assert {tensor.device.type for tensor in there.params.values()} == {"cpu"}
    back = ff.checkpoint.load(ff.checkpoint.save(tmp_path / "cpu", on_cpu, there), step_of(compile=False))[0]
    assert all(torch.equal(back.params[path], p) for path, p in state.params.items())
    assert {tensor.device.type for tensor in back.params.values()} == {DEVICE}
