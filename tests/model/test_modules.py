"""Modules that make functional training awkward: each is compared with its own eager self, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import funcfreeze as ff
from laws import assert_step_law


class Trunk(nn.Module):
    """Any trunk with two heads, of which the second is an adversary."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.cls, self.adv = trunk, nn.Linear(width, 3), nn.Linear(width, 2)


ROUTES = {"cls": ["trunk", "cls"], "adv": {"adv": 1.0, "trunk": -0.1}}


def heads(model, batch):
    h = model.trunk(batch)
    h = h[0] if isinstance(h, tuple) else h
    h = h.flatten(1)
    return {
        "cls": F.cross_entropy(model.cls(h), torch.arange(len(h)) % 3),
        "adv": F.cross_entropy(model.adv(h), torch.arange(len(h)) % 2),
    }


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x):
        packed = pack_padded_sequence(x, torch.tensor([3] * len(x)), batch_first=True)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Reassigned(nn.Module):
    """Reassigns one buffer, from a tensor with a graph, and updates another in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        h = self.linear(x)
        self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
        self.calls += 1
        return h - self.mean


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.3),
        nn.Conv2d(4, 2, 2),
    )


ZOO = {
    "convolutions": (convolutions, lambda: torch.randn(6, 2, 8, 8), 8),
    "lstm": (lambda: nn.LSTM(4, 5, num_layers=2, batch_first=True, dropout=0.1), lambda: torch.randn(6, 3, 4), 15),
    "gru": (lambda: nn.GRU(4, 5, batch_first=True, bidirectional=True), lambda: torch.randn(6, 3, 4), 30),
    "packed lstm": (Packed, lambda: torch.randn(6, 3, 4), 15),
    "attention": (Attention, lambda: torch.randn(6, 3, 4), 12),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
        lambda: torch.randn(6, 3, 4),
        12,
    ),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 5)), lambda: torch.randn(6, 4), 5),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 5)), lambda: torch.randn(6, 4), 5),
    "reassigned buffers": (Reassigned, lambda: torch.randn(6, 4), 4),
}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("engine", ["routed", "toggle"])
def test_zoo(name, engine):
    make, batch, width = ZOO[name]
    assert_step_law(Trunk(make(), width), heads, ROUTES, batch(), engine=engine)


@pytest.mark.parametrize("name", ["convolutions", "gru", "attention", "spectral norm", "reassigned buffers"])
def test_zoo_in_torch_func(name):
    make, batch, width = ZOO[name]
    assert_step_law(Trunk(make(), width), heads, ROUTES, batch(), engine="reference")


def test_the_reference_is_the_recipe_bit_for_bit():
    model = Trunk(convolutions(), 8)
    routes = {"cls": ["trunk", "cls"], "adv": ["trunk", "adv"]}
    batch, found = torch.randn(6, 2, 8, 8), {}
    for engine in ("reference", "toggle"):
        step = ff.Step(model, heads, routes, optimizer=ff.optim.sgd(0.1), engine=engine)
        torch.manual_seed(3)
        found[engine] = step.gradients(step.init(), batch)
    assert found["reference"].keys() == found["toggle"].keys()
    assert all(torch.equal(found["reference"][path], gradient) for path, gradient in found["toggle"].items())


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    def losses(model, batch):
        h = torch.tanh(model.body(model.embed(batch)))
        return {"lm": F.cross_entropy(model.head(h), batch), "small": h.square().mean()}

    model, batch = Tied(), torch.arange(6)
    by_one = assert_step_law(model, losses, {"lm": ["embed", "body"], "small": "body"}, batch)
    by_other = assert_step_law(model, losses, {"lm": ["head", "body"], "small": "body"}, batch)
    assert by_one.keys() == by_other.keys() == {"embed.weight", "body.weight", "body.bias"}
    step = ff.Step(model, losses, {"lm": "*", "small": "body"}, optimizer=ff.optim.sgd(0.1))
    assert step.plan.rows[0].names == ("embed.weight", "head.weight")
    state, _ = step(step.init(), batch)
    step.export(state)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, state.params["embed.weight"])


def test_one_dropout_mask_for_all_losses():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))

    def losses(m, batch):
        h = m(batch)
        return {"a": h.sum(), "b": -h.sum()}

    for engine in ("routed", "reference", "toggle"):
        step = ff.Step(model, losses, {"a": "*", "b": "*"}, optimizer=ff.optim.sgd(0.1), engine=engine)
        gradients = step.gradients(step.init(), torch.randn(3, 4))
        assert all(float(gradient.abs().max()) < 1e-12 for gradient in gradients.values()), engine


def test_a_parameters_own_hooks_run_on_its_gradient():
    model = nn.Linear(3, 2)
    model.weight.register_hook(lambda g: g * torch.tensor([[1.0], [0.0]]))  # freezes the second row
    losses = lambda m, batch: {"a": m(batch).square().sum(), "b": m(batch).sum()}  # noqa: E731
    for engine in ("routed", "toggle"):
        step = ff.Step(model, losses, {"a": "*", "b": "weight"}, optimizer=ff.optim.sgd(0.1), engine=engine)
        gradients = step.gradients(step.init(), torch.randn(4, 3))
        assert gradients["weight"][0].abs().min() > 0
        assert gradients["weight"][1].abs().max() == 0


def test_full_backward_hooks_of_modules():
    model = Trunk(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5)), 5)
    seen = []
    model.trunk[1].register_full_backward_hook(lambda m, gi, go: seen.append(float(go[0].sum())))
    assert_step_law(model, heads, ROUTES, torch.randn(6, 4))
    seen.clear()
    step = ff.Step(model, heads, ROUTES, optimizer=ff.optim.sgd(0.1))
    step.gradients(step.init(), torch.randn(6, 4))
    assert len(seen) == 2  # once for every loss
