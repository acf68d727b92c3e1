"""The two halves of a step, and what people do between them."""

from __future__ import annotations

import copy

import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff

ROUTES = {"task": ["encoder", "head"], "small": {"encoder": -0.1}}
OPTIMIZERS = {
    "adamw": ff.optim.adamw(1e-2),
    "clipped sgd": ff.optim.chain(ff.optim.clip_by_global_norm(0.1), ff.optim.sgd(1e-2, momentum=0.9)),
    "scheduled": ff.optim.sgd(ff.optim.linear_schedule(0.1, 0.0, 5)),
    "from_torch": ff.optim.from_torch(torch.optim.Adagrad, lr=1e-2),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.head, self.still = nn.Linear(8, 2), nn.Linear(2, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.encoder(x)


def losses(model, batch):
    h = model(batch)
    return {"task": model.still(model.head(h)).square().mean(), "small": h.abs().mean()}, {"mean": h.mean(0)}


def make(model=None, **options):
    return ff.Step(model or Net(), losses, ROUTES, **{"optimizer": ff.optim.adamw(1e-2), **options})


def bytes_of(tree):
    return [leaf.clone() for leaf in optree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_after_the_other_they_are_the_step(optimizer, engine, donate):
    one, other = Net(), Net()
    other.load_state_dict(one.state_dict())
    options = {"optimizer": OPTIMIZERS[optimizer], "engine": engine, "donate": donate}
    whole, halved = make(one, **options), make(other, **options)
    mine, theirs = whole.init(), halved.init()
    for turn in range(4):
        batch = torch.randn(6, 4)
        torch.manual_seed(turn)
        mine, metrics = whole(mine, batch)
        torch.manual_seed(turn)
        half = halved.compute(theirs, batch)
        theirs, others = halved.apply_gradients(theirs, half)
        assert same(bytes_of(mine), bytes_of(theirs))
        assert metrics.keys() == others.keys()
        assert same(bytes_of(metrics), bytes_of(others))
    assert one.calls == other.calls


@pytest.mark.parametrize("donate", [True, False])
def test_the_first_half_spends_and_changes_nothing(donate):
    step = make(donate=donate)
    state, _ = step(step.init(), torch.randn(6, 4))
    before, batch = bytes_of(state), torch.randn(6, 4)
    torch.manual_seed(1)
    half = step.compute(state, batch)
    torch.manual_seed(1)
    again = step.compute(state, batch)
    assert same(bytes_of(state), before)
    assert same(bytes_of(half.gradients), bytes_of(again.gradients))
    assert set(half.gradients) == {"encoder.0.weight", "encoder.1.weight", "encoder.1.bias", "head.weight", "head.bias"}
    assert half.losses.keys() == {"task", "small"}
    assert half.metrics.keys() == {"mean"}
    assert not torch.equal(half.buffers["encoder.1.running_mean"], state.buffers["encoder.1.running_mean"])


def test_a_half_outlives_the_steps_that_are_made_of_it():
    step = make(donate=True)
    state = step.init()
    half = step.compute(state, torch.randn(6, 4))
    before = bytes_of((half.gradients, half.buffers, half.metrics, half.losses))
    for _ in range(3):
        state, _ = step.apply_gradients(state, half)
        state, _ = step(state, torch.randn(6, 4))
    assert same(bytes_of((half.gradients, half.buffers, half.metrics, half.losses)), before)


def test_sharpness_aware_minimisation():
    model = Net().eval()
    plain = copy.deepcopy(model)
    step = make(model, optimizer=ff.optim.sgd(0.1))
    state, batch = step.init(), torch.randn(6, 4)
    first = step.compute(state, batch)
    norm = torch.stack([gradient.norm() for gradient in first.gradients.values()]).norm()
    climbed = {path: state.params[path] + 0.05 * g / norm for path, g in first.gradients.items()}
    second = step.compute(state.replace(params={**state.params, **climbed}), batch)
    state, _ = step.apply_gradients(state, second)

    def gradients(model):
        found, _ = losses(model, batch)
        loss = found["task"] - 0.1 * found["small"]
        named = {path: p for path, p in model.named_parameters() if not path.startswith("still")}
        to_head = torch.autograd.grad(found["task"], list(named.values()), retain_graph=True)
        to_all = torch.autograd.grad(loss, list(named.values()))
        rows = zip(named, to_head, to_all, strict=True)
        return {path: whole if path.startswith("encoder") else head for path, head, whole in rows}

    start, found = copy.deepcopy(plain), gradients(plain)
    norm = torch.stack([g.norm() for g in found.values()]).norm()
    with torch.no_grad():
        for path, parameter in plain.named_parameters():
            if path in found:
                parameter += 0.05 * found[path] / norm
    found = gradients(plain)
    for path, parameter in start.named_parameters():
        moved = -0.1 * found[path] if path in found else torch.zeros_like(parameter)
        torch.testing.assert_close(state.params[path] - parameter.detach(), moved, rtol=1e-10, atol=1e-13)


def test_untouched_is_what_is_missing_or_none():
    step = make()
    state, _ = step(step.init(), torch.randn(6, 4))
    before = copy.deepcopy(state)
    half = step.compute(state, torch.randn(6, 4))
    left = {"encoder.0.weight": half.gradients["encoder.0.weight"], "head.weight": None}
    state, _ = step.apply_gradients(state, half.replace(gradients=left))
    moved = {path for path in state.params if not torch.equal(state.params[path], before.params[path])}
    assert moved == {"encoder.0.weight"}
    counts = {path: int(entry["step"]) for path, entry in state.optimizer.items()}
    assert counts == {path: 2 if path == "encoder.0.weight" else 1 for path in counts}
    assert int(state.step) == 2


def test_accumulated_over_two_batches():
    step = make(optimizer=ff.optim.sgd(0.5))
    one, other = torch.randn(6, 4), torch.randn(6, 4)
    step.module.eval()
    state = step.init()
    halves = step.compute(state, one), step.compute(state, other)
    mean = {path: (g + halves[1].gradients[path]) / 2 for path, g in halves[0].gradients.items()}
    start = {path: param.clone() for path, param in state.params.items()}
    state, _ = step.apply_gradients(state, halves[1].replace(gradients=mean))
    for path, before in start.items():
        expected = -0.5 * mean[path] if path in mean else torch.zeros_like(before)
        torch.testing.assert_close(state.params[path] - before, expected, rtol=1e-10, atol=1e-14)


def test_a_gradient_that_is_not_finite_skips_under_a_loss_scale():
    step = make(loss_scale=ff.LossScale(8.0))
    state = step.init()
    half = step.compute(state, torch.randn(6, 4))
    spoiled = {**half.gradients, "head.bias": torch.full((2,), torch.inf)}
    before = bytes_of(state.params)
    state, _ = step.apply_gradients(state, half.replace(gradients=spoiled))
    assert same(bytes_of(state.params), before)
    assert float(state.optimizer["loss_scale"]["scale"]) == 4.0
    assert int(state.step) == 1


def test_gradients_by_any_name_of_a_tied_parameter():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    step = ff.Step(
        model, lambda m, x: {"l": m["b"](m["a"](x)).square().mean()}, {"l": "*"}, optimizer=ff.optim.sgd(1.0)
    )
    state, start = step.init(), model["a"].weight.detach().clone()
    half = step.compute(state, torch.randn(5, 3))
    assert half.gradients["b.weight"] is half.gradients["a.weight"]
    state, _ = step.apply_gradients(state, half.replace(gradients={"b.weight": torch.ones(3, 3)}))
    torch.testing.assert_close(state.params["a.weight"], start - 1)


def test_a_momentum_encoder_in_the_forward():
    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.slow = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)

    def follow(model, x):
        with torch.no_grad():
            for slow, online in zip(model.slow.parameters(), model.online.parameters(), strict=True):
                slow.lerp_(online, 0.1)
        return {"l": (model.online(x) - model.slow(x)).square().mean()}

    model = Momentum()
    step = ff.Step(model, follow, {"l": "online"}, optimizer=ff.optim.sgd(0.1))
    one, other = step.init(), step.init()
    for _ in range(3):
        x = torch.randn(5, 3)
        one, _ = step(one, x)
        half = step.compute(other, x)
        assert half.written.keys() == {"slow.weight", "slow.bias"}
        other, _ = step.apply_gradients(other, half)
        assert same(bytes_of(one), bytes_of(other))


def test_all_that_does_not_fit_is_told_at_once_and_changes_nothing():
    step = make()
    state = step.init()
    half = step.compute(state, torch.randn(6, 4))
    before = bytes_of(state)
    wrong = {
        "encoder.0.wait": torch.zeros(1),
        "head.weight": torch.zeros(3, 3),
        "head.bias": 1.0,
        "still.weight": torch.zeros(2, 2),
        "encoder.1.bias": torch.zeros(8, dtype=torch.float32),
    }
    buffers = {path: value for path, value in half.buffers.items() if "mean" not in path}
    with pytest.raises(ValueError, match="does not fit the State") as caught:
        step.apply_gradients(state, half.replace(gradients=wrong, buffers=buffers))
    for line in (
        "gradients['encoder.0.wait']: there is no such parameter; did you mean 'encoder.0.weight'",
        "gradients['head.weight']: the gradient has shape (3, 3), the parameter has shape (2, 8)",
        "gradients['head.bias'] is a tensor, or None where it is untouched; got float",
        "gradients['still.weight']: no loss may update this parameter; leave it out, or give it a route",
        "gradients['encoder.1.bias']: the gradient has dtype torch.float32, the parameter has dtype torch.float64",
        "buffer encoder.1.running_mean: the State has it, the Half does not",
    ):
        assert line in str(caught.value)
    assert same(bytes_of(state), before)
    with pytest.raises(TypeError, match="the fields of a Half are mappings") as caught:
        step.apply_gradients(state, half.replace(gradients=[1], buffers=None, written=None))
    for line in ("gradients is a mapping, got list", "buffers is a mapping, got NoneType", "written is a mapping, got"):
        assert line in str(caught.value)
    with pytest.raises(ValueError, match=r"written\['head.bias'\]: a loss may update this parameter"):
        step.apply_gradients(state, half.replace(written={"head.bias": torch.zeros(2)}))
    assert same(bytes_of(state), before)
    for given, text in ((half.gradients, "got dict"), (step(state, torch.randn(6, 4)), "got a pair")):
        with pytest.raises(TypeError, match=text):
            step.apply_gradients(step.init(), given)


def test_gradients_with_a_graph_are_taken_without_it():
    step = make()
    state = step.init()
    half = step.compute(state, torch.randn(6, 4))
    factor = torch.tensor(2.0, requires_grad=True)
    doubled = half.replace(gradients={path: gradient * factor for path, gradient in half.gradients.items()})
    state, _ = step.apply_gradients(state, doubled)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(state))


@pytest.mark.parametrize("options", [{}, {"engine": "reference"}, {"compile": {"backend": "aot_eager"}}], ids=str)
def test_each_loss_clipped_by_itself_in_one_forward(options):
    model = Net().eval()
    plain, step = copy.deepcopy(model), make(model, optimizer=ff.optim.sgd(0.5), **options)
    state, batch = step.init(), torch.randn(6, 4)
    half = step.compute(state, batch, per_loss=True)
    assert half.per_loss.keys() == {"task", "small"}
    for path, gradient in half.gradients.items():
        rows = [row[path] for row in half.per_loss.values() if path in row]
        torch.testing.assert_close(gradient, sum(rows), rtol=1e-12, atol=1e-15)

    def clipped(row):
        norm = torch.stack([g.norm() for g in row.values()]).norm()
        return {path: g * (0.1 / norm).clamp(max=1.0) for path, g in row.items()}

    merged = {}
    for row in half.per_loss.values():
        for path, gradient in clipped(row).items():
            merged[path] = merged.get(path, 0) + gradient
    calls = model.calls
    state, _ = step.apply_gradients(state, half.replace(gradients=merged))
    assert model.calls == calls

    found, _ = losses(plain, batch)
    wanted = {path: torch.zeros_like(p) for path, p in plain.named_parameters()}
    for name, weight, allowed in (("task", 1.0, ("encoder", "head")), ("small", -0.1, ("encoder",))):
        named = {path: p for path, p in plain.named_parameters() if path.startswith(allowed)}
        gradients = torch.autograd.grad(weight * found[name], list(named.values()), retain_graph=True)
        for path, gradient in clipped(dict(zip(named, gradients, strict=True))).items():
            wanted[path] += gradient
    for path, p in plain.named_parameters():
        torch.testing.assert_close(state.params[path] - p.detach(), -0.5 * wanted[path], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam"])
def test_a_gradient_in_the_memory_of_the_optimizers_state(optimizer):
    options = {"sgd": {"momentum": 0.9}, "rmsprop": {"momentum": 0.9}, "adam": {}}[optimizer]
    slot = "exp_avg" if optimizer == "adam" else "momentum_buffer"
    step = make(optimizer=getattr(ff.optim, optimizer)(1e-2, **options))
    state, _ = step(step.init(), torch.randn(6, 4))
    half = step.compute(state, torch.randn(6, 4))
    held = {path: state.optimizer[path][slot] for path in half.gradients}
    apart = half.replace(gradients={path: tensor.clone() for path, tensor in held.items()})
    expected, _ = step.apply_gradients(copy.deepcopy(state), apart)
    found, _ = step.apply_gradients(state, half.replace(gradients=held))
    assert same(bytes_of(found), bytes_of(expected))
