"""Loss scaling against torch's own GradScaler in the recipe: trajectories, skipped steps, growth, inactive losses."""

from __future__ import annotations

import copy
import math

import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.computation.loss_scale import unscale
from funcfreeze.optim.skip import find_non_finite
from waiting import waiting_is_an_error

ENGINES = ["routed", "reference", "toggle"]


def network():
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh()),
            "a": nn.Linear(6, 3),
            "b": nn.Linear(6, 2),
        }
    )


def losses(model, batch):
    """Loss `b` is absent where its factor is None, and without bound where it is infinite."""
    x, factor_a, factor_b = batch
    h = model["encoder"](x)
    return {
        "a": None if factor_a is None else model["a"](h).square().mean() * factor_a,
        "b": None if factor_b is None else model["b"](h).exp().mean() * factor_b,
    }


ROUTES = {"a": ["encoder", "a"], "b": {"b": 1.0, "encoder": -0.1}}
RECIPE = [("a", 1.0, ("encoder", "a")), ("b", -0.1, ("encoder",)), ("b", 1.0, ("b",))]
INF = math.inf
FACTORS = [(1, 1), (1, INF), (1, None), (None, 1), (1, 1), (None, INF), (INF, 1), (1, 1), (1, None), (1, 1), (1, 1)]
"""What the losses are multiplied by at each step; every combination of present, absent and infinite."""

SCALE = {"init_scale": 2.0**10, "growth_factor": 3.0, "backoff_factor": 0.3, "growth_interval": 2}


def batches():
    return [(torch.randn(5, 4), *factors) for factors in FACTORS]


def scaled_recipe(model, optimizer, batches, scaler, losses=losses, max_norm=INF):
    """The eager loop that people write with a GradScaler; yields the scale and its tracker after every step."""
    for batch in batches:
        optimizer.zero_grad()
        found = losses(model, batch)
        for name, weight, allowed in RECIPE:
            for path, parameter in model.named_parameters():
                parameter.requires_grad_(path.split(".")[0] in allowed)
            if found[name] is not None:
                scaler.scale(weight * found[name]).backward(retain_graph=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        if max_norm < INF:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        yield scaler.get_scale(), scaler._get_growth_tracker()


def everything(state):
    """The bytes of what a skipped step must not change."""
    tensors = [state.params, state.optimizer["optimizer"]]
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in optree.tree_leaves(tensors)]


def same_bits(one, other):
    return len(one) == len(other) and all(map(_same_bits, one, other))


def _same_bits(one, other):
    if not isinstance(one, torch.Tensor):
        return one == other
    return one.dtype == other.dtype and torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


OPTIMIZERS = {
    "sgd": (ff.optim.sgd(0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "dampened": (
        ff.optim.sgd(0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
    ),
    "adamw": (ff.optim.adamw(0.01, amsgrad=True), lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True)),
    "rmsprop": (ff.optim.rmsprop(0.01), lambda p: torch.optim.RMSprop(p, 0.01)),
    "rmsprop, centered": (
        ff.optim.rmsprop(0.01, momentum=0.9, centered=True, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=0.1),
    ),
    "partition": (
        ff.optim.partition({"encoder": ff.optim.adam(0.01), "a": ff.optim.adam(0.01), "b": ff.optim.adam(0.01)}),
        lambda p: torch.optim.Adam(p, 0.01),
    ),
    "chain": (
        ff.optim.chain(ff.optim.clip_by_global_norm(0.1), ff.optim.sgd(0.05, momentum=0.9)),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    ),
    "pure": (ff.optim.Transform(*ff.optim.adam(0.01)[:2]), lambda p: torch.optim.Adam(p, 0.01)),
    "from_torch": (ff.optim.from_torch(torch.optim.RMSprop, lr=0.01), lambda p: torch.optim.RMSprop(p, 0.01)),
    "from_torch, pure": (
        ff.optim.Transform(*ff.optim.from_torch(torch.optim.RMSprop, lr=0.01)[:2]),
        lambda p: torch.optim.RMSprop(p, 0.01),
    ),
}


RUNS = [
    *((kind, "routed", True) for kind in OPTIMIZERS),
    *(("adamw", engine, donate) for engine in ENGINES for donate in (True, False)),
    ("pure", "routed", False),
    ("from_torch", "routed", False),
]


@pytest.mark.parametrize(("kind", "engine", "donate"), RUNS)
def test_a_run_equals_the_recipe_with_a_grad_scaler(kind, engine, donate):
    model, given = network(), batches()
    tx, build = OPTIMIZERS[kind]
    step = ff.Step(model, losses, ROUTES, optimizer=tx, engine=engine, donate=donate, loss_scale=ff.LossScale(**SCALE))
    state, eager = step.init(), copy.deepcopy(model)
    start = {path: p.detach().clone() for path, p in model.named_parameters()}
    scaler = torch.amp.GradScaler(
        "cpu",
        init_scale=SCALE["init_scale"],
        growth_factor=SCALE["growth_factor"],
        backoff_factor=SCALE["backoff_factor"],
        growth_interval=SCALE["growth_interval"],
    )
    max_norm = 0.1 if kind == "chain" else INF
    expected = scaled_recipe(eager, build(eager.parameters()), given, scaler, max_norm=max_norm)
    for batch, (scale, tracker) in zip(given, expected, strict=True):
        before, old = everything(state), state
        state, metrics = step(state, batch)
        if not donate:
            assert same_bits(before, everything(old))
        skipped = INF in batch[1:]
        assert same_bits(before, everything(state)) == skipped
        kept = state.optimizer["loss_scale"]
        assert (float(kept["scale"]), int(kept["growth_tracker"])) == (scale, tracker)
        assert all(
            torch.isfinite(metrics[name]) for name in "ab" if name in metrics and batch[1 + "ab".index(name)] == 1
        )
        for path, p in eager.named_parameters():
            moved = state.params[path] - start[path], p.detach() - start[path]
            torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-9)  # the scale is no power of two: float32 reciprocal
        for path, buffer in eager.named_buffers():
            torch.testing.assert_close(state.buffers[path], buffer, rtol=1e-6, atol=1e-9)
    assert int(state.step) == len(given), "a skipped step is a step"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_scale_of_a_power_of_two_changes_no_bit(engine):
    model, given = network(), [(torch.randn(5, 4), 1, 1) for _ in range(4)]
    runs = []
    for scale in (None, ff.LossScale(growth_interval=2)):
        step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adam(0.01), engine=engine, loss_scale=scale)
        state, seen = step.init(), []
        for batch in given:
            seen += [step.gradients(state, batch), step.per_loss_gradients(state, batch)]
            state, metrics = step(state, batch)
            seen.append(metrics)
        runs.append(optree.tree_leaves([seen, state.params]))
    assert same_bits(*runs)


def test_gradients_and_metrics_are_unscaled_and_hooks_see_the_scale():
    seen, rest = [], []

    def hooked(model, batch):
        h = model["encoder"](batch)
        h.register_hook(seen.append)
        return {"a": h.sum()}

    for scale in (None, ff.LossScale.fixed(64.0)):
        torch.manual_seed(3)
        step = ff.Step({"encoder": nn.Linear(2, 2)}, hooked, {"a": "*"}, optimizer=ff.optim.sgd(0.1), loss_scale=scale)
        _, metrics = step(step.init(), torch.ones(1, 2))
        rest.append((metrics["a"], *step.gradients(step.init(), torch.ones(1, 2)).values()))
    plain, _, scaled, _ = seen
    assert torch.equal(scaled, 64 * plain)
    assert same_bits(*rest)


def test_a_hook_that_writes_into_its_gradient_leaves_the_scale_alone():
    def hooked(model, batch):
        loss = model.weight.sum()
        loss.register_hook(lambda gradient: gradient.mul_(3))
        return {"a": loss}

    for engine in ("routed", "toggle"):
        step = ff.Step(
            nn.Linear(1, 1, bias=False).float(),  # the scale's own dtype, so that nothing but care makes a copy
            hooked,
            {"a": "*"},
            optimizer=ff.optim.sgd(0.1),
            engine=engine,
            loss_scale=ff.LossScale(64.0),
        )
        state = step.init()
        assert float(step.gradients(state, None)["weight"]) == 3
        state, _ = step(state, None)
        assert float(state.optimizer["loss_scale"]["scale"]) == 64


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_untouched_parameters_do_not_count(kind):
    """They may hold infinities themselves; and a step that touches nothing says nothing about the scale."""
    model = network()
    with torch.no_grad():
        model["b"].weight.fill_(INF)
    step = ff.Step(
        model, losses, ROUTES, optimizer=OPTIMIZERS[kind][0], loss_scale=ff.LossScale(8.0, growth_interval=2)
    )
    state = step.init()
    state, _ = step(state, (torch.randn(5, 4), 1, None))
    assert float(state.optimizer["loss_scale"]["scale"]) == 8
    assert int(state.optimizer["loss_scale"]["growth_tracker"]) == 1
    before = everything(state)
    state, metrics = step(state, (torch.randn(5, 4), None, None))
    assert metrics == {}
    assert same_bits(before, everything(state))
    assert int(state.optimizer["loss_scale"]["growth_tracker"]) == 1
    state, _ = step(state, (torch.randn(5, 4), 1, None))
    assert float(state.optimizer["loss_scale"]["scale"]) == 16


@pytest.mark.parametrize(
    "tx",
    [
        ff.optim.chain(ff.optim.adam(0.1), ff.optim.sgd(1.0, momentum=0.9)),
        ff.optim.chain(ff.optim.sgd(0.1, momentum=0.9, dampening=0.5), ff.optim.clip_by_global_norm(1.0)),
        ff.optim.chain(ff.optim.from_torch(torch.optim.Adagrad), ff.optim.clip_by_global_norm(1.0)),
        ff.optim.partition({"*": ff.optim.chain(ff.optim.adam(0.1), ff.optim.from_torch(torch.optim.Adadelta))}),
        ff.optim.adam(0.1, state_dtype=torch.float32),
        ff.optim.from_torch(torch.optim.ASGD),
    ],
    ids=["chain", "no in-place form", "from_torch first", "partition", "state_dtype", "from_torch"],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_changes_no_bit(tx, first):
    """Be it the first step or a later one, and whatever holds a state."""
    model = network()
    with torch.no_grad():
        model["a"].bias.copy_(torch.tensor([-0.0, 0.0, 1.0]))
    step = ff.Step(model, losses, ROUTES, optimizer=tx, loss_scale=ff.LossScale())
    state = step.init()
    if not first:
        state, _ = step(state, (torch.randn(5, 4), 1, 1))
    before = everything(state)
    state, _ = step(state, (torch.randn(5, 4), INF, 1))
    assert same_bits(before, everything(state))
    state, _ = step(state, (torch.randn(5, 4), 1, 1))
    moved = everything(state)
    assert all(torch.isfinite(leaf).all() for leaf in moved if isinstance(leaf, torch.Tensor))
    assert not same_bits(before, moved)


def test_one_infinite_loss_skips_the_parameters_of_the_others_too():
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.adamw(0.1), loss_scale=ff.LossScale())
    state = step.init()
    before = everything(state)
    state, metrics = step(state, (torch.randn(5, 4), 1, INF))
    assert same_bits(before, everything(state))
    assert torch.isfinite(metrics["a"])
    assert int(state.buffers["encoder.1.num_batches_tracked"]) == 1


def test_sparse_gradients():
    def embedded(model, batch):
        return {"a": model(torch.tensor([1, 1, 2])).sum() * batch}

    for momentum in (0, 0.9):
        table = nn.Embedding(4, 2, sparse=True)
        with torch.no_grad():
            table.weight[1] = -0.0
        tx = ff.optim.sgd(0.1, momentum=momentum)
        step = ff.Step(table, embedded, {"a": "*"}, optimizer=tx, loss_scale=ff.LossScale(8.0), donate=False)
        state = step.init()
        skipped, _ = step(state, INF)
        assert same_bits(everything(state), everything(skipped))
        assert float(skipped.optimizer["loss_scale"]["scale"]) == 4
        moved, _ = step(skipped, 1.0)
        expected = torch.tensor([0.0, -0.2, -0.1, 0.0])[:, None].expand(4, 2)
        torch.testing.assert_close(moved.params["weight"] - state.params["weight"], expected)


# --- float16 ---------------------------------------------------------------------------------------------------------


def small_losses(model, batch):
    with torch.autocast("cpu", dtype=torch.float16):
        h = torch.tanh(model["encoder"](batch))
        return {"a": model["a"](h).square().mean().float() * 1e-6, "b": model["b"](h).square().mean().float() * 1e-6}


@pytest.mark.parametrize("engine", ENGINES)
def test_small_gradients_survive_in_float16_autocast(engine):
    model = nn.ModuleDict({"encoder": nn.Linear(4, 6), "a": nn.Linear(6, 3), "b": nn.Linear(6, 2)}).float()
    batch = torch.randn(64, 4, dtype=torch.float32)
    named = dict(model.named_parameters())
    with torch.autocast("cpu", enabled=False):
        h = torch.tanh(model["encoder"](batch))
        both = model["a"](h).square().mean() * 1e-6 - 0.1 * model["b"](h).square().mean() * 1e-6
    wanted = dict(zip(named, torch.autograd.grad(both, list(named.values())), strict=True))
    errors = {}
    for scale in (None, ff.LossScale()):
        step = ff.Step(model, small_losses, ROUTES, optimizer=ff.optim.sgd(0.1), engine=engine, loss_scale=scale)
        found = step.gradients(step.init(), batch)["encoder.weight"]
        errors[scale] = float((found - wanted["encoder.weight"]).norm() / wanted["encoder.weight"].norm())
    assert errors[None] > 0.1, "without a scale they are lost"
    assert errors[ff.LossScale()] < 0.02


def test_a_float16_run_with_autocast_equals_the_recipe_with_a_grad_scaler():
    """From a scale that overflows at first; the steps that are skipped, and where the scale ends, are the same."""
    model = nn.ModuleDict({"encoder": nn.Linear(4, 6), "a": nn.Linear(6, 3), "b": nn.Linear(6, 2)}).float()
    eager = copy.deepcopy(model)
    start = {path: p.detach().clone() for path, p in model.named_parameters()}

    def halves(model, batch):
        with torch.autocast("cpu", dtype=torch.float16):
            h = torch.tanh(model["encoder"](batch))
            return {"a": model["a"](h).square().mean(), "b": model["b"](h).square().mean()}

    given = [torch.randn(8, 4, dtype=torch.float32) for _ in range(20)]
    step = ff.Step(
        model, halves, ROUTES, optimizer=ff.optim.sgd(0.05), loss_scale=ff.LossScale(2.0**24, growth_interval=5)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=5)
    state, scales = step.init(), []
    expected = scaled_recipe(eager, torch.optim.SGD(eager.parameters(), 0.05), given, scaler, halves)
    for batch, (scale, _) in zip(given, expected, strict=True):
        state, _ = step(state, batch)
        scales.append((float(state.optimizer["loss_scale"]["scale"]), scale))
    mine, theirs = zip(*scales, strict=True)
    assert mine == theirs
    assert min(mine) < 2.0**24
    for path, p in eager.named_parameters():
        torch.testing.assert_close(state.params[path] - start[path], p.detach() - start[path], rtol=2e-2, atol=2e-3)


def test_float16_parameters_with_float32_state():
    """Gradients that float16 has no number for move the parameters as float32 would, by the gradients it never sees."""

    def tiny(model, batch):
        return {"a": (model.weight.float() * batch).sum() * 1e-9}

    model = nn.Linear(8, 1, bias=False).to(torch.float16)
    batch = torch.rand(8, dtype=torch.float32) + 1
    step = ff.Step(
        model,
        tiny,
        {"a": "*"},
        optimizer=ff.optim.adam(2.0**-4, eps=1e-12, state_dtype=torch.float32),
        loss_scale=ff.LossScale(2.0**20),
    )
    state = step.init()
    gradient = step.gradients(state, batch)["weight"]
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, batch[None] * 1e-9, rtol=1e-3, atol=0)
    before = state.params["weight"].clone()
    state, _ = step(state, batch)
    assert state.params["weight"].dtype == torch.float16
    torch.testing.assert_close(
        (state.params["weight"] - before).float(), torch.full((1, 8), -(2.0**-4)).float(), rtol=0, atol=1e-3
    )
    bare = ff.Step(model, tiny, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    assert not bare.gradients(bare.init(), batch)["weight"].any(), "what it is there for"


# --- the value and its functions -------------------------------------------------------------------------------------


def test_update_is_that_of_torch():
    for factors in ((2.0, 0.5), (1.7, 0.3), (1e20, 1e-20), (1.0, 1.0)):
        scale = ff.LossScale(3.3, *factors, growth_interval=int(torch.randint(1, 4, ())))
        state = scale.start(torch.device("cpu"))
        theirs = {name: kept.clone() for name, kept in state.items()}
        for _ in range(60):
            found_inf = (torch.rand(()) < 0.3).float()
            state = scale.update(state, found_inf)
            torch._amp_update_scale_(
                theirs["scale"], theirs["growth_tracker"], found_inf, *factors, scale.growth_interval
            )
            assert {name: (kept.dtype, kept.item()) for name, kept in state.items()} == {
                name: (kept.dtype, kept.item()) for name, kept in theirs.items()
            }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (257, 5)])
def test_unscaling_and_what_is_not_finite(dtype, shape):
    gradient = torch.randn(shape, dtype=torch.float32).to(dtype)
    for bad in (None, INF, -INF, math.nan):
        given = gradient.clone()
        if bad is not None and given.numel():
            given.view(-1)[int(torch.randint(given.numel(), ()))] = bad
        grads = unscale({"w": given, "other": torch.ones(2)}, torch.tensor(8.0, dtype=torch.float32))
        assert grads["w"].dtype == (torch.float32 if dtype == torch.float16 else dtype)
        found = find_non_finite(grads.values(), torch.device("cpu"))
        assert (found.dtype, found.shape) == (torch.float32, ())
        assert float(found) == (bad is not None and given.numel() > 0)
        if not found:
            assert torch.equal(grads["w"] * 8, given.to(grads["w"].dtype))


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS.keys() - {"from_torch", "from_torch, pure"}))
def test_nothing_waits_for_the_device(kind):
    """Meta tensors have no values, so whoever reads one raises."""
    params = {path: torch.zeros(3, device="meta") for path in ("encoder.w", "a.w", "b.w")}
    tx = ff.LossScale().around(OPTIMIZERS[kind][0])
    state, grads = tx.init(params), {"encoder.w": torch.zeros(3, device="meta")}
    grads = unscale(grads, state["loss_scale"]["scale"])
    tx.update(grads, state, params)
    if tx.in_place is not None:
        tx.in_place(grads, state, params)()


def test_the_compiler_sees_through_it():
    """As one graph, in which the same steps are skipped."""
    tx = ff.LossScale(8.0, growth_interval=2).around(
        ff.optim.chain(ff.optim.clip_by_global_norm(1.0), ff.optim.adamw())
    )
    start = {"a": torch.randn(4, 3), "b": torch.randn(3)}
    leaves, structure = optree.tree_flatten(tx.init(start))

    @torch._dynamo.nonstrict_trace
    def run(params, grads, leaves):
        state = optree.tree_unflatten(structure, leaves)
        grads = unscale(dict(zip(start, grads, strict=True)), state["loss_scale"]["scale"])
        return optree.tree_leaves(tx.in_place(grads, state, dict(zip(start, params, strict=True)))())

    compiled = torch.compile(lambda *args: run(*args), backend="aot_eager", fullgraph=True)
    sides = [([p.clone() for p in start.values()], [leaf.clone() for leaf in leaves]) for _ in range(2)]
    for bad in (False, True, False, False, True, False):
        grads = [torch.randn(4, 3), torch.full((3,), math.nan) if bad else torch.randn(3)]
        sides = [(params, f(params, grads, kept)) for f, (params, kept) in zip((run, compiled), sides, strict=True)]
        torch.testing.assert_close(*sides)
    assert all(torch.isfinite(leaf).all() for leaf in optree.tree_leaves(sides[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sorted(OPTIMIZERS.keys() - {"from_torch", "from_torch, pure"}))
def test_no_step_waits_for_the_gpu_and_skipped_ones_change_no_bit(kind):
    model = network().to("cuda", torch.float32)
    step = ff.Step(model, losses, ROUTES, optimizer=OPTIMIZERS[kind][0], loss_scale=ff.LossScale(growth_interval=1))
    state = step.init()
    good = [(torch.randn(5, 4, dtype=torch.float32, device="cuda"), 1, factor) for factor in (1, None, 1)]
    bad = (torch.randn(5, 4, dtype=torch.float32, device="cuda"), 1, INF)
    state, _ = step(state, good[0])
    before = everything(state)
    with waiting_is_an_error():
        state, _ = step(state, bad)
        after = everything(state)
        for batch in good:
            state, _ = step(state, batch)
    assert same_bits([t.cpu() for t in before], [t.cpu() for t in after])
    assert float(state.optimizer["loss_scale"]["scale"]) == 2.0**16 * 2 / 2 * 8


def test_a_scale_is_a_value():
    assert ff.LossScale() == ff.LossScale(2.0**16, 2.0, 0.5, 2000)
    assert hash(ff.LossScale()) == hash(ff.LossScale())
    with pytest.raises(AttributeError):
        ff.LossScale().init_scale = 3.0


def test_the_first_scale_is_spelled_as_in_torch_and_as_in_version_0_1_0():
    assert ff.LossScale(init=8.0) == ff.LossScale(init_scale=8.0) == ff.LossScale(8.0)
    assert ff.LossScale(init=8.0).init == 8.0
    assert repr(ff.LossScale(init=8.0)).startswith("LossScale(init_scale=8.0, growth_factor=2.0")
    torchs = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert ff.LossScale(init_scale=8.0).start(torch.device("cpu"))["scale"] == torchs.get_scale()
    with pytest.raises(TypeError, match="LossScale: init is another name of init_scale; got 4.0 and 8.0"):
        ff.LossScale(4.0, init=8.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_scale": 0}, "LossScale: init_scale must be a finite number above 0, got 0"),
        ({"init_scale": INF}, "LossScale: init_scale must be a finite number above 0, got inf"),
        ({"init_scale": 1e39}, "LossScale: init_scale must be a finite number above 0, got 1e\\+39"),
        ({"init": "dynamic"}, "LossScale: init_scale must be a finite number above 0, got 'dynamic'"),
        ({"growth_factor": 0.5}, "LossScale: growth_factor must be at least 1, got 0.5"),
        ({"growth_factor": True}, "LossScale: growth_factor must be at least 1, got True"),
        ({"backoff_factor": 2}, "LossScale: backoff_factor must be above 0 and at most 1, got 2"),
        ({"backoff_factor": math.nan}, "LossScale: backoff_factor must be above 0 and at most 1, got nan"),
        ({"growth_interval": 0}, "LossScale: growth_interval must be an int of at least 1, got 0"),
        ({"growth_interval": 2.0}, "LossScale: growth_interval must be an int of at least 1, got 2.0"),
    ],
)
def test_bad_scales(options, text):
    with pytest.raises(ValueError, match=text):
        ff.LossScale(**options)


def test_bad_arguments_of_a_step():
    with pytest.raises(TypeError, match=r"^loss_scale is a funcfreeze.LossScale, or None; got float: 1024.0"):
        ff.Step(network(), losses, ROUTES, optimizer=ff.optim.sgd(), loss_scale=1024.0)


def test_a_state_without_a_scale_is_refused_and_the_other_way_round():
    plain = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.sgd())
    scaled = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.sgd(), loss_scale=ff.LossScale())
    batch = batches()[0]
    with pytest.raises(
        ValueError, match=r"optimizer\['loss_scale'\]: the Step's optimizer has it, the State's does not"
    ):
        scaled(plain.init(), batch)
    with pytest.raises(
        ValueError, match=r"optimizer\['loss_scale'\]: the State's optimizer has it, the Step's does not"
    ):
        plain(scaled.init(), batch)


def test_two_steps_share_a_state_and_its_scale():
    model = network()
    scale = ff.LossScale(8.0, growth_interval=2)
    one = ff.Step(model, lambda m, b: {"a": losses(m, b)["a"]}, {"a": "*"}, optimizer=ff.optim.sgd(), loss_scale=scale)
    two = ff.Step(model, lambda m, b: {"b": losses(m, b)["b"]}, {"b": "*"}, optimizer=ff.optim.sgd(), loss_scale=scale)
    state, _ = one(one.init(), batches()[0])
    state, _ = two(state, batches()[0])
    assert float(state.optimizer["loss_scale"]["scale"]) == 16


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_verify(kind):
    step = ff.Step(
        network(), losses, ROUTES, optimizer=OPTIMIZERS[kind][0], loss_scale=ff.LossScale(8.0, growth_interval=2)
    )
    report = ff.verify(step, step.init(), (torch.randn(5, 4), 1, 1))
    assert report.ok, report
