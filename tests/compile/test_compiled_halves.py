"""The halves of a compiled step: graphs of their own, and the same numbers."""

from __future__ import annotations

import itertools

import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff

GRAPH = {"backend": "aot_eager"}
ROUTES = {"task": "*", "small": {"encoder": -0.1}}
OPTIMIZERS = {
    "scheduled": ff.optim.adamw(ff.optim.linear_schedule(1e-2, 0.0, 10)),
    "clipped": ff.optim.chain(ff.optim.clip_by_global_norm(0.1), ff.optim.sgd(1e-2, momentum=0.9)),
    "parts": ff.optim.partition({"encoder": ff.optim.adam(1e-2), "head": ff.optim.sgd(lambda step: 0.1 / (step + 1))}),
}


def network():
    encoder = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh())
    return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(6, 2)})


def losses(model, batch):
    x, is_small_alone = batch
    h = model["encoder"](x)
    task = None if is_small_alone else model["head"](h).square().mean()
    return {"task": task, "small": h.abs().mean()}, {"mean": h.mean(0)}


OPTIONS = {"plain": {}, "kept": {"donate": False}, "scaled": {"loss_scale": ff.LossScale(8.0)}}
SOME = {("scheduled", "plain"), ("clipped", "kept"), ("parts", "scaled")}
"""Each optimizer and each option once; all pairs in CI."""


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in SOME))
        for pair in itertools.product(OPTIMIZERS, OPTIONS)
    ],
)
def test_they_are_the_step_and_the_eager_halves(optimizer, options):
    model, given = network(), {"optimizer": OPTIMIZERS[optimizer], **OPTIONS[options]}
    compiled = ff.Step(model, losses, ROUTES, compile=GRAPH, **given)
    eager = ff.Step(model, losses, ROUTES, **given)
    whole, halved, expected = compiled.init(), compiled.init(), eager.init()
    for turn in range(6):
        batch = torch.randn(6, 4), turn in (2, 4)
        whole, metrics = compiled(whole, batch)
        half = compiled.compute(halved, batch)
        kept = [tensor.clone() for tensor in optree.tree_leaves((half.gradients, half.buffers))]
        halved, others = compiled.apply_gradients(halved, half)
        assert all(map(torch.equal, kept, optree.tree_leaves((half.gradients, half.buffers))))
        plain = eager.compute(expected, batch)
        expected, _ = eager.apply_gradients(expected, plain)
        assert half.gradients.keys() == plain.gradients.keys()
        assert half.losses.keys() == plain.losses.keys()
        assert metrics.keys() == others.keys()
        for one, other in ((whole, halved), (expected, halved)):
            for a, b in zip(optree.tree_leaves(one), optree.tree_leaves(other), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert compiled.traces == 2 + 2 + 2  # with and without the loss: steps, first halves, updates


def test_nothing_is_traced_for_a_half_that_is_not_used():
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.adam(1e-2), compile=GRAPH)
    state = step.init()
    half = step.compute(state, (torch.randn(6, 4), False))
    assert step.traces == 1
    for _ in range(3):
        state, _ = step.apply_gradients(state, half.replace(gradients={"head.bias": torch.ones(2)}))
    assert step.traces == 2


def test_an_update_that_fails_changes_nothing():
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.adam(1e-2), compile=GRAPH)
    state = step.init()
    half = step.compute(state, (torch.randn(6, 4), False))
    before = [leaf.clone() for leaf in optree.tree_leaves(state)]
    with pytest.raises(ValueError, match=r"gradients\['head.bias'\]: the gradient has shape \(3,\)"):
        step.apply_gradients(state, half.replace(gradients={"head.bias": torch.ones(3)}))
    assert all(map(torch.equal, before, optree.tree_leaves(state)))
    state, _ = step.apply_gradients(state, half)


def test_a_rate_in_a_tensor_and_a_function_of_the_step_are_read_at_every_update():
    rate = torch.tensor(0.5)
    for lr in (rate, lambda step: 0.5 if int(step) == 0 else 0.25):
        rate.fill_(0.5)
        step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.sgd(lr), compile=GRAPH)
        state = step.init()
        half = step.compute(state, (torch.randn(6, 4), False))
        half = half.replace(gradients={"head.bias": torch.ones(2)})
        moved = []
        for _ in range(2):
            start = state.params["head.bias"].clone()
            state, _ = step.apply_gradients(state, half)
            moved.append(float((start - state.params["head.bias"])[0]))
            rate.fill_(0.25)
        assert moved == pytest.approx([0.5, 0.25])


@pytest.mark.gpu
def test_on_a_gpu_with_cuda_graphs():
    model = network().cuda().float()
    compiled = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adam(1e-2), compile={"mode": "reduce-overhead"})
    eager = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adam(1e-2), compile=False)
    one, other = compiled.init(), eager.init()
    for _ in range(4):
        batch = torch.randn(6, 4, device="cuda", dtype=torch.float32), False
        one, _ = compiled.apply_gradients(one, compiled.compute(one, batch))
        other, _ = eager.apply_gradients(other, eager.compute(other, batch))
    for a, b in zip(optree.tree_leaves(one.params), optree.tree_leaves(other.params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sparse_gradients_are_for_whole_steps():
    model = nn.ModuleDict({"table": nn.Embedding(5, 3, sparse=True)})

    def look_up(model, batch):
        return {"l": model["table"](batch).square().mean()}

    step = ff.Step(model, look_up, {"l": "*"}, optimizer=ff.optim.sgd(0.1), compile=GRAPH)
    state, _ = step(step.init(), torch.tensor([1, 2]))
    text = "table.weight: the gradient is sparse, which the halves of a compiled step neither give nor take"
    with pytest.raises(ValueError, match=text):
        step.compute(state, torch.tensor([1, 2]))
    eager = ff.Step(model, look_up, {"l": "*"}, optimizer=ff.optim.sgd(0.1))
    half = eager.compute(state, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=text):
        step.apply_gradients(state, half)
    state, _ = step(state, torch.tensor([1, 2]))
