"""What a target is in a state and in a forward: its start, its values, and who may write to them."""

from __future__ import annotations

import copy
import functools
import pickle

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import funcfreeze as ff
from teacher import batches, by_hand, cloned, losses, make, network
from twins import GRAPH, assert_moved_alike, averaged, tensors, twin_of

SLOW = pytest.mark.slow
RUNS = {
    "eager": {},
    "kept": {"donate": False},
    "reference": {"engine": "reference"},
    "toggle": {"engine": "toggle"},
    "compiled": {"compile": GRAPH},
    "compiled, kept": {"compile": GRAPH, "donate": False},
}
SOME_RUNS = [pytest.param(run, marks=SLOW if "compile" in run else ()) for run in RUNS.values()]
EAGER_AND_COMPILED = [{}, {"compile": GRAPH}]
EAGER_AND_SLOWLY_COMPILED = [{}, pytest.param({"compile": GRAPH}, marks=SLOW)]


def places(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}


def test_it_starts_as_a_copy_of_its_own():
    model = network()
    step = make(model)
    with torch.no_grad():
        model["online"][0].weight.mul_(2)  # between building and beginning
    for copied in (True, False):
        state = step.init(copied)
        assert state.targets.keys() == {"teacher"}
        wanted = tensors(model["online"])
        assert state.targets["teacher"].keys() == wanted.keys()
        assert "1.num_batches_tracked" in wanted
        torch.testing.assert_close(dict(state.targets["teacher"]), wanted, rtol=0, atol=0)
        assert places(state.targets["teacher"]).isdisjoint(places(state.params) | places(state.buffers))
        assert places(state.targets["teacher"]).isdisjoint(places(dict(model.named_parameters())))
        assert not any(tensor.requires_grad for tensor in state.targets["teacher"].values())
    assert step.init().targets["teacher"]["0.weight"] is not step.init().targets["teacher"]["0.weight"]


def test_it_is_a_module_of_its_own_with_constant_parameters():
    class Net(nn.Linear):
        def twice(self, x):
            return self(self(x))

    model, seen = nn.ModuleDict({"net": Net(4, 4), "head": nn.Linear(4, 1)}), []

    def using(model, x, *, targets):
        twin = targets["net"]
        seen.append((twin, [*targets]))
        assert type(twin) is Net
        assert twin is not model["net"]
        assert not any(parameter.requires_grad for parameter in twin.parameters())
        h = model["net"](x)
        assert twin.twice(h).requires_grad
        assert not twin.twice(x).requires_grad
        return {"fit": model["head"](twin.twice(h)).square().mean()}

    step = ff.Step(model, using, {"fit": "*"}, optimizer=ff.optim.sgd(0.1), targets={"net": ff.ema("net", 0.9)})
    begun = [*model["net"].parameters()], tensors(model["net"])
    state, _ = step(step.init(), torch.randn(3, 4))
    assert list(step.gradients(state, torch.randn(3, 4))) == [
        "net.weight",
        "net.bias",
        "head.weight",
        "head.bias",
    ]
    assert seen[0][1] == ["net"]
    assert all(one is other for one, other in zip(begun[0], model["net"].parameters(), strict=True))
    torch.testing.assert_close(tensors(model["net"]), begun[1], rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_gradients_go_through_it_and_not_into_it(engine):
    """Also those of a penalty on gradients at its inputs."""
    model, x = network().eval(), torch.randn(6, 4)

    def penalised(model, x, *, targets):
        h = model["online"](x)
        out = targets["teacher"](torch.tanh(h)[:, :4]).square().sum()
        return {"fit": out + torch.autograd.grad(out, h, create_graph=True)[0].square().sum()}

    step = make(model, losses=penalised, engine=engine)
    twin = twin_of(model["online"])
    with torch.no_grad():
        twin[0].weight.add_(torch.randn_like(twin[0].weight))
    state = step.init().replace(targets={"teacher": tensors(twin)})
    wanted = torch.autograd.grad(penalised(model, x, targets={"teacher": twin})["fit"], [*model["online"].parameters()])
    got = step.gradients(state, x)
    assert got.keys() == {f"online.{path}" for path, _ in twin.named_parameters()}
    torch.testing.assert_close([*got.values()], [*wanted])


def test_who_names_targets_gets_them():
    class Object:
        def __call__(self, model, x, *, targets):
            return losses(model, x, targets=targets)

        def method(self, model, x, targets):
            return losses(model, x, targets=targets)

    def more(model, x, scale, *, targets):
        return losses(model, scale * x, targets=targets)

    model, given = network(), batches(1)[0]
    start = make(model).init()
    torch.manual_seed(0)
    wanted, _ = make(model)(start, given)
    for f in (Object(), Object().method, functools.partial(more, scale=1)):
        step = make(model, losses=f)
        torch.manual_seed(0)
        state, _ = step(step.init(), given)
        torch.testing.assert_close(dict(state.params), dict(wanted.params), rtol=0, atol=0)
        torch.testing.assert_close(dict(state.targets["teacher"]), dict(wanted.targets["teacher"]), rtol=0, atol=0)
    copied = ff.ema("online", 0.5, buffers="copied")

    def anything(model, x, **others):
        return {"fit": model["online"](x).sum()}, {"others": [*others]}

    step = make(model, average=copied, losses=anything)
    assert step(step.init(), given)[1]["others"] == []


@pytest.mark.parametrize("run", EAGER_AND_COMPILED, ids=["eager", "compiled"])
def test_a_state_that_was_pickled_changed_or_copied_goes_on(run):
    model, given = network(), batches(8)
    start, plain = tensors(model), copy.deepcopy(model)
    step = make(model, **run)
    state = step.init()
    torch.manual_seed(0)
    for number, x in enumerate(given):
        if number == 2:
            state = pickle.loads(pickle.dumps(state))
        if number == 3:
            state = copy.deepcopy(state)
        if number == 4:
            state = cloned(state)
        if number == 5:
            state = state.replace(targets={"teacher": cloned(dict(state.targets["teacher"]))})
        if number == 6:
            state = copy.copy(state)
        if number == 7:
            state = make(model).adopt(state)[0]
        state, _ = step(state, x)
    torch.manual_seed(0)
    twin = by_hand(plain, given)
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))
    assert_moved_alike(tensors(model["online"]), state.targets["teacher"], tensors(twin))
    paths = {path[:2] for path in optree.tree_paths(state)}
    assert ("targets", "teacher") in paths


@pytest.mark.parametrize("run", SOME_RUNS, ids=RUNS)
def test_what_is_passed_in_is_spent_or_left_alone(run):
    step, given = make(average=ff.ema("online", 0.5, buffers="averaged"), **run), batches(2)
    state = step.init()
    before = cloned(state)
    after, _ = step(state, given[0])
    if run.get("donate", True):
        with pytest.raises(RuntimeError, match="spent"):
            _ = state.targets
        step(after, given[1])
        return
    kept = cloned(after)
    step(after, given[1])
    step(state, given[1])
    for one, other in ((before, state), (kept, after)):
        assert all(map(torch.equal, optree.tree_leaves(one), optree.tree_leaves(other)))


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_two_states_of_one_step_do_not_meet(run):
    """The twin is a module of the step, and its values are the state's."""
    model, given = network(), batches(6)
    step, lone = make(model, **run), make(copy.deepcopy(model))
    one, other = step.init(), step.init()
    one = one.replace(targets={"teacher": {path: t + 1 for path, t in one.targets["teacher"].items()}})
    alone = lone.init()
    torch.manual_seed(0)
    for x in given:
        alone, _ = lone(alone, x)
    torch.manual_seed(0)
    for x in given:
        drawn = torch.get_rng_state()
        one, _ = step(one, x)
        torch.set_rng_state(drawn)
        other, _ = step(other, x)
    torch.testing.assert_close(dict(other.targets["teacher"]), dict(alone.targets["teacher"]), rtol=0, atol=1e-12)
    assert not torch.allclose(one.targets["teacher"]["0.weight"], other.targets["teacher"]["0.weight"], atol=1e-2)


@pytest.mark.parametrize("run", EAGER_AND_COMPILED, ids=["eager", "compiled"])
def test_copies_do_not_share_memory_with_what_they_copy(run):
    """A later step overwrites the parameters in place."""
    step = make(average=ff.ema("online", 0, buffers="copied", every=2), **run)
    state, _ = step(step.init(), torch.randn(6, 4))
    for path, tensor in state.targets["teacher"].items():
        assert torch.equal(tensor, {**state.params, **state.buffers}[f"online.{path}"])
    kept = cloned(dict(state.targets["teacher"]))
    state, _ = step(state, torch.randn(6, 4))
    for path in ("0.weight", "1.weight", "1.bias", "4.weight", "4.bias"):
        assert torch.equal(kept[path], state.targets["teacher"][path])
    assert not torch.equal(kept["0.weight"], state.params["online.0.weight"])


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_several_of_one_module_and_of_its_parts(run):
    model, given = network(), batches(4)

    def many(model, x, *, targets):
        h = model["online"](x)
        slow, fast = targets["slow"](x), targets["fast"](x)
        part = targets["part"](x)
        whole = targets["whole"]["head"](targets["whole"]["online"](x))
        return {
            "fit": (h - slow).square().mean() + (h - fast).square().mean() + (h[:, :1] * part).mean(),
            "head": (model["head"](h) - whole).square().mean(),
        }

    averages = {
        "slow": ff.ema("online", 0.9),
        "fast": ff.ema("online", 0.2, mode="eval", buffers="copied"),
        "part": ff.ema("online.0", 0.5),
        "whole": ff.ema("*", 0.7, every=2),
        "idle": ff.ema("head", 0.5),
    }
    routes = {"fit": "online", "head": "*"}
    step = ff.Step(model, many, routes, optimizer=ff.optim.sgd(0.1), targets=averages, **run)
    plain, state = copy.deepcopy(model), step.init()
    torch.manual_seed(0)
    for x in given:
        state, _ = step(state, x)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    online = plain["online"]
    twins = {
        "slow": twin_of(online),
        "fast": twin_of(online).eval(),
        "part": twin_of(online[0]),
        "whole": twin_of(plain),
        "idle": twin_of(plain["head"]),
    }
    for number, x in enumerate(given):
        optimizer.zero_grad()
        sum(many(plain, x, targets=twins).values()).backward()
        optimizer.step()
        averaged(twins["slow"], online, 0.9)
        averaged(twins["fast"], online, 0.2)
        for average, new in zip(twins["fast"].buffers(), online.buffers(), strict=True):
            average.copy_(new)
        averaged(twins["part"], online[0], 0.5)
        if number % 2 == 0:
            averaged(twins["whole"], plain, 0.7)
        averaged(twins["idle"], plain["head"], 0.5)
    assert_moved_alike(tensors(model), {**state.params, **state.buffers}, tensors(plain))
    for name, twin in twins.items():
        torch.testing.assert_close(dict(state.targets[name]), tensors(twin), rtol=0, atol=1e-10)


def test_of_a_mapping_with_a_bare_parameter():
    nets = {"net": nn.Linear(3, 2), "scale": nn.Parameter(torch.ones(()))}

    def scaled(nets, x, *, targets):
        return {
            "fit": (nets["scale"] * nets["net"](x) - targets["all"]["net"](x) * targets["all"]["scale"]).square().mean()
        }

    step = ff.Step(nets, scaled, {"fit": "*"}, optimizer=ff.optim.sgd(0.1), targets={"all": ff.ema("*", 0.5)})
    state = step.init()
    assert state.targets["all"].keys() == {"net.weight", "net.bias", "scale"}
    before = cloned(dict(state.targets["all"]))
    state = state.replace(params={path: p + 1 for path, p in state.params.items()})
    state, _ = step(state, torch.randn(4, 3))
    for path, tensor in state.targets["all"].items():
        torch.testing.assert_close(tensor, 0.5 * before[path] + 0.5 * state.params[path])


class Reads(TorchDispatchMode):
    """Counts values that are read from tensors, for which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_asked_of_the_device():
    decay = ff.schedules.cosine(0.5, 1.0, 8)
    step = make(average=ff.ema("online", decay, every=2, buffers="averaged"), on_nonfinite="skip")
    state = step.init()
    for x in batches(2):
        state, _ = step(state, x)
    with Reads() as reads:
        for x in batches(4):
            state, _ = step(state, x)
    assert reads.count == 0


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_verify(run):
    average = ff.ema("online", ff.schedules.linear(0.2, 0.9, 3), every=2, buffers="averaged")
    step = make(average=average, **run)
    state, _ = step(step.init(), batches(1)[0])
    before = cloned(state)
    report = ff.verify(step, state, batches(1)[0], steps=4)
    assert report.ok, report
    assert "teacher" in str(report)
    assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves(state)))


def test_metrics_of_a_twin_are_apart_from_the_state():
    def telling(model, x, *, targets):
        z = targets["teacher"](x)
        return {"fit": (model["online"](x) - z).square().mean()}, {"z": z, "mean": targets["teacher"][1].running_mean}

    step = make(losses=telling)
    state, metrics = step(step.init(), torch.randn(6, 4))
    kept = cloned(metrics)
    step(state, torch.randn(6, 4))
    assert torch.equal(metrics["z"], kept["z"])
    assert torch.equal(metrics["mean"], kept["mean"])
    assert not metrics["z"].requires_grad


def test_no_random_numbers_are_drawn_for_it():
    def apart(model, x):
        return {"fit": F.mse_loss(model["online"](x), x[:, :1].expand(-1, 5))}

    given = batches(3)
    for average in (
        ff.ema("online", 0.5, buffers="copied"),
        ff.ema("*", lambda count: count / (1 + count), buffers="averaged"),
    ):
        model = network()
        step = make(model, average=average, losses=apart)
        state = step.init()
        torch.manual_seed(0)
        for x in given:
            state, _ = step(state, x)
        lone = ff.Step(model, apart, {"fit": "*"}, optimizer=ff.optim.sgd(0.1, momentum=0.9))
        wanted = lone.init()
        torch.manual_seed(0)
        for x in given:
            wanted, _ = lone(wanted, x)
        torch.testing.assert_close(dict(state.params), dict(wanted.params), rtol=0, atol=0)
