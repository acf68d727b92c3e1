"""Members that take turns make the updates of the loop that people write with several optimizers."""

from __future__ import annotations

import copy
import pickle

import optree
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import funcfreeze as ff

GRAPH = {"backend": "aot_eager"}
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
EAGER_AND_SLOWLY_COMPILED = [{}, pytest.param({"compile": GRAPH}, marks=SLOW)]


def nets():
    """A critic and an actor on one encoder, with statistics and dropout in it."""
    return {
        "encoder": nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3)),
        "critic": nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)),
        "actor": nn.Linear(8, 3),
        "log_alpha": nn.Parameter(torch.zeros(())),
    }


def critic_losses(model, batch):
    x, y = batch
    return {"q": (model["critic"](model["encoder"](x)) - y).square().mean()}


def actor_losses(model, batch):
    x, _ = batch
    h = model["encoder"](x)
    policy = model["actor"](h).softmax(-1)
    entropy = -(policy * policy.clamp_min(1e-6).log()).sum(-1).mean()
    value = model["critic"](h * policy.sum(-1, keepdim=True)).mean()
    alpha = model["log_alpha"].exp()
    return {"pi": -value - alpha.detach() * entropy, "alpha": alpha * (entropy.detach() - 0.5)}, {"entropy": entropy}


ROUTES = {
    "critic": {"q": ["encoder", "critic"]},
    "actor": {"pi": ["actor", "encoder"], "alpha": "log_alpha"},
}


def optimizers(kind):
    return {"critic": ff.optim.adam(1e-2), "actor": ff.optim.sgd(0.05, momentum=0.9, weight_decay=0.1)}[kind]


def alternation(model, every, **run):
    return ff.alternate(
        {
            "critic": ff.Step(model, critic_losses, ROUTES["critic"], optimizer=optimizers("critic")),
            "actor": ff.Step(model, actor_losses, ROUTES["actor"], optimizer=optimizers("actor")),
        },
        every=every,
        **run,
    )


def batches(count):
    return [(torch.randn(5, 6), torch.randn(5, 1)) for _ in range(count)]


def by_hand(model, given, critic_at, actor_at):
    """The loop that people write: two optimizers, `zero_grad`, `requires_grad_`."""
    critic = torch.optim.Adam([*model["encoder"].parameters(), *model["critic"].parameters()], 1e-2)
    actor = torch.optim.SGD(
        [*model["encoder"].parameters(), *model["actor"].parameters(), model["log_alpha"]],
        0.05,
        momentum=0.9,
        weight_decay=0.1,
    )
    seen = []
    for number, batch in enumerate(given):
        if critic_at(number):
            critic.zero_grad()
            loss = critic_losses(model, batch)["q"]
            loss.backward()
            critic.step()
            seen.append(float(loss.detach()))
        if actor_at(number):
            actor.zero_grad()
            for parameter in model["critic"].parameters():
                parameter.requires_grad_(False)
            found, _ = actor_losses(model, batch)
            sum(found.values()).backward()
            actor.step()
            for parameter in model["critic"].parameters():
                parameter.requires_grad_(True)
            seen.append(float(found["pi"].detach()))
    return seen


def tensors(model):
    module = nn.ModuleDict({name: part for name, part in model.items() if isinstance(part, nn.Module)})
    found = {**dict(module.named_parameters()), **dict(module.named_buffers()), "log_alpha": model["log_alpha"]}
    return {path: tensor.detach().clone() for path, tensor in found.items()}


def assert_moved_alike(start, one, other, tolerance=1e-10):
    assert one.keys() == other.keys()
    for path, begun in start.items():
        moved = (other[path] - begun).double()
        torch.testing.assert_close((one[path] - begun).double(), moved, rtol=0, atol=tolerance, msg=path)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_loop_with_two_optimizers(run):
    model, given = nets(), batches(7)
    start, plain = tensors(model), copy.deepcopy(model)
    step = alternation(model, {"actor": 2}, **run)
    state, seen = step.init(), []
    torch.manual_seed(0)
    for number, batch in enumerate(given):
        state, metrics = step(state, batch)
        assert list(metrics) == (["critic"] if number % 2 else ["critic", "actor"])
        seen += [float(metrics[name][loss]) for name, loss in (("critic", "q"), ("actor", "pi")) if name in metrics]
    torch.manual_seed(0)
    wanted = by_hand(plain, given, lambda number: True, lambda number: number % 2 == 0)
    assert seen == pytest.approx(wanted, abs=1e-10)
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))
    assert (int(state.step), int(state.clocks["critic"]), int(state.clocks["actor"])) == (7, 7, 4)
    assert step.traces == (2 if run.get("compile") else 0)
    step.export(state)
    assert_moved_alike(start, tensors(model), tensors(plain))


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_turns_are_those_of_range(run):
    model, given = nets(), batches(11)
    start, plain = tensors(model), copy.deepcopy(model)
    step = ff.alternate(
        alternation(model, None).members, every={"actor": 3}, start={"critic": 2, "actor": 1}, stop={"critic": 9}, **run
    )
    state = step.init()
    torch.manual_seed(0)
    for batch in given:
        state, _ = step(state, batch)
    torch.manual_seed(0)
    by_hand(plain, given, lambda number: number in range(2, 9), lambda number: number in range(1, 11, 3))
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_a_state_that_was_pickled_changed_or_copied_goes_on(run):
    """Also in the middle of an alternation, with the turns where they were."""
    model, given = nets(), batches(8)
    start, plain = tensors(model), copy.deepcopy(model)
    step = alternation(model, {"critic": 3, "actor": 2}, **run)
    state = step.init()
    torch.manual_seed(0)
    for number, batch in enumerate(given):
        if number == 2:
            state = pickle.loads(pickle.dumps(state))
        if number == 3:
            state = copy.deepcopy(state)
        if number == 4:
            state = optree.tree_map(torch.clone, state)
        if number == 5:
            state = state.replace(params={path: value.clone() for path, value in state.params.items()})
        if number == 6:
            state = alternation(model, None).adopt(state)[0]
        state, _ = step(state, batch)
    torch.manual_seed(0)
    by_hand(plain, given, lambda number: number % 3 == 0, lambda number: number % 2 == 0)
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))


@pytest.mark.parametrize("run", SOME_RUNS, ids=RUNS)
def test_what_is_passed_in_is_spent_or_left_alone(run):
    step = alternation(nets(), None, **run)
    state = step.init()
    before = optree.tree_map(torch.clone, state)
    after, _ = step(state, batches(1)[0])
    if run.get("donate", True):
        with pytest.raises(RuntimeError, match="spent"):
            step(state, batches(1)[0])
        return
    step(after, batches(1)[0])
    for one, other in zip(optree.tree_leaves(before), optree.tree_leaves(state), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_where_nobody_has_a_turn_the_states_are_one(run):
    step = ff.alternate(alternation(nets(), None).members, start={"critic": 1, "actor": 1}, **run)
    first = step.init()
    second, metrics = step(first, batches(1)[0])
    assert metrics == {}
    assert (int(first.step), int(second.step)) == (0, 1)
    step(second, batches(1)[0])
    with pytest.raises(RuntimeError, match="spent"):
        _ = first.params


@pytest.mark.parametrize("run", SOME_RUNS, ids=RUNS)
def test_an_error_in_a_member(run):
    """What the members before it made stays, in a state that goes on; without donation nothing changed."""
    model, given = nets(), batches(3)
    plain = copy.deepcopy(model)

    def fails(model, batch):
        if fails.now:
            raise KeyError("no such thing")
        return actor_losses(model, batch)

    fails.now = False
    critic = ff.Step(model, critic_losses, ROUTES["critic"], optimizer=optimizers("critic"))
    actor = ff.Step(model, fails, ROUTES["actor"], optimizer=optimizers("actor"))
    step = ff.alternate({"critic": critic, "actor": actor}, **run)
    start, state = tensors(model), step.init()
    torch.manual_seed(0)
    state, _ = step(state, given[0])
    before = optree.tree_map(torch.clone, state)
    fails.now = True
    with pytest.raises(KeyError, match="no such thing") as caught:
        step(state, given[1])
    assert any("the member 'actor'" in note for note in caught.value.__notes__)
    fails.now = False
    if not run.get("donate", True):
        for one, other in zip(optree.tree_leaves(before), optree.tree_leaves(state), strict=True):
            assert torch.equal(one, other)
        return
    assert "holds what critic made" in caught.value.__notes__[-1]
    assert (int(state.step), int(state.clocks["critic"]), int(state.clocks["actor"])) == (1, 2, 1)
    state, _ = step(state, given[2])
    torch.manual_seed(0)
    turns = iter([True, False, True])
    by_hand(plain, given, lambda number: True, lambda number: next(turns))
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))


def test_two_halves_of_a_member():
    model, given = nets(), batches(3)
    start, plain = tensors(model), copy.deepcopy(model)
    step = alternation(model, None)
    state = step.init()
    torch.manual_seed(0)
    for batch in given:
        for name in step.members:
            half = step.compute(state, batch, member=name)
            state, metrics = step.apply_gradients(state, half, member=name)
            assert sorted(metrics) == (["q"] if name == "critic" else ["alpha", "entropy", "pi"])
    torch.manual_seed(0)
    by_hand(plain, given, lambda number: True, lambda number: True)
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))
    assert (int(state.step), int(state.clocks["critic"])) == (0, 3)
    with pytest.raises(ValueError, match="no member is called 'q'; the members are critic, actor"):
        step.compute(state, given[0], member="q")


def test_gradients_of_a_member_change_nothing():
    step = alternation(nets(), None)
    state, batch = step.init(), batches(1)[0]
    torch.manual_seed(1)
    merged = step.gradients(state, batch, member="actor")
    torch.manual_seed(1)
    rows = step.per_loss_gradients(state, batch, member="actor")
    assert {path.split(".")[0] for path in merged} == {"encoder", "actor", "log_alpha"}
    torch.testing.assert_close(rows["alpha"]["log_alpha"], merged["log_alpha"])
    assert step.call(state, lambda model: model["log_alpha"].shape) == torch.Size([])


def test_running_optimizers_move_over_and_back():
    model, given = nets(), batches(6)
    plain, start = copy.deepcopy(model), tensors(model)
    parameters = [*model["encoder"].parameters(), *model["critic"].parameters()]
    adam = torch.optim.Adam(parameters, 1e-2)
    torch.manual_seed(0)
    for batch in given[:2]:
        adam.zero_grad()
        critic_losses(model, batch)["q"].backward()
        adam.step()
    step = ff.alternate(alternation(model, None).members, stop={"actor": 0 + 1}, start={"actor": 0})
    state = step.init(optimizer={"critic": adam}, step=2)
    for batch in given[2:4]:
        state, _ = step(state, batch)
    step.export(state, optimizer={"critic": adam})
    for batch in given[4:]:
        adam.zero_grad()
        critic_losses(model, batch)["q"].backward()
        adam.step()
    torch.manual_seed(0)
    by_hand(plain, given, lambda number: True, lambda number: False)
    assert_moved_alike(start, tensors(model), tensors(plain))
    assert int(state.clocks["critic"]) == 4
    with pytest.raises(ValueError, match="no member is called 'disc'"):
        step.init(optimizer={"disc": adam})
    with pytest.raises(TypeError, match="optimizers go by member"):
        step.init(optimizer=adam)


def test_schedules_read_their_members_clock():
    model = nets()
    seen = {}

    def rate(name):
        def f(count):
            seen.setdefault(name, []).append(int(count))
            return 1e-3 / (1 + count)

        return f

    step = ff.alternate(
        {
            "critic": ff.Step(model, critic_losses, ROUTES["critic"], optimizer=ff.optim.adam(rate("critic"))),
            "actor": ff.Step(model, actor_losses, ROUTES["actor"], optimizer=ff.optim.adam(rate("actor"))),
        },
        every={"actor": 3},
    )
    state = step.init()
    for batch in batches(7):
        state, _ = step(state, batch)
    assert sorted({*seen["critic"]}) == [*range(7)]
    assert sorted({*seen["actor"]}) == [0, 1, 2]


def test_one_table_for_all_members():
    step = alternation(nets(), {"actor": 2})
    table = str(step.plan).splitlines()
    assert table[0].split("  ")[-1].strip() == "actor (every 2)"
    assert table[1].split() == ["parameter", "elements", "q", "pi", "alpha"]
    assert "encoder.0.weight" in table[3]
    assert table[3].split()[1:] == ["48", "1", "1", "·"]
    assert step.plan["critic"].losses == ("q",)
    assert type(step.plan).from_dict(step.plan.to_dict()) == step.plan


def test_a_lone_steps_state_is_adopted():
    model = nets()
    lone = ff.Step(model, critic_losses, ROUTES["critic"], optimizer=ff.optim.adam(1e-2))
    state, _ = lone(lone.init(), batches(1)[0])
    step = alternation(model, None)
    with pytest.raises(ValueError, match=r"it is a lone Step's. alternation.adopt\(state\) takes it over"):
        step(state, batches(1)[0])
    taken, adoption = step.adopt(state)
    assert "params.encoder.0.weight" in adoption.kept
    assert "optimizer" in adoption.left
    assert (int(taken.step), int(taken.clocks["critic"])) == (1, 0)
    taken, _ = step(taken, batches(1)[0])
    with pytest.raises(ValueError, match="clocks of critic, actor: it is the State of an alternation"):
        lone(taken, batches(1)[0])


def test_what_cannot_alternate_is_told_at_once():
    model = nets()
    critic = ff.Step(model, critic_losses, ROUTES["critic"], optimizer=ff.optim.adam(1e-2))
    actor = ff.Step(model, actor_losses, ROUTES["actor"], optimizer=ff.optim.adam(1e-2))
    both = {"critic": critic, "actor": actor}
    with pytest.raises(TypeError, match="members is a mapping name -> Step"):
        ff.alternate([critic, actor])
    with pytest.raises(
        TypeError, match=r"(?s)a\.b.*member 'x' is a funcfreeze.Step, got int.*every: no member is call"
    ):
        ff.alternate({"a.b": critic, "x": 3}, every={"q": 2})
    with pytest.raises(TypeError, match="every goes by member, as in {'critic': 2}; got 5"):
        ff.alternate(both, every=5)
    text = r"(?s)critic: every is an int of at least 1, got 0.*actor: stop is an int above start, got stop=2"
    with pytest.raises(ValueError, match=text):
        ff.alternate(both, every={"critic": 0}, start={"actor": 2}, stop={"actor": 2})
    with pytest.raises(ValueError, match="every is an int of at least 1, got True"):
        ff.alternate(both, every={"critic": True})
    kept = ff.Step(model, critic_losses, ROUTES["critic"], optimizer=ff.optim.adam(1e-2), donate=False)
    with pytest.raises(ValueError, match="donate=False of member 'critic': give donate= to alternate"):
        ff.alternate({**both, "critic": kept})
    other = ff.Step(nets(), critic_losses, ROUTES["critic"], optimizer=ff.optim.adam(1e-2))
    with pytest.raises(ValueError, match=r"(?s)members are over one model.*critic has {encoder: Sequential"):
        ff.alternate({**both, "actor": other})


def test_states_that_do_not_fit_are_told_by_member():
    model, step = nets(), alternation(nets(), None)
    state = step.init()
    with pytest.raises(ValueError, match=r"(?s)clocks\['actor'\]: the State does not have it.*\['pi'\]: no member"):
        step(state.replace(clocks={"critic": torch.tensor(0), "pi": torch.tensor(0)}), batches(1)[0])
    sgd = {"critic": ff.optim.sgd(0.1, momentum=0.9), "actor": ff.optim.sgd(0.1)}
    members = {
        name: ff.Step(model, losses, ROUTES[name], optimizer=sgd[name])
        for name, losses in (("critic", critic_losses), ("actor", actor_losses))
    }
    with pytest.raises(ValueError, match="member 'critic': this State is of another model or optimizer"):
        ff.alternate(members)(state, batches(1)[0])
    with pytest.raises(TypeError, match="expected a State"):
        step((state, {}), batches(1)[0])


@pytest.mark.parametrize("run", SOME_RUNS, ids=RUNS)
def test_verify_takes_it(run):
    model = nets()
    step = alternation(model, {"actor": 2}, **run)
    start, state = tensors(model), step.init()
    state, _ = step(state, batches(1)[0])
    report = ff.verify(step, state, batches(1)[0], steps=3)
    assert report.ok, report
    subjects = {check.subject for check in report.checks}
    assert {"critic: losses", "actor: touched sets", "turns", "encoder.*(3) displacement in turn"} <= {
        subject.replace("* (", "*(") for subject in subjects
    }
    assert_moved_alike(start, tensors(model), start, 0)


def test_verify_sees_members_that_do_not_run_in_turn(monkeypatch):
    step = alternation(nets(), {"actor": 2})
    monkeypatch.setattr("funcfreeze.alternating.members.Members.on_turn", lambda self, calls: iter(self.steps))
    report = ff.verify(step, step.init(), batches(1)[0], steps=2)
    assert not report.ok
    assert "call 1: critic, actor ran, and critic should" in str(report)


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_members_keep_statistics_and_split_batches_of_their_own(run):
    model, given = nets(), batches(4)
    start, plain = tensors(model), copy.deepcopy(model)
    critic = ff.Step(model, critic_losses, ROUTES["critic"], optimizer=optimizers("critic"))
    actor = ff.Step(
        model,
        actor_losses,
        ROUTES["actor"],
        optimizer=optimizers("actor"),
        frozen_statistics="encoder",
        microbatches=5,
    )
    step = ff.alternate({"critic": critic, "actor": actor}, start={"actor": 1}, **run)
    assert "frozen statistics  actor: encoder" in str(step.plan)
    state = step.init()
    torch.manual_seed(0)
    for batch in given:
        state, _ = step(state, batch)
    assert ff.verify(step, state, given[0], steps=2).ok
    torch.manual_seed(0)
    sgd = torch.optim.SGD(
        [*plain["encoder"].parameters(), *plain["actor"].parameters(), plain["log_alpha"]],
        0.05,
        momentum=0.9,
        weight_decay=0.1,
    )
    adam = torch.optim.Adam([*plain["encoder"].parameters(), *plain["critic"].parameters()], 1e-2)
    for number, (x, y) in enumerate(given):
        adam.zero_grad()
        critic_losses(plain, (x, y))["q"].backward()
        adam.step()
        if number:
            sgd.zero_grad()
            plain["critic"].requires_grad_(False)
            plain["encoder"][1].eval()
            for row in range(5):
                found, _ = actor_losses(plain, (x[row : row + 1], y[row : row + 1]))
                (sum(found.values()) / 5).backward()
            plain["encoder"][1].train()
            plain["critic"].requires_grad_(True)
            sgd.step()
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_timed_routes_go_by_their_members_clock(run):
    """The encoder is the actor's from its third step on: at the calls 0, 2, 4, 6 and so on, from 4."""
    model, given = nets(), batches(9)
    start, plain = tensors(model), copy.deepcopy(model)
    routes = {"pi": [ff.Route("actor"), ff.Route("encoder", start=2)], "alpha": "log_alpha"}
    critic = ff.Step(model, critic_losses, ROUTES["critic"], optimizer=optimizers("critic"))
    actor = ff.Step(model, actor_losses, routes, optimizer=optimizers("actor"))
    step = ff.alternate({"critic": critic, "actor": actor}, every={"actor": 2}, **run)
    assert "timed  actor.pi: encoder from 2" in str(step.plan)
    state = step.init()
    torch.manual_seed(0)
    for batch in given:
        state, _ = step(state, batch)
    assert step.traces == (3 if run else 0)
    torch.manual_seed(0)
    sgd = torch.optim.SGD(
        [*plain["encoder"].parameters(), *plain["actor"].parameters(), plain["log_alpha"]],
        0.05,
        momentum=0.9,
        weight_decay=0.1,
    )
    adam = torch.optim.Adam([*plain["encoder"].parameters(), *plain["critic"].parameters()], 1e-2)
    for number, batch in enumerate(given):
        adam.zero_grad()
        critic_losses(plain, batch)["q"].backward()
        adam.step()
        if number % 2 == 0:
            sgd.zero_grad()
            plain["critic"].requires_grad_(False)
            plain["encoder"].requires_grad_(number >= 4)
            sum(actor_losses(plain, batch)[0].values()).backward()
            plain["critic"].requires_grad_(True)
            plain["encoder"].requires_grad_(True)
            sgd.step()
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))
    report = ff.verify(step, step.init(), given[0], steps=6)
    assert report.ok, report


def test_a_member_that_raises_on_what_is_not_finite_leaves_the_state_usable():
    model, (good, _) = nets(), batches(2)
    critic = ff.Step(model, critic_losses, ROUTES["critic"], optimizer=optimizers("critic"))
    actor = ff.Step(model, actor_losses, ROUTES["actor"], optimizer=optimizers("actor"), on_nonfinite="raise")
    step = ff.alternate({"critic": critic, "actor": actor})
    state = step.init()
    bad = {path: value.clone() for path, value in state.params.items()}
    bad["actor.bias"] = torch.full_like(bad["actor.bias"], float("nan"))
    state = state.replace(params=bad)
    with pytest.raises(FloatingPointError, match="pi is nan") as caught:
        step(state, good)
    assert "the member 'actor'" in caught.value.__notes__[-1]
    assert (int(state.step), int(state.clocks["critic"]), int(state.clocks["actor"])) == (0, 1, 0)
    mended = state.replace(params={**state.params, "actor.bias": torch.zeros(3)})
    after, _ = step(mended, good)
    assert int(after.clocks["actor"]) == 1


class Reads(TorchDispatchMode):
    """Counts values that are read from tensors, for which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_whose_turn_it_is_is_not_asked_of_the_device():
    step = alternation(nets(), {"actor": 2})
    state = step.init()
    for batch in batches(2):
        state, _ = step(state, batch)
    with Reads() as reads:
        for batch in batches(4):
            state, _ = step(state, batch)
        assert reads.count == 0
        moved = state.replace(step=torch.tensor(6))
        moved, _ = step(moved, batches(1)[0])
        assert reads.count == 1  # the number of calls, of a state that no call made


def test_compiled_members_overwrite_the_same_memory():
    """What CUDA graphs count on."""
    step = alternation(nets(), {"actor": 2}, compile=GRAPH)
    state = step.init()
    for batch in batches(2):
        state, _ = step(state, batch)

    def places(state):
        kept = (state.params, state.buffers, state.optimizer, state.clocks)
        return [leaf.data_ptr() for leaf in optree.tree_leaves(kept)]

    before = places(state)
    for batch in batches(3):
        state, _ = step(state, batch)
    assert places(state) == before
