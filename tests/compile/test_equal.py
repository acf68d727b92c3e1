"""Compiled steps equal plain PyTorch on awkward modules: displacement, buffers, metrics; sizes that change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import funcfreeze as ff
from recipe_run import assert_same_displacement, recipe_run, step_run

GRAPH = {"backend": "aot_eager"}
INDUCTOR = {"options": {"fallback_random": True}}  # the random numbers of eager torch


class Net(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.cls, self.dom = encoder, nn.Linear(8, 3), nn.Linear(8, 2)


def losses(model, batch):
    x, label, domain = batch
    h = model.encoder(x)
    logits = model.cls(h)
    values = {"cls": F.cross_entropy(logits, label), "dom": F.cross_entropy(model.dom(h), domain)}
    return values, {"accuracy": (logits.argmax(1) == label).double().mean(), "weight": model.cls.weight, "three": 3}


ROUTES = {"cls": ["encoder", "cls"], "dom": {"dom": 1.0, "encoder": -0.1}}
WEIGHTS = {"cls": {"encoder": 1.0, "cls": 1.0}, "dom": {"dom": 1.0, "encoder": -0.1}}


def batches(*sizes):
    return [(torch.randn(n, 8), torch.randint(3, (n,)), torch.randint(2, (n,))) for n in sizes]


class OldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * x.cos()


class Calls(nn.Module):
    """A linear layer, and any function of what it gives."""

    def __init__(self, f, width=8):
        super().__init__()
        self.linear, self.f = nn.Linear(8, width), f

    def forward(self, x):
        return self.f(self.linear(x))


class PlainTensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), torch.rand(8)

    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.scale


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = kind(4, 8, batch_first=True)

    def forward(self, x):
        return self.inner(x.unflatten(1, (2, 4)))[0][:, -1]


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 8)

    def forward(self, x):
        h = F.relu(self.norm(self.convolution(x.view(-1, 1, 2, 4))), inplace=True)
        return self.out(h.mean((2, 3)))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def attention(x):
    q, k, v = x[None, None].chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v)[0, 0]


def clamped(h):
    h = h * 1.0
    h.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    return h


ENCODERS = {
    "linear": lambda: nn.Linear(8, 8),
    "plain tensor attribute": PlainTensor,
    "dropout": lambda: Calls(nn.Dropout(0.5)),
    "in place": lambda: Calls(nn.ReLU(inplace=True)),
    "convolutions and BatchNorm": Convolutions,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "attention": lambda: Calls(attention, 24),
    "old Function": lambda: Calls(lambda h: OldFunction.apply(h)),
    "hook": lambda: Calls(clamped),
    "mask": lambda: Calls(lambda h: h * h[h > 0].mean()),
    "item": lambda: Calls(lambda h: h * h.sum().item()),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "compiled part": lambda: torch.compile(nn.Linear(8, 8), backend="aot_eager"),
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(0, (2, -1)), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(0, 1)
    ),
}


APART = {
    "plain tensor attribute",
    "dropout",
    "LSTM",
    "GRU",
    "old Function",
    "hook",
    "mask",
    "weight_norm",
    "transformer",
}
"""In CI alone. A plain run has them in `Everything`, compiled once, where LSTM stands for GRU; and attention above."""


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


@pytest.mark.parametrize(
    "encoder", [pytest.param(name, marks=[pytest.mark.slow] * (name in APART)) for name in ENCODERS]
)
def test_a_graph_equals_plain_pytorch(encoder):
    model, given = Net(ENCODERS[encoder]()), batches(6, 6, 8, 10)
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1, momentum=0.9), compile=GRAPH)
    start = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    wanted, returned = recipe_run(model, losses, WEIGHTS, given, sgd)
    state, metrics = step_run(step, given)
    assert_same_displacement(state, start, wanted)
    assert step.traces <= 2  # sizes 6, 6, then any
    assert int(state.step) == 4
    for found, seen in zip(returned, metrics, strict=True):
        for name, value in found.items():
            torch.testing.assert_close(seen[name], value)
        assert seen["three"] == 3
        assert seen["weight"].data_ptr() != state.params["cls.weight"].data_ptr()


def test_checkpointing_in_a_module_uses_the_states_parameters_not_the_modules():
    """In the backward parts of the module run again, when a step used to have put its own tensors back."""
    model, given = Net(Checkpointed()), batches(6, 6, 6)
    plain = Net(model.encoder.inner)
    start = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}

    def sgd_of(parameters):
        return torch.optim.SGD(parameters, 0.5)

    plain.cls, plain.dom = model.cls, model.dom
    wanted, _ = recipe_run(plain, losses, WEIGHTS, given, sgd_of)
    for options in ({"compile": GRAPH}, {"engine": "routed"}, {"engine": "toggle"}):
        state, _ = step_run(ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.5), **options), given)
        for path, parameter in wanted.named_parameters():
            here = path.replace("encoder.", "encoder.inner.")
            torch.testing.assert_close(state.params[here] - start[here], parameter - start[here], rtol=1e-9, atol=1e-12)
        for path, buffer in wanted.named_buffers():  # updated once, though the forward runs more than once
            torch.testing.assert_close(state.buffers[path.replace("encoder.", "encoder.inner.")], buffer)


class Everything(nn.Module):
    """Much of the above in one model, so that it is compiled once."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(
            PlainTensor(),
            Recurrent(nn.LSTM),
            Calls(nn.Dropout(0.5)),
            Calls(lambda h: OldFunction.apply(h)),
            Calls(clamped),
            nn.BatchNorm1d(8),
            parametrizations.weight_norm(nn.Linear(8, 8)),
        )

    def forward(self, x):
        h = self.parts(x)
        return h * h[h > 0].mean()


OLD = pytest.mark.xfail(torch.__version__ < "2.13", reason="Dynamo lost a dynamic size in a hook before torch 2.13")


@pytest.mark.parametrize(
    ("make", "compile", "sizes", "traces"),
    [
        pytest.param(PlainTensor, INDUCTOR, (6, 6, 8, 10), 2, id="a tensor"),
        pytest.param(Everything, GRAPH, (6, 6, 6), 1, id="everything of one size"),
        pytest.param(
            Everything, {**INDUCTOR, "dynamic": True}, (6, 6, 8, 10), 1, marks=[OLD, pytest.mark.slow], id="everything"
        ),
    ],
)
def test_adam_compiled_equals_plain_pytorch(make, compile, sizes, traces):
    model, given = Net(make()), batches(*sizes)
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adam(1e-2), compile=compile)
    start = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    wanted, _ = recipe_run(model, losses, WEIGHTS, given, lambda parameters: torch.optim.Adam(parameters, 1e-2))
    state, _ = step_run(step, given)
    assert_same_displacement(state, start, wanted, rtol=1e-6)  # Adam divides by the root of tiny squares
    assert step.traces == traces


OPTIMIZERS = {
    "sgd": (lambda: ff.optim.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "nesterov": (
        lambda: ff.optim.sgd(0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    ),
    "dampening": (
        lambda: ff.optim.sgd(0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    ),
    "amsgrad": (
        lambda: ff.optim.adamw(1e-2, amsgrad=True, maximize=True),
        lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True, maximize=True),
    ),
    "rmsprop": (
        lambda: ff.optim.rmsprop(1e-2, momentum=0.9, centered=True),
        lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, centered=True),
    ),
    "from_torch": (
        lambda: ff.optim.from_torch(torch.optim.RMSprop, lr=1e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer):
    ours, torchs = OPTIMIZERS[optimizer]
    model = Net(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    given = batches(6, 6, 6)
    start = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    wanted, _ = recipe_run(model, losses, WEIGHTS, given, torchs)
    state, _ = step_run(ff.Step(model, losses, ROUTES, optimizer=ours(), compile=GRAPH), given)
    assert_same_displacement(state, start, wanted)


class AgainInTheBackward(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("wrapped", [lambda inner: inner, AgainInTheBackward], ids=["plain", "checkpointed"])
def test_onednns_lstm_makes_place_for_torchs(wrapped):
    """In float32 torch has one of oneDNN on the CPU, which cannot be traced; in float64 there is none."""
    given = [(x.float(), label, domain) for x, label, domain in batches(6, 6)]
    model = Net(wrapped(Recurrent(nn.LSTM))).float()
    start = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    wanted, _ = recipe_run(model, losses, WEIGHTS, given, sgd)
    state, _ = step_run(ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1, momentum=0.9), compile=GRAPH), given)
    assert_same_displacement(state, start, wanted, rtol=1e-3)


class Swaps(torch.autograd.Function):
    """Returns parameters themselves as each other's gradients."""

    @staticmethod
    def forward(ctx, *params):
        ctx.save_for_backward(*params)
        return sum(param.sum() for param in params)

    @staticmethod
    def backward(ctx, cotangent):
        first, *rest = ctx.saved_tensors
        return *rest, first


@pytest.mark.parametrize("compile", [GRAPH, False])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: ff.optim.sgd(0.5),
        lambda: ff.optim.partition({"0": ff.optim.sgd(0.5), ff.path("*") - "0": ff.optim.sgd(0.5)}),
    ],
    ids=["sgd", "partition"],
)
def test_gradients_that_are_parameters(optimizer, compile):
    """More of them than one kernel takes, and parts of an optimizer that are written one after the other."""
    module = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(40)])
    start = [param.detach().clone() for param in module]
    step = ff.Step(
        module, lambda model, batch: {"a": Swaps.apply(*model)}, {"a": "*"}, optimizer=optimizer(), compile=compile
    )
    state, _ = step(step.init(), None)
    for index, param in enumerate(start):
        wanted = param - 0.5 * start[(index + 1) % len(start)]
        torch.testing.assert_close(state.params[str(index)], wanted, rtol=1e-12, atol=1e-12)


def test_optimizers_in_combination_equal_eager_steps():
    model, given = Net(nn.Sequential(*[nn.Linear(8, 8) for _ in range(9)])), batches(6, 6, 6)
    schedule = ff.optim.linear_schedule(0.01, 0.1, 3)

    def optimizer():
        clipped = ff.optim.clip_by_global_norm(0.1)
        return ff.optim.chain(
            clipped, ff.optim.partition({"encoder": ff.optim.adam(schedule), ff.path("cls") | "dom": ff.optim.sgd(0.1)})
        )

    runs = [
        step_run(ff.Step(model, losses, ROUTES, optimizer=optimizer(), compile=compile), given)[0]
        for compile in (GRAPH, False)
    ]
    for path, parameter in runs[1].params.items():
        torch.testing.assert_close(runs[0].params[path], parameter)


def test_mixed_precision():
    model = Net(nn.Linear(8, 8)).float()
    given = [(x.float(), label, domain) for x, label, domain in batches(6, 6, 6)]

    def under_autocast(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return losses(model, batch)[0]

    runs = [
        step_run(ff.Step(model, under_autocast, ROUTES, optimizer=ff.optim.sgd(0.1), compile=compile), given)[0]
        for compile in (GRAPH, False)
    ]
    for path, parameter in runs[1].params.items():
        torch.testing.assert_close(runs[0].params[path], parameter, rtol=4e-3, atol=1e-3)


def test_a_loss_scale():
    """The scale grows, an infinite step is skipped, and an absent loss changes neither: as in eager steps."""
    model = Net(nn.Linear(8, 8))
    given = [(*batch, present) for batch, present in zip(batches(6, 6, 6, 6), (True, False, True, True), strict=True)]
    given[2][0].fill_(float("inf"))

    def some(model, batch):
        *batch, present = batch
        values = losses(model, batch)[0]
        return {"cls": values["cls"], "dom": values["dom"] if present else None}

    runs = [
        step_run(
            ff.Step(
                model,
                some,
                ROUTES,
                optimizer=ff.optim.adam(1e-2),
                compile=compile,
                loss_scale=ff.LossScale(8.0, growth_interval=2),
            ),
            given,
        )[0]
        for compile in (GRAPH, False)
    ]
    assert float(runs[0].optimizer["loss_scale"]["scale"]) == float(runs[1].optimizer["loss_scale"]["scale"]) != 8.0 * 4
    for path, parameter in runs[1].params.items():
        assert parameter.isfinite().all()
        torch.testing.assert_close(runs[0].params[path], parameter)
