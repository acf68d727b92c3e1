"""Tensors of a checkpoint, or of any safetensors file, in a plain module; or the module as it was."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

import funcfreeze as ff


class Odd(nn.Module):
    def __init__(self, mask=None):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2))
        self.register_buffer("mask", torch.zeros(4) if mask is None else mask)


def file_of(tmp_path, **tensors):
    safetensors.torch.save_file(tensors, tmp_path / "file")
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("mask", "given", "told"),
    [
        (torch.ones(1).expand(4), torch.ones(4), "mask: the model's is expanded, so that elements share memory"),
        (torch.zeros(4, dtype=torch.int64), torch.ones(4), "mask: the file has torch.float32, the model torch.int64"),
        (
            torch.zeros(4, dtype=torch.float16),
            torch.full((4,), 1e9),
            "numbers that are too large for the model's torch.f",
        ),
        (
            torch.zeros(4, dtype=torch.int8),
            torch.full((4,), 300),
            "numbers that are too large for the model's torch.int8",
        ),
        (torch.zeros(4, device="meta"), torch.ones(4), "mask: the model's is on the meta device"),
        (torch.zeros(5), torch.ones(4), r"mask: the file has shape \(4,\), the model \(5,\)"),
    ],
    ids=["expanded", "kind", "float16", "int8", "meta", "shape"],
)
def test_what_does_not_fit_leaves_all_as_it_was(mask, given, told, tmp_path):
    model = Odd(mask)
    with pytest.raises(ValueError, match=told):
        ff.checkpoint.load_into(model, file_of(tmp_path, a=torch.full((2,), 7.0), mask=given))
    assert torch.equal(model.a, torch.zeros(2))


def test_inference_tensors(tmp_path):
    with torch.inference_mode():
        mask = torch.zeros(4)
    model = Odd()
    model.mask = mask
    with pytest.raises(ValueError, match="mask: the model's was made in inference mode"):
        ff.checkpoint.load_into(model, file_of(tmp_path, a=torch.full((2,), 7.0), mask=torch.ones(4)))
    assert torch.equal(model.a, torch.zeros(2))


def test_narrower_numbers_are_cast(tmp_path):
    model = Odd(torch.zeros(4, dtype=torch.bfloat16))
    given = torch.tensor([1.0, float("inf"), float("nan"), 1e-50])
    ff.checkpoint.load_into(model, file_of(tmp_path, a=torch.ones(2), mask=given))
    assert str(model.mask.tolist()) == "[1.0, inf, nan, 0.0]"
    assert torch.equal(model.a, torch.ones(2))
    given = torch.tensor([0.1 + 0.2j, 3.0], dtype=torch.complex128)
    step = ff.Step(Odd(given), lambda m, x: {"l": m.a.sum()}, {"l": "*"}, optimizer=ff.optim.sgd(0.1))
    ff.checkpoint.save(tmp_path, step, step.init())
    model = ff.checkpoint.load_into(Odd(torch.zeros(2, dtype=torch.complex64)), tmp_path)
    assert torch.equal(model.mask, given.to(torch.complex64))


def test_names_of_tied_parameters(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    one, other = torch.ones(2, 2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"1.weight: tied to 0.weight in the model, the file has other numbers for it"):
        ff.checkpoint.load_into(model, file_of(tmp_path, **{"0.weight": one, "1.weight": other}))
    ff.checkpoint.load_into(model, file_of(tmp_path, **{"0.weight": one, "1.weight": one.clone()}))
    assert torch.equal(model[1].weight, one)


@pytest.mark.parametrize("name", ["a/b", "a~b", "a~0b", "a~1b", "$tensor", "größe"])
def test_odd_names(name, tmp_path):
    def model_of():
        model = nn.Linear(1, 1)
        model.register_parameter(name, nn.Parameter(torch.randn(3)))
        return model

    step = ff.Step(
        model_of(), lambda m, x: {"l": m._parameters[name].square().sum()}, {"l": "*"}, optimizer=ff.optim.sgd(0.1)
    )
    state, _ = step(step.init(), torch.ones(1))
    ff.checkpoint.save(tmp_path, step, state)
    found = ff.checkpoint.load_into(model_of(), tmp_path)
    assert torch.equal(found._parameters[name], state.params[name])
    assert torch.equal(ff.checkpoint.load(tmp_path, step)[0].params[name], state.params[name])


def test_what_is_no_such_file(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"model.pt is no safetensors file: .*What torch.save wrote is read by torch.load"
    ):
        ff.checkpoint.load_into(Odd(), tmp_path / "model.pt")
