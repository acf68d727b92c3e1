"""Targets of awkward modules, awkward `losses`, and what is refused when it runs; what verify sees of a wrong one."""

from __future__ import annotations

import copy
import functools

import optree
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import funcfreeze as ff
from funcfreeze.computation import targets as targets_of_a_step
from teacher import batches, cloned, make
from twins import GRAPH, assert_moved_alike, averaged, descend, encoder, move_buffers, tensors, twin_of

SLOW = pytest.mark.slow
EAGER_AND_SLOWLY_COMPILED = [{}, pytest.param({"compile": GRAPH}, marks=SLOW)]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, 2, batch_first=True)

    def forward(self, x):
        return self.lstm(x[None])[0][0]


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Counting(nn.Linear):
    """Leaves a tensor of the graph on itself, and counts."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = super().forward(x)
        return self.last


def hooked():
    net = nn.Linear(4, 4)
    net.register_forward_hook(lambda module, args, out: torch.tanh(out))
    net.register_forward_pre_hook(lambda module, args: (args[0] + module.weight.mean(),))
    return net


def cumulative():
    norms = nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4, affine=False)
    return nn.Sequential(nn.Linear(4, 4), norms[0], nn.Tanh(), norms[1], nn.Linear(4, 4))


def in_one_eval_mode():
    net = encoder()
    net[1].eval()
    return net


NETS = {
    "LSTM": Recurrent,
    "checkpoint": Recomputed,
    "attributes": lambda: Counting(4, 4),
    "hooks": hooked,
    "cumulative statistics": cumulative,
    "a norm in eval mode": in_one_eval_mode,
}


def losses(model, x, *, targets):
    with torch.no_grad():
        aim = targets["twin"](x)
    return {"fit": (model["net"](x) - aim + 1).square().mean()}


def step_of(net, average=None, losses=losses, **options):
    averages = {"twin": average or ff.ema("net", 0.7)}
    return ff.Step(
        nn.ModuleDict({"net": net}), losses, {"fit": "*"}, optimizer=ff.optim.sgd(0.1), targets=averages, **options
    )


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
@pytest.mark.parametrize("make_net", NETS.values(), ids=NETS)
def test_awkward_modules(make_net, run):
    net, given = make_net(), batches(4)
    if run and make_net is cumulative:
        pytest.skip("torch does not compile it")
    for buffers in ("own", "averaged"):
        step = step_of(net, ff.ema("net", 0.7, buffers=buffers), **run)
        plain, state = copy.deepcopy(step.module), step.init()
        torch.manual_seed(0)
        for x in given:
            state, _ = step(state, x)
        torch.manual_seed(0)
        twin, optimizer = twin_of(plain["net"]), torch.optim.SGD(plain.parameters(), 0.1)
        for x in given:
            descend(optimizer, losses(plain, x, targets={"twin": twin})["fit"])
            averaged(twin, plain["net"], 0.7)
            move_buffers(twin, plain["net"], 0.7, buffers)
        assert_moved_alike(tensors(step.module), {**state.params, **state.buffers}, tensors(plain))
        assert_moved_alike(tensors(net), state.targets["twin"], tensors(twin))
        assert ff.verify(step, state, given[0], steps=2).ok


def test_python_attributes_change_as_in_one_call_a_step():
    seen = []

    def counting(model, x, *, targets):
        seen.append(targets["twin"])
        return losses(model, x, targets=targets)

    step = step_of(Counting(4, 4), losses=counting)
    state, given = step.init(), batches(3)
    step.gradients(state, given[0])
    assert seen[0].calls == 0
    for x in given:
        state, _ = step(state, x)
    assert seen[0].calls == 3
    assert not seen[0].last.requires_grad
    ff.verify(step, state, given[0], steps=2)
    assert seen[0].calls == 3


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_flags_that_losses_set_last_for_the_call(run):
    """`targets["twin"].eval()` in front of its forward, as people write it."""

    def evaluated(model, x, *, targets):
        targets["twin"].eval()
        return losses(model, x, targets=targets)

    step = step_of(encoder(), losses=evaluated, **run)
    state = step.init()
    for x in batches(3):
        state, _ = step(state, x)
    assert int(state.targets["twin"]["1.num_batches_tracked"]) == 0
    assert int(state.buffers["net.1.num_batches_tracked"]) == 3
    assert step.module["net"].training


def test_frozen_statistics_hold_for_a_twin_that_follows_its_original():
    step = step_of(encoder(), frozen_statistics="net")
    state, _ = step(step.init(), batches(1)[0])
    assert int(state.targets["twin"]["1.num_batches_tracked"]) == 0
    step = step_of(encoder(), ff.ema("net", 0.7, mode="train"), frozen_statistics="net")
    state, _ = step(step.init(), batches(1)[0])
    assert int(state.targets["twin"]["1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_losses_that_move_a_twin_are_refused(run):
    def in_place(model, x, *, targets):
        with torch.no_grad():
            targets["twin"].weight.mul_(0.5)
        return losses(model, x, targets=targets)

    def by_data(model, x, *, targets):
        for average, own in zip(targets["twin"].parameters(), model["net"].parameters(), strict=True):
            average.data.mul_(0.5).add_(own.data, alpha=0.5)
        return losses(model, x, targets=targets)

    def loaded(model, x, *, targets):
        targets["twin"].load_state_dict(model["net"].state_dict())
        return losses(model, x, targets=targets)

    for moves in (in_place, by_data, *([] if run else [loaded])):
        step = step_of(nn.Linear(4, 4), losses=moves, **run)
        state = step.init()
        before = cloned(state)
        with pytest.raises(RuntimeError, match=r"(?s)`losses` writes to parameter weight of target 'twin'.*leave out"):
            step(state, batches(1)[0])
        assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves(state)))


@pytest.mark.parametrize(
    "options",
    [{}, {"on_nonfinite": "skip"}, {"microbatches": 2}, pytest.param({"compile": GRAPH}, marks=SLOW)],
    ids=str,
)
def test_a_decay_that_raises_leaves_the_state_as_it_was(options):
    gives = iter([0.5, 2.0, 0.5])
    step = step_of(nn.Linear(4, 4), ff.ema("net", lambda count: next(gives)), **options)
    state, _ = step(step.init(), batches(1)[0])
    before = cloned(state)
    with pytest.raises(ValueError, match=r"must return a number from 0 to 1 or a floating 0-d tensor, got 2\.0"):
        step(state, batches(1)[0])
    assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves(state)))
    state, _ = step(state, batches(1)[0])
    assert int(state.step) == 2


def test_losses_of_every_kind_name_targets():
    @functools.wraps(losses)
    def wrapped(*args, **kwargs):
        return losses(*args, **kwargs)

    def optional(model, x, targets=None):
        return losses(model, x, targets=targets or {"twin": model["net"]})

    for f in (wrapped, torch.autocast("cpu", enabled=False)(losses), torch.compile(losses, backend="eager"), optional):
        step = step_of(nn.Linear(4, 4), losses=f)
        step(step.init(), batches(1)[0])
    alone = ff.Step(nn.ModuleDict({"net": nn.Linear(4, 4)}), optional, {"fit": "*"}, optimizer=ff.optim.sgd(0.1))
    alone(alone.init(), batches(1)[0])


def test_a_plan_given_as_routes_declares_them():
    first = make()
    step = ff.Step(first.model, first.losses, first.plan, optimizer=ff.optim.sgd(0.1))
    assert step.plan == first.plan
    assert step.init().targets.keys() == {"teacher"}
    with pytest.raises(ValueError, match="targets are teacher, and the plan that was given as routes has teacher"):
        make(first.model, ff.ema("online", 0.1), routes=first.plan)
    step = make(average=ff.ema("online", lambda count: 0.5))
    with pytest.raises(ValueError, match=r"(?s)the decay.*was a function, which plain data cannot hold"):
        type(step.plan).from_dict(step.plan.to_dict())


def test_a_buffer_of_another_shape_at_every_step():
    """Its own: as a model's may."""

    class Growing(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("seen", torch.zeros(0, 4))

        def forward(self, x):
            self.seen = torch.cat([self.seen, x.detach()])
            return super().forward(x)

    step = step_of(Growing())
    state = step.init()
    for x in batches(2):
        state, _ = step(state, x)
    assert state.targets["twin"]["seen"].shape == (12, 4)


# What verify sees


def assert_seen(step, text="target teacher displacement"):
    report = ff.verify(step, step.init(), batches(1)[0], steps=3)
    assert not report.ok
    assert any(text in line and "FAILED" in line for line in str(report).splitlines())


def test_verify_sees_a_wrong_average(monkeypatch):
    right = ff.verify(make(), make().init(), batches(1)[0], steps=3)
    assert right.ok, right
    average = targets_of_a_step._average
    monkeypatch.setattr(
        "funcfreeze.computation.targets._average", lambda twins, values, decay: average(twins, values, 1 - decay)
    )
    assert_seen(make())


def test_verify_sees_wrong_times(monkeypatch):
    monkeypatch.setattr("funcfreeze.declare.ema.Ema.decay_at", lambda self, step: self.decay)
    moving = targets_of_a_step.Targets.moving
    monkeypatch.setattr(
        "funcfreeze.computation.targets.Targets.moving", lambda self, count, step: moving(self, count + 1, step)
    )
    assert_seen(make(average=ff.ema("online", 0.5, every=2)))


def test_verify_sees_wrong_statistics_and_modes(monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr("funcfreeze.computation.targets._is_floating", lambda tensor: False)
        assert_seen(make(average=ff.ema("online", 0.5, buffers="averaged")))
    monkeypatch.setattr("funcfreeze.computation.targets.Targets.set_modes", lambda self: None)
    assert_seen(make(average=ff.ema("online", 0.5, mode="eval")), "fit")


def test_verify_sees_a_twin_that_is_an_alias(monkeypatch):
    """Copied once, it would follow its original in place."""

    def shared(moves, twins, params, buffers, found):
        for name, target, _ in moves:
            for path, followed in target.twin.parameters.items():
                twins[f"targets.{name}.{path}"].set_(params[followed])
        return {}

    monkeypatch.setattr("funcfreeze.computation.updating.move", shared)
    assert_seen(make(average=ff.ema("online", 0, every=2)))


# What was wrong once


@pytest.mark.parametrize("value", [torch.arange(4), torch.tensor([True, False, True, True])], ids=["int", "bool"])
def test_parameters_that_are_not_floating_are_copied(value):
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.mask = nn.Parameter(value, requires_grad=False)

        def forward(self, x):
            return super().forward(x) * self.mask

    step = step_of(Masked())
    state, _ = step(step.init(), batches(1)[0])
    assert torch.equal(state.targets["twin"]["mask"], value)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("buffers", ["copied", "averaged"])
def test_a_copied_buffer_takes_the_shape_of_the_originals(buffers, rows):
    class Keeping(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("seen", torch.zeros(6, 4))

        def forward(self, x):
            self.seen = x.detach()[:1].expand(rows, 4).clone()
            return super().forward(x)

    step = step_of(Keeping(), ff.ema("net", 0, buffers=buffers), losses=lambda model, x: {"fit": model["net"](x).sum()})
    state, _ = step(step.init(), batches(1)[0])
    assert torch.equal(state.targets["twin"]["seen"], state.buffers["net.seen"])


def test_a_buffer_that_has_grown_fits():
    class Growing(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("seen", torch.zeros(0, 4))

        def forward(self, x):
            self.seen = torch.cat([self.seen, x.detach()])
            return super().forward(x)

    step = step_of(Growing())
    state, _ = step(step.init(), batches(1)[0])
    state, _ = step(copy.deepcopy(state), batches(1)[0])
    assert state.targets["twin"]["seen"].shape == (12, 4)


def test_a_path_that_a_twin_does_not_have():
    step = make()
    state = step.init()
    twin = {**state.targets["teacher"], "more": torch.ones(1)}
    with pytest.raises(ValueError, match=r"targets\['teacher'\]\['more'\]: the State has it, the Step does not"):
        step(state.replace(targets={"teacher": twin}), batches(1)[0])


def test_losses_that_are_a_module():
    class Loss(nn.Module):
        def forward(self, model, x, *, targets):
            return losses(model, x, targets=targets)

    step = step_of(nn.Linear(4, 4), losses=Loss())
    step(step.init(), batches(1)[0])


@pytest.mark.parametrize("decay", [torch.tensor(1.5), torch.tensor(-0.1)], ids=str)
def test_a_tensor_out_of_range(decay):
    with pytest.raises(ValueError, match="decay is from 0 to 1, got"):
        ff.ema("online", decay)


def test_a_schedule_that_leaves_the_range():
    with pytest.raises(ValueError, match=r"decay is from 0 to 1, and linear\(.*\) is 1.02 at count 4"):
        ff.ema("online", ff.schedules.linear(0.9, 1.2, 10))
    ff.ema("online", ff.schedules.cosine(0.996, 1.0, 10_000))


def test_a_name_that_nobody_declared():
    def mistyped(model, x, *, targets):
        return {"fit": targets["techer"](model["net"](x)).sum()}

    step = step_of(nn.Linear(4, 4), losses=mistyped)
    with pytest.raises(KeyError, match=r"(?s)techer.*twin"):
        step(step.init(), batches(1)[0])


def test_a_part_that_the_model_got_later():
    """Nothing stays held: the module has its own tensors, and others may go on."""
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4))})
    step = ff.Step(
        model,
        lambda m, x, *, targets: {"fit": (m["net"](x) - targets["twin"](x)).square().mean()},
        {"fit": "*"},
        optimizer=ff.optim.sgd(0.1),
        targets={"twin": ff.ema("net", 0.5)},
    )
    state, own = step.init(), model["net"][0].weight
    model["net"].append(nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match=r"^net has other parts than when the Step was built, and a twin is copied"):
        step(state, batches(1)[0])
    assert model["net"][0].weight is own


@pytest.mark.parametrize("buffers", ["copied", "averaged"])
def test_a_half_is_applied_twice(buffers):
    """And the forward may have put the batch in a buffer's place: nobody's tensors are written to."""

    class Keeping(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("last", torch.zeros(6, 4))

        def forward(self, x):
            self.last = x
            return super().forward(x)

    model = nn.ModuleDict({"net": Keeping()})
    step = ff.Step(
        model,
        lambda m, x, *, targets: {"fit": (m["net"](x) - targets["twin"](x)).square().mean()},
        {"fit": "*"},
        optimizer=ff.optim.sgd(0.1),
        targets={"twin": ff.ema("net", 0.5, buffers=buffers)},
        donate=False,
    )
    state, batch = step.init(), torch.randn(6, 4)
    given = batch.clone()
    half = step.compute(state, batch)
    before = {path: buffer.clone() for path, buffer in half.buffers.items()}
    one, _ = step.apply_gradients(state, half)
    kept = copy.deepcopy(one.targets["twin"])
    other, _ = step.apply_gradients(state, half)
    for path, tensor in kept.items():
        assert torch.equal(one.targets["twin"][path], tensor)
        assert torch.equal(other.targets["twin"][path], tensor)
    assert all(torch.equal(half.buffers[path], buffer) for path, buffer in before.items())
    step(state, batch)
    assert torch.equal(batch, given)


def test_a_tied_twin_is_replaced_by_any_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    step = step_of(Tied())
    state = step.init()
    replaced = state.replace(targets={"twin": {"two.weight": torch.zeros(4, 4)}})
    assert torch.equal(replaced.targets["twin"]["one.weight"], torch.zeros(4, 4))
    with pytest.raises(TypeError, match="targets goes by name and then by path, as in {'teacher'"):
        state.replace(targets=nn.Linear(2, 2))
    step(replaced, batches(1)[0])


def test_a_schedule_in_the_plan_of_members():
    one = ff.ema("net", ff.schedules.cosine(0.996, 1.0, 10_000), mode="eval")
    step = ff.alternate({"a": step_of(nn.Linear(4, 4), one)})
    assert "\ntargets  twin of net: ema cosine(a=0.996, b=1.0, steps=10000), after a, own buffers, eval mode" in str(
        step.plan
    )


def test_a_twin_keeps_no_values_of_its_own():
    """The state has them: the copy's tensors are in the model's memory."""
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))})
    step = ff.Step(
        model,
        lambda m, x, *, targets: {"fit": (m["net"](x) - targets["twin"](x)).square().mean()},
        {"fit": "*"},
        optimizer=ff.optim.sgd(0.1),
        targets={"twin": ff.ema("net", 0.5)},
    )
    twin = step.functional.twins["twin"]
    for own, copied in zip(model["net"].state_dict().values(), twin.state_dict().values(), strict=True):
        assert own.data_ptr() == copied.data_ptr()
    before = copy.deepcopy(model.state_dict())
    step(step.init(), batches(1)[0])
    assert all(torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())


def test_an_average_for_evaluation_whose_statistics_stand_still():
    """Nothing calls it, so its own statistics stay 0 and 1: a warning, where the caller is."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def step_with(**options):
        return ff.Step(
            net,
            lambda model, x: {"fit": model(x).square().mean()},
            {"fit": "*"},
            optimizer=ff.optim.sgd(0.1),
            targets={"average": ff.ema("*", 0.5, **options)},
        )

    told = r"nothing moves the running statistics of target 'average': .* 1 norms of '\*' .* buffers=\"copied\" or"
    for step in (step_with(), ff.alternate({"one": step_with()})):
        with pytest.warns(UserWarning, match=told) as seen:
            step.init()
        assert [warning.filename for warning in seen] == [__file__]
    step = step_with(buffers="copied")
    state, _ = step(step.init(), torch.randn(6, 4))
    torch.testing.assert_close(state.targets["average"]["1.running_mean"], state.buffers["1.running_mean"])
