"""Steps that are skipped or raise where something is not finite, against the loops that people write."""

from __future__ import annotations

import copy
import math

import optree
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import funcfreeze as ff

ENGINES = ["routed", "reference", "toggle"]
ROUTES = {"task": "*", "small": {"encoder": -0.1}}
WEIGHTS = {"task": {"": 1.0}, "small": {"encoder": -0.1}}


def network():
    encoder = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh())
    return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(6, 2)})


def losses(model, batch):
    h = model["encoder"](batch)
    return {"task": model["head"](h).square().mean(), "small": h.abs().mean()}


def batches(number=6, bad=(2,)):
    found = [torch.randn(5, 4) for _ in range(number)]
    for turn in bad:
        found[turn][1, 2] = math.nan
    return found


def bits(tree):
    """Every tensor by its place, as bytes: NaN is equal to itself, and 0 not to -0."""
    named = zip(optree.tree_paths(tree), optree.tree_leaves(tree), strict=True)
    return {
        path: (leaf.dtype, leaf.contiguous().reshape(-1).view(torch.uint8).clone().tolist())
        if isinstance(leaf, torch.Tensor)
        else leaf
        for path, leaf in named
    }


def changed(before, after):
    assert before.keys() == after.keys()
    return {path for path in before if before[path] != after[path]}


STEP = {("step",)}
SCALE = {("optimizer", "loss_scale", "scale"), ("optimizer", "loss_scale", "growth_tracker")}


def plain_loop(model, batches, build, scaler=None):
    """The loop as people write it: what is not finite is left out; buffers as they were, unless a scaler skips."""
    model = copy.deepcopy(model)
    optimizer = build(model.parameters())
    for batch in batches:
        kept = copy.deepcopy(dict(model.named_buffers()))
        found = losses(model, batch)
        if not all(torch.isfinite(loss) for loss in found.values()):
            with torch.no_grad():
                for path, buffer in model.named_buffers():
                    buffer.copy_(kept[path])
            continue
        optimizer.zero_grad()
        rows = {}
        for name, loss in found.items():
            named = {
                p: w for prefix, w in WEIGHTS[name].items() for q, p in model.named_parameters() if q.startswith(prefix)
            }
            rows[name] = dict(zip(named, torch.autograd.grad(loss, [*named], retain_graph=True), strict=True)), named
        for given, weights in rows.values():
            for p, g in given.items():
                p.grad = weights[p] * g if p.grad is None else p.grad + weights[p] * g
        optimizer.step()
    return model


OPTIMIZERS = {
    "sgd": (ff.optim.sgd(0.05, momentum=0.9), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)),
    "dampened": (
        ff.optim.sgd(0.05, momentum=0.9, dampening=0.3),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=0.3),
    ),
    "adamw": (ff.optim.adamw(0.01, amsgrad=True), lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True)),
    "rmsprop": (ff.optim.rmsprop(0.01, momentum=0.5), lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5)),
    "partition": (
        ff.optim.partition({"encoder": ff.optim.adam(0.01), "head": ff.optim.adam(0.01)}),
        lambda p: torch.optim.Adam(p, 0.01),
    ),
    "chain": (
        ff.optim.chain(ff.optim.clip_by_global_norm(1e9), ff.optim.adam(0.01)),
        lambda p: torch.optim.Adam(p, 0.01),
    ),
    "pure": (ff.optim.Transform(*ff.optim.adam(0.01)[:2]), lambda p: torch.optim.Adam(p, 0.01)),
    "from_torch": (ff.optim.from_torch(torch.optim.Adagrad, lr=0.01), lambda p: torch.optim.Adagrad(p, 0.01)),
    "from_torch, pure": (
        ff.optim.Transform(*ff.optim.from_torch(torch.optim.NAdam, lr=0.01)[:2]),
        lambda p: torch.optim.NAdam(p, 0.01),
    ),
}

RUNS = [
    *((kind, "routed", True) for kind in OPTIMIZERS),
    *(("adamw", engine, donate) for engine in ENGINES for donate in (True, False)),
    ("pure", "routed", False),
    ("from_torch", "routed", False),
]


@pytest.mark.parametrize(("kind", "engine", "donate"), RUNS)
@pytest.mark.parametrize("bad", [2, 0], ids=["later", "first"])
def test_a_run_equals_the_loop_that_leaves_the_batch_out(kind, engine, donate, bad):
    model, given = network(), batches(bad=(bad,))
    tx, build = OPTIMIZERS[kind]
    step = ff.Step(model, losses, ROUTES, optimizer=tx, engine=engine, donate=donate, on_nonfinite="skip")
    start, state = copy.deepcopy(model), step.init()
    for turn, batch in enumerate(given):
        before, old = bits(state), state
        state, metrics = step(state, batch)
        flag = metrics["ff/skipped"]
        assert (flag.dtype, flag.shape, bool(flag)) == (torch.bool, (), turn == bad)
        if turn == bad:
            assert changed(before, bits(state)) == STEP
        if not donate:
            assert not changed(before, bits(old))
    assert int(state.step) == len(given)
    wanted = plain_loop(model, given, build)
    assert_equal(state, wanted, start)


def assert_equal(state, wanted, start):
    origin = dict(start.named_parameters())
    for path, parameter in wanted.named_parameters():
        moved = state.params[path] - origin[path].detach(), (parameter - origin[path]).detach()
        assert moved[1].abs().sum() > 0
        torch.testing.assert_close(*moved, rtol=1e-10, atol=1e-10)
    for path, buffer in wanted.named_buffers():
        torch.testing.assert_close(state.buffers[path], buffer, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("donate", [True, False])
def test_raise_leaves_the_state_usable(engine, donate):
    model, given = network(), batches()
    step = ff.Step(
        model, losses, ROUTES, optimizer=ff.optim.adamw(0.01), engine=engine, donate=donate, on_nonfinite="raise"
    )
    start, state, own = copy.deepcopy(model), step.init(), bits([*model.parameters(), *model.buffers()])
    for turn, batch in enumerate(given):
        before = bits(state)
        if turn == 2:
            with pytest.raises(FloatingPointError) as caught:
                step(state, batch)
            assert not changed(before, bits(state))
        else:
            state, metrics = step(state, batch)
            assert not metrics["ff/skipped"]
    lines = str(caught.value).splitlines()
    assert lines[0] == "step 2 (counted from 0) was not taken, because not all that it computed is finite:"
    assert lines[1] == "  losses: task is nan, small is nan"
    assert lines[2] == "  gradients: encoder.0.weight, encoder.1.weight, encoder.1.bias, head.weight and 1 more"
    assert lines[3].startswith("The State that was given is as it was and can be used: go on with the next batch")
    assert not changed(own, bits([*model.parameters(), *model.buffers()]))
    assert int(state.step) == len(given) - 1
    assert_equal(state, plain_loop(model, given, lambda p: torch.optim.AdamW(p, 0.01)), start)


def test_the_error_tells_losses_from_gradients():
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})

    def rooted(model, batch):  # the root of 0 is 0, and its slope infinite
        x, shift = batch
        return {"root": (model["a"](x) - model["a"](x)).abs().sqrt().sum(), "b": model["b"](x).sum() + shift}

    step = ff.Step(model, rooted, {"root": "a", "b": "b"}, optimizer=ff.optim.sgd(0.1), on_nonfinite="raise")
    state = step.init()
    with pytest.raises(FloatingPointError) as caught:
        step(state, (torch.ones(1, 1), 0.0))
    told = str(caught.value).splitlines()
    assert told[1].startswith("  losses: all are finite: root is 0, b is ")
    assert told[2] == "  gradients: a.weight; 1 other is finite"
    step = ff.Step(
        model,
        lambda m, b: {"b": rooted(m, b)["b"], "c": m["a"](b[0]).sum()},
        {"b": "b", "c": "a"},
        optimizer=ff.optim.sgd(0.1),
        on_nonfinite="raise",
    )
    with pytest.raises(FloatingPointError) as caught:
        step(state, (torch.ones(1, 1), -math.inf))
    told = str(caught.value).splitlines()
    assert told[1] == "  losses: b is -inf; 1 other is finite"
    assert told[2] == "  gradients: all are finite"


def test_a_loss_that_is_absent_says_nothing_and_a_step_that_touches_nothing_may_be_skipped():
    def some(model, batch):
        x, has_task, factor = batch
        h = model["encoder"](x)
        return {"task": model["head"](h).square().mean() if has_task else None, "small": h.abs().mean() * factor}

    step = ff.Step(network(), some, ROUTES, optimizer=ff.optim.adam(0.01), on_nonfinite="skip")
    state = step.init()
    x = torch.randn(5, 4)
    state, metrics = step(state, (x, False, 1.0))
    assert not metrics["ff/skipped"]
    before = bits(state)
    state, metrics = step(state, (x, False, math.inf))
    assert metrics["ff/skipped"]
    assert changed(before, bits(state)) == STEP
    alone = ff.Step(
        network(), lambda model, _: {"task": None}, {"task": "*"}, optimizer=ff.optim.adam(), on_nonfinite="raise"
    )
    _, metrics = alone(alone.init(), None)
    assert metrics.keys() == {"ff/skipped"}
    assert not metrics["ff/skipped"]


class Odd(nn.Module):
    """Buffers that hold NaN, -0 and whole numbers in many dtypes; all are exchanged by the forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        values = torch.tensor([math.nan, -math.nan, -0.0, 0.0, math.inf, 1.5, 7.0])
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128):
            self.register_buffer("in_" + str(dtype).split(".")[1], values.to(dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("assigned", values.clone())

    def forward(self, x):
        for name, buffer in self.named_buffers():
            if name not in ("flag", "assigned"):
                buffer.add_(1)
        self.flag.logical_not_()
        self.assigned = self.assigned + 1
        return self.linear(x)


@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_buffers_are_put_back_bit_by_bit(mode):
    step = ff.Step(
        Odd(),
        lambda model, x: {"l": model(x).square().mean()},
        {"l": "*"},
        optimizer=ff.optim.adam(),
        on_nonfinite=mode,
    )
    state, _ = step(step.init(), torch.randn(3, 4))
    before = bits(state)
    bad = torch.full((3, 4), math.nan)
    if mode == "skip":
        state, _ = step(state, bad)
    else:
        with pytest.raises(FloatingPointError):
            step(state, bad)
    assert changed(before, bits(state)) == (STEP if mode == "skip" else set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    "tx",
    [
        ff.optim.adamw(0.1),
        ff.optim.sgd(0.1, momentum=0.9, dampening=0.5),
        ff.optim.rmsprop(0.1),
        ff.optim.adam(0.1, state_dtype=torch.float32),
        ff.optim.Transform(*ff.optim.adam(0.1)[:2]),
    ],
    ids=["adamw", "dampened", "rmsprop", "state_dtype", "pure"],
)
def test_parameters_in_half_precision_and_complex_ones(dtype, tx):
    model = nn.Linear(3, 2, dtype=dtype)
    with torch.no_grad():
        model.bias[0] = -0.0

    def fit(model, x):
        return {"l": model(x).abs().float().square().mean()}

    step = ff.Step(model, fit, {"l": "*"}, optimizer=tx, on_nonfinite="skip")
    state, x = step.init(), torch.randn(4, 3).to(dtype)
    for given in (x * math.nan, x, x * math.nan):
        before = bits(state)
        state, metrics = step(state, given)
        assert (changed(before, bits(state)) == STEP) == bool(metrics["ff/skipped"]) == (given is not x)


def test_sparse_gradients():
    def look_up(model, factor):
        return {"l": (model(torch.tensor([1, 1, 2])) * factor).sum()}

    for momentum in (0, 0.9):
        table = nn.Embedding(4, 2, sparse=True)
        with torch.no_grad():
            table.weight[1] = -0.0
        step = ff.Step(table, look_up, {"l": "*"}, optimizer=ff.optim.sgd(0.1, momentum=momentum), on_nonfinite="skip")
        state = step.init()
        for factor in (math.nan, 1.0, math.inf):
            before = bits(state)
            state, metrics = step(state, factor)
            assert (changed(before, bits(state)) == STEP) == bool(metrics["ff/skipped"]) == (factor != 1.0)


def test_what_a_forward_writes_to_frozen_parameters_is_put_back():
    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.twin = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            with torch.no_grad():
                for mine, other in zip(self.twin.parameters(), self.online.parameters(), strict=True):
                    mine.mul_(0.9).add_(other, alpha=0.1)
            return (self.online(x) - self.twin(x)).square().mean()

    for donate in (True, False):
        step = ff.Step(
            Momentum(),
            lambda model, x: {"l": model(x)},
            {"l": "online"},
            optimizer=ff.optim.sgd(0.1),
            donate=donate,
            on_nonfinite="skip",
        )
        state = step.init()
        for turn, factor in enumerate((1.0, math.nan, 1.0)):
            before = bits(state)
            state, _ = step(state, torch.ones(2, 3) * factor)
            moved = changed(before, bits(state))
            assert moved == STEP if turn == 1 else ("params", "twin.weight") in moved


# --- with a loss scale -----------------------------------------------------------------------------------------------


def overflowing(model, batch):
    """In float16 the gradient overflows where the loss does not; or the loss does alone."""
    x, slope, shift = batch
    h = model(x)
    return {"l": Steep.apply(h, slope).mean() + shift}


class Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, slope):
        ctx.slope = slope
        return h.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope, None


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize("tx", [ff.optim.adam(0.1), ff.optim.Transform(*ff.optim.adam(0.1)[:2])], ids=["fused", "pure"])
def test_overflow_is_the_loss_scales_affair(mode, tx):
    scale = ff.LossScale(8.0, growth_interval=100)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    step = ff.Step(model, overflowing, {"l": "*"}, optimizer=tx, loss_scale=scale, on_nonfinite=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    twin = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)

    def scaled(factor):
        optimizer.zero_grad()
        scaler.scale(twin.weight.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale(), scaler._get_growth_tracker()

    def kept(state):
        found = state.optimizer["loss_scale"]
        return float(found["scale"]), int(found["growth_tracker"])

    state, x = step.init(), torch.randn(4, 3)
    state, metrics = step(state, (x, 1.0, 0.0))
    assert kept(state) == scaled(1.0)
    before = bits(state)
    state, metrics = step(state, (x, math.inf, 0.0))  # raises in neither mode: the loss is finite
    assert metrics["ff/skipped"]
    assert changed(before, bits(state)) == STEP | SCALE
    assert kept(state) == scaled(math.inf)
    before = bits(state)
    if mode == "raise":
        for bad in ((x, math.nan, math.nan), (x, 1.0, math.inf)):
            with pytest.raises(FloatingPointError, match="losses: l is ") as caught:
                step(state, bad)
            assert "gradients:" not in str(caught.value)
            assert not changed(before, bits(state)), "the scale too"
    else:
        state, metrics = step(state, (x * math.nan, 1.0, 0.0))
        assert metrics["ff/skipped"]
        assert changed(before, bits(state)) == STEP | {("optimizer", "loss_scale", "scale")}
        assert kept(state) == scaled(math.nan)
        before = bits(state)
        state, metrics = step(state, (x, 1.0, math.inf))  # the loss alone: nothing that a smaller scale would cure
        assert metrics["ff/skipped"]
        assert changed(before, bits(state)) == STEP | {("optimizer", "loss_scale", "growth_tracker")}
        assert kept(state) == scaled(1.0)
    state, metrics = step(state, (x, 1.0, 0.0))
    assert not metrics["ff/skipped"]
    assert kept(state) == scaled(1.0)


# --- halves, verify, names, arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("donate", [True, False])
def test_the_second_half_decides(donate):
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.adam(0.1), donate=donate, on_nonfinite="skip")
    state, given = step.init(), batches(3, bad=(1,))
    state, metrics = step.apply_gradients(state, step.compute(state, given[0]))
    assert not metrics["ff/skipped"]
    half = step.compute(state, given[1])
    assert "ff/skipped" not in half.metrics
    before = bits(state)
    state, metrics = step.apply_gradients(state, half)
    assert metrics["ff/skipped"]
    assert changed(before, bits(state)) == STEP
    good = step.compute(state, given[2])
    state, metrics = step.apply_gradients(state, good.replace(gradients={"head.bias": torch.tensor([1.0, math.inf])}))
    assert metrics["ff/skipped"]
    assert changed(before, bits(state)) == STEP
    state, metrics = step.apply_gradients(state, half.replace(gradients=good.gradients))
    assert metrics["ff/skipped"], "the half's losses are not finite"
    raising = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.adam(0.1), donate=donate, on_nonfinite="raise")
    before = bits(state)
    with pytest.raises(FloatingPointError, match="losses: task is nan, small is nan"):
        raising.apply_gradients(state, half)
    assert not changed(before, bits(state))
    raising.apply_gradients(state, good)


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize("loss_scale", [None, ff.LossScale()])
def test_verify(mode, loss_scale):
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.adam(0.1), on_nonfinite=mode, loss_scale=loss_scale)
    state = step.init()
    report = ff.verify(step, state, torch.randn(5, 4))
    assert report.ok, str(report)
    if mode == "raise":
        with pytest.raises(FloatingPointError):
            ff.verify(step, state, batches(1, bad=(0,))[0])


class _Syncs(TorchDispatchMode):
    """Counts what a device would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("loss_scale", [None, ff.LossScale()], ids=["plain", "scaled"])
def test_nothing_waits_but_raise_once(kind, loss_scale):
    if kind == "from_torch, pure":
        pytest.skip("NAdam itself reads its count")
    counted = {}
    for mode in ("ignore", "skip", "raise"):
        step = ff.Step(
            network(), losses, ROUTES, optimizer=OPTIMIZERS[kind][0], on_nonfinite=mode, loss_scale=loss_scale
        )
        good = batches(5, bad=())
        state, _ = step(step.init(), good[0])  # the first call looks at every operator, and from_torch has no state yet
        with _Syncs() as syncs:
            for batch in good[1:]:
                state, _ = step(state, batch)
        counted[mode] = syncs.number
    assert counted["skip"] == counted["ignore"]
    assert counted["raise"] == counted["ignore"] + 4


def test_what_it_may_be():
    for given in ("Skip", True, None, 1, ["skip"]):
        with pytest.raises(ValueError, match="on_nonfinite is 'ignore', 'skip' or 'raise', got") as caught:
            ff.Step(network(), losses, ROUTES, optimizer=ff.optim.sgd(0.1), on_nonfinite=given)
        assert repr(given) in str(caught.value)


def test_ignore_is_as_before():
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.sgd(0.1))
    assert step.on_nonfinite == "ignore"
    state, metrics = step(step.init(), batches(1, bad=(0,))[0])
    assert metrics.keys() == {"task", "small"}
    assert state.params["head.weight"].isnan().all()


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_names_of_the_steps_own(compile):
    with pytest.raises(ff.RouteError, match="loss 'ff/task': names that begin with 'ff/' are those of the step's own"):
        ff.Step(network(), losses, {"ff/task": "*"}, optimizer=ff.optim.sgd(0.1))

    def named(model, batch):
        return losses(model, batch), {"ff/skipped": batch.mean(), 3: batch.mean(), "ff": 1}

    step = ff.Step(network(), named, ROUTES, optimizer=ff.optim.sgd(0.1), compile=compile)
    state = step.init()
    with pytest.raises(ff.RouteError, match="metric 'ff/skipped': names that begin with 'ff/' .* rename it"):
        step(state, torch.randn(5, 4))
    assert int(state.step) == 0


def test_a_transform_whose_in_place_form_knows_nothing_of_it():
    """Its pure form is taken."""
    inner = ff.optim.adam(0.1)

    def in_place(grads, state, params, *, step=None):
        return inner.in_place(grads, state, params, step=step)

    step = ff.Step(
        network(), losses, ROUTES, optimizer=ff.optim.Transform(inner.init, inner.update, in_place), on_nonfinite="skip"
    )
    state = step.init()
    for turn, batch in enumerate(batches(3, bad=(1,))):
        before = bits(state)
        state, metrics = step(state, batch)
        assert bool(metrics["ff/skipped"]) == (turn == 1) == (changed(before, bits(state)) == STEP)


def own_in_place():
    """A transform of a user's, whose in-place form knows nothing of skipping."""
    plain = ff.optim.sgd(0.1)

    def in_place(grads, state, params, *, step=None):
        def commit():
            for path, gradient in grads.items():
                params[path].sub_(0.1 * gradient)
            return state

        return commit

    return ff.optim.Transform(plain.init, plain.update, in_place)


@pytest.mark.parametrize("options", [{"on_nonfinite": "skip"}, {"loss_scale": ff.LossScale()}, {}], ids=str)
@pytest.mark.parametrize(
    "made",
    [
        own_in_place,
        lambda: ff.optim.chain(ff.optim.clip_by_global_norm(1e6), own_in_place()),
        lambda: ff.optim.partition({"weight": own_in_place(), "bias": ff.optim.sgd(0.1)}),
    ],
    ids=["alone", "chain", "partition"],
)
def test_an_in_place_form_that_cannot_skip_makes_place_for_the_pure_one(made, options):
    model = nn.Linear(2, 1)
    step = ff.Step(model, lambda model, x: {"fit": model(x).square().mean()}, {"fit": "*"}, optimizer=made(), **options)
    x = torch.randn(3, 2)
    gradients = step.gradients(state := step.init(), x)
    state, _ = step(state, x)
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(state.params[path], parameter.detach() - 0.1 * gradients[path])
    if options:
        before = {path: value.clone() for path, value in state.params.items()}
        state, _ = step(state, torch.full((3, 2), float("nan")))
        assert all(torch.equal(state.params[path], value) for path, value in before.items())
