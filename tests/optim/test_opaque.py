"""In-place forms where tensors only stand for others, as compilers trace, on every torch."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from funcfreeze.optim import adam, adamw, from_torch, rmsprop, sgd


def stand_ins(count):
    return {f"w{index}": torch.randn(2, 3) for index in range(count)}


@pytest.mark.parametrize("count", [1, 17])
@pytest.mark.parametrize("rate", [0.1, "a tensor"])
@pytest.mark.parametrize(
    "make",
    [
        sgd,
        lambda lr: sgd(lr, momentum=0.9, dampening=0.5),
        adam,
        lambda lr: adam(lr, amsgrad=True),
        adamw,
        rmsprop,
        lambda lr: rmsprop(lr, momentum=0.9, centered=True),
    ],
    ids=["sgd", "dampened", "adam", "amsgrad", "adamw", "rmsprop", "centered"],
)
def test_in_place_forms_run_on_stand_ins(make, rate, count):
    with FakeTensorMode():
        transform = make(torch.tensor(0.1) if rate == "a tensor" else rate)
        params, grads = stand_ins(count), stand_ins(count)
        state = transform.in_place(grads, transform.init(params), params)()
    assert set(state) == set(params)
    for path, entry in state.items():
        for slot, kept in entry.items():
            assert kept.shape == (() if slot == "step" else params[path].shape)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_torchs_own_fused_optimizers_cannot_be_traced_and_say_so(optimizer):
    transform = from_torch(optimizer, lr=0.1, fused=True)
    said = rf"from_torch\({optimizer.__name__}\): fused=True in what is compiled; .*Leave it out, or use ff.optim.sgd, "
    with FakeTensorMode():
        params, grads = stand_ins(2), stand_ins(2)
        for form in (transform.update, transform.in_place):
            with pytest.raises(ValueError, match=said):
                form(grads, transform.init(params), params)
    assert transform.update(stand_ins(2), transform.init(params), stand_ins(2))  # eagerly they are welcome
