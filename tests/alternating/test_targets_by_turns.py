"""Averaged twins among members that take turns: actor-critics and GANs as people write them in plain torch."""

from __future__ import annotations

import copy

import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff
from twins import GRAPH, assert_is_the_loop, assert_moved_alike, averaged, descend, tensors, train, twin_of
from twins_by_turns import (
    PROGRAMS,
    sac_nets,
    sac_step,
    td3_actor_losses,
    td3_by_hand,
    td3_critic_losses,
    td3_nets,
    td3_step,
    transitions,
)

SLOW = pytest.mark.slow


RUNS = {
    "eager": {},
    "kept": {"donate": False},
    "reference": {"engine": "reference"},
    "toggle": {"engine": "toggle"},
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_the_loop(program, run):
    assert_is_the_loop(program, run)


@pytest.mark.parametrize("donate", [True, pytest.param(False, marks=SLOW)], ids=["donated", "kept"])
@pytest.mark.parametrize("name", ["SAC", *(pytest.param(name, marks=SLOW) for name in ("TD3", "DDPG", "GAN"))])
def test_the_loop_compiled(name, donate):
    assert_is_the_loop(PROGRAMS[name], {"compile": GRAPH, "donate": donate})


@pytest.mark.parametrize("name", PROGRAMS)
def test_verify(name):
    program = PROGRAMS[name]
    step = program.step(program.nets())
    state, given = step.init(), program.given(2)
    state, _ = step(state, given[0])
    report = ff.verify(step, state, given[1], steps=3)
    assert report.ok, report


def test_members_after_the_one_that_moves_a_twin_see_it_moved():
    nets, given = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}, [torch.randn(5, 4) for _ in range(4)]
    plain, start = copy.deepcopy(nets), tensors(nets)

    def first(nets, x, *, targets):
        return {"first": (nets["a"](x) - targets["slow"](x) + 1).square().mean()}

    def second(nets, x, *, targets):
        return {"second": (nets["b"](x) - targets["slow"](x)).square().mean()}

    sgd = ff.optim.sgd(0.1)
    mover = ff.Step(nets, first, {"first": "a"}, optimizer=sgd, targets={"slow": ff.ema("a", 0.5)})
    step = ff.alternate({"one": mover, "two": ff.Step(nets, second, {"second": "b"}, optimizer=sgd)})
    state = step.init()
    for x in given:
        state, _ = step(state, x)
    slow, one, two = twin_of(plain["a"]), *(torch.optim.SGD(plain[name].parameters(), 0.1) for name in "ab")
    for x in given:
        descend(one, (plain["a"](x) - slow(x) + 1).square().mean())
        averaged(slow, plain["a"], 0.5)
        descend(two, (plain["b"](x) - slow(x)).square().mean())
    assert_moved_alike(start, dict(state.params), tensors(plain))
    torch.testing.assert_close(dict(state.targets["slow"]), tensors(slow))


def test_the_plan_shows_targets_of_all_members():
    lines = str(sac_step(sac_nets()).plan).splitlines()
    assert "targets  q: ema 0.8, after critic, own buffers" in lines
    lines = str(td3_step(td3_nets()).plan).splitlines()
    shown = [line for line in lines if line.startswith("targets  ")]
    assert shown == [
        "targets  q: ema 0.8, after actor, own buffers",
        "targets  actor: ema 0.7, after actor, own buffers",
    ]


def test_evaluation_export_and_gradients():
    """A player acts with the average; a member's gradients see it and move nothing."""
    nets, given = sac_nets(), transitions(3)
    step = sac_step(nets)
    state, _ = train(PROGRAMS["SAC"], step, step.init(), given)
    kept = {path: tensor.clone() for path, tensor in state.targets["q"].items()}
    plain = copy.deepcopy(nets["q"])
    plain.load_state_dict(kept)
    x = torch.randn(5, 6)

    def value(nets, x):
        nets["q"].eval()
        return nets["q"][1](x)

    got = step.call(state, value, x, targets="q")
    torch.testing.assert_close(got, plain.eval()[1](x))
    assert not torch.equal(got, step.call(state, value, x))
    step.gradients(state, given[0], member="critic")
    step.per_loss_gradients(state, given[0], member="critic")
    assert all(torch.equal(tensor, state.targets["q"][path]) for path, tensor in kept.items())
    step.export(state, targets="q")
    assert all(torch.equal(tensor, nets["q"].state_dict()[path]) for path, tensor in kept.items())
    assert torch.equal(nets["log_alpha"], state.params["log_alpha"])


def test_halves_move_the_twins_of_their_member():
    nets, given = td3_nets(), transitions(4)
    plain, start = copy.deepcopy(nets), tensors(nets)
    step = td3_step(nets)
    state = step.init()
    torch.manual_seed(0)
    for number, batch in enumerate(given):
        for name in ("critic", "actor")[: 1 + number % 2]:
            half = step.compute(state, batch, member=name)
            state, _ = step.apply_gradients(state, half, member=name)
    torch.manual_seed(0)
    twins, _ = td3_by_hand(plain, given)
    assert_moved_alike(start, {**state.params, **state.buffers}, tensors(plain))
    for name, twin in twins.items():
        torch.testing.assert_close(dict(state.targets[name]), tensors(twin), rtol=0, atol=1e-10)


def test_a_members_own_clock_times_its_twins():
    """`every` and the decay count the actor's steps, not the calls."""
    nets, given, seen = td3_nets(), transitions(9), []

    def decay(count):
        seen.append(int(count))
        return 0.5

    critic = ff.Step(nets, td3_critic_losses, {"q": "q"}, optimizer=ff.optim.sgd(0.1))
    averages = {"actor": ff.ema("actor", 0.0, every=2, start=1), "q": ff.ema("q", decay, stop=2)}
    actor = ff.Step(nets, td3_actor_losses, {"pi": "actor"}, optimizer=ff.optim.sgd(0.1), targets=averages)
    step = ff.alternate({"critic": critic, "actor": actor}, every={"actor": 3})
    state, copied_at, moved_at = step.init(), [], []
    for number, batch in enumerate(given):
        before = {name: {path: t.clone() for path, t in state.targets[name].items()} for name in averages}
        state, _ = step(state, batch)
        after = state.targets
        if any(not torch.equal(tensor, after["actor"][path]) for path, tensor in before["actor"].items()):
            copied_at.append(number)
            assert all(torch.equal(t, state.params[f"actor.{path}"]) for path, t in after["actor"].items())
        if any(not torch.equal(tensor, after["q"][path]) for path, tensor in before["q"].items()):
            moved_at.append(number)
    assert copied_at == [3]
    assert moved_at == [0, 3]
    assert sorted({*seen} & {0, 1}) == [0, 1]


def test_an_error_in_a_later_member_leaves_the_twins_that_moved():
    nets, (first, second) = td3_nets(), transitions(2)

    def fails(nets, batch, *, targets):
        raise KeyError("no such thing")

    sgd = ff.optim.sgd(0.1)
    critic = ff.Step(
        nets,
        td3_critic_losses,
        {"q": "q"},
        optimizer=sgd,
        targets={"q": ff.ema("q", 0.5), "actor": ff.ema("actor", 0.5)},
    )
    step = ff.alternate(
        {"critic": critic, "actor": ff.Step(nets, fails, {"pi": "actor"}, optimizer=sgd)}, start={"actor": 1}
    )
    state, _ = step(step.init(), first)
    torch.manual_seed(0)
    alone = ff.alternate({"critic": critic})
    wanted, _ = alone(alone.adopt(copy.deepcopy(state))[0], second)
    torch.manual_seed(0)
    with pytest.raises(KeyError, match="no such thing"):
        step(state, second)
    torch.testing.assert_close(dict(state.targets["q"]), dict(wanted.targets["q"]))
    torch.testing.assert_close(dict(state.params), dict(wanted.params))


def test_states_go_between_an_alternation_and_a_lone_step():
    nets, batch = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}, torch.randn(5, 4)

    def first(nets, x, *, targets):
        return {"first": (nets["a"](x) - targets["slow"](x) + 1).square().mean()}

    adam = ff.optim.adam(0.1)
    one = ff.Step(nets, first, {"first": "a"}, optimizer=adam, targets={"slow": ff.ema("a", 0.5)})
    two = ff.Step(nets, lambda nets, x: {"second": nets["b"](x).square().mean()}, {"second": "b"}, optimizer=adam)
    both, alone = ff.alternate({"one": one, "two": two}), ff.alternate({"two": two})
    state, _ = one(one.init(), batch)
    kept = {path: tensor.clone() for path, tensor in state.targets["slow"].items()}
    taken, adoption = both.adopt(state)
    assert "targets.slow.weight" in adoption.kept
    torch.testing.assert_close(dict(taken.targets["slow"]), kept, rtol=0, atol=0)
    taken, _ = both(taken, batch)
    kept = {path: tensor.clone() for path, tensor in taken.targets["slow"].items()}
    back, adoption = one.adopt(taken)
    torch.testing.assert_close(dict(back.targets["slow"]), kept, rtol=0, atol=0)
    one(back, batch)
    state, _ = alone(alone.init(), batch)
    kept = {path: state.params[f"a.{path}"].clone() for path in ("weight", "bias")}
    taken, adoption = both.adopt(state)
    torch.testing.assert_close(dict(taken.targets["slow"]), kept, rtol=0, atol=0)
    assert any(line.startswith("targets.slow.weight: the state does not have it") for line in adoption.afresh)
    left, adoption = alone.adopt(taken)
    assert left.targets == {}
    assert {"targets.slow.weight", "targets.slow.bias"} <= {*adoption.left}


def test_compiled_members_overwrite_the_same_memory():
    """What CUDA graphs count on."""
    step = td3_step(td3_nets(), compile=GRAPH)
    state = step.init()
    for batch in transitions(3):
        state, _ = step(state, batch)

    def places(state):
        return [leaf.data_ptr() for leaf in optree.tree_leaves((state.params, state.targets, state.clocks))]

    before = places(state)
    for batch in transitions(3):
        state, _ = step(state, batch)
    assert places(state) == before


def looking_at_one_twin(nets, **run):
    """What is shared goes through the encoder and the twin, which a member moves before another walks back."""

    def seen(nets, x, *, targets):
        return targets["a"](nets["encoder"](x))

    def first(nets, x, *, shared):
        return {"first": (nets["a"](x) - shared + 1).square().mean()}

    def second(nets, x, *, shared):
        return {"second": (nets["b"](shared) - 1).square().mean()}

    sgd = ff.optim.sgd(0.5)
    one = ff.Step(nets, first, {"first": "a"}, optimizer=sgd, targets={"a": ff.ema("a", 0.5)})
    two = ff.Step(nets, second, {"second": ["b", "encoder"]}, optimizer=sgd)
    return ff.alternate({"one": one, "two": two}, shared=seen, **run)


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"donate": False},
    ],
    ids=["eager", "kept"],
)
def test_what_is_shared_may_go_through_a_twin(run):
    nets = {"encoder": nn.Linear(4, 4), "a": nn.Linear(4, 2), "b": nn.Linear(2, 2)}
    step, given = looking_at_one_twin(nets, **run), [torch.randn(6, 4) for _ in range(3)]
    plain, start, state = copy.deepcopy(nets), tensors(nets), step.init()
    for x in given:
        state, _ = step(state, x)
    twin = twin_of(plain["a"])
    one = torch.optim.SGD(plain["a"].parameters(), 0.5)
    two = torch.optim.SGD([*plain["b"].parameters(), *plain["encoder"].parameters()], 0.5)
    for x in given:
        shared = copy.deepcopy(twin)(plain["encoder"](x))
        descend(one, (plain["a"](x) - shared.detach() + 1).square().mean())
        averaged(twin, plain["a"], 0.5)
        descend(two, (plain["b"](shared) - 1).square().mean())
    assert_moved_alike(start, dict(state.params), tensors(plain))
    torch.testing.assert_close(dict(state.targets["a"]), tensors(twin))


def test_verify_takes_what_is_shared_through_a_twin():
    nets = {"encoder": nn.Linear(4, 4), "a": nn.Linear(4, 2), "b": nn.Linear(2, 2)}
    step = looking_at_one_twin(nets, donate=False)
    assert ff.verify(step, step.init(), torch.randn(6, 4)).ok


def test_what_is_wrong_with_members_targets():
    nets = td3_nets()
    sgd = ff.optim.sgd(0.1)

    def members(critic, actor):
        return {
            "critic": ff.Step(nets, td3_critic_losses, {"q": "q"}, optimizer=sgd, targets=critic),
            "actor": ff.Step(nets, td3_actor_losses, {"pi": "actor"}, optimizer=sgd, targets=actor),
        }

    q = ff.ema("q", 0.5)
    with pytest.raises(ValueError, match=r"(?s)'q'.*critic.*actor"):
        ff.alternate(members({"q": q}, {"q": q}))
    with pytest.raises(
        ValueError, match=r"(?s)member 'critic': `losses` names 'targets': neither this Step nor.*declares any"
    ):
        ff.alternate(members(None, None))
    one = ff.alternate(members({"q": q, "actor": ff.ema("actor", 0.5)}, None))
    other = ff.alternate(members({"q": q}, {"actor": ff.ema("actor", 0.5)}))
    batch = transitions(1)[0]
    one(other.init(), batch)  # who moves them is not the state's affair
    with pytest.raises(
        ValueError, match=r"(?s)targets: the members have q, actor, the State does not.*alternation.adopt\(state\)"
    ):
        one(one.init().replace(targets={}), batch)
