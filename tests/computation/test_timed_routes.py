"""Timed routes against the loop that people write: `requires_grad` toggled by the step's number."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import funcfreeze as ff
import timed
from timed import OPTIMIZERS, PROGRAMS

SLOW = pytest.mark.slow


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("options", [{}, {"engine": "reference"}, {"engine": "toggle"}, {"donate": False}], ids=str)
def test_a_run_equals_the_loop_that_toggles(name, optimizer, options):
    program, (ours, theirs) = PROGRAMS[name], OPTIMIZERS[optimizer]
    model, given = program.model(), timed.batches(program.steps)
    wanted, values, running = timed.by_hand(program, model, given, theirs)
    step = ff.Step(copy.deepcopy(model), program.losses, program.routes, optimizer=ours, **options)
    state, seen = timed.run(step, step.init(), given)
    timed.assert_moved_alike(model, state, wanted)
    assert [row.keys() for row in seen] == [row.keys() for row in values]  # also of losses that update nothing now
    for mine, other in zip(seen, values, strict=True):
        assert mine == pytest.approx(other, abs=1e-10)
    for path in step.plan.routed:
        parameter = wanted.get_parameter(path)
        kept = running.state.get(parameter, {})
        if "step" in kept:
            assert state.optimizer[path]["step"] == kept["step"], path
        if not kept:
            assert all(not tensor.any() for tensor in state.optimizer[path].values()), path


def test_the_program_shows_what_it_says():
    for program in PROGRAMS.values():
        active = {tuple(program.active(count)) for count in range(program.steps)}
        assert len(active) == program.active_sets


@pytest.mark.parametrize("options", [{}, pytest.param({"compile": timed.COMPILED}, marks=SLOW)], ids=str)
def test_a_restored_state_goes_on_at_its_count(options):
    program, (ours, theirs) = PROGRAMS["all at once"], OPTIMIZERS["adamw"]
    model, given = program.model(), timed.batches(8)
    wanted, _, _ = timed.by_hand(program, model, given, theirs)

    def make():
        return ff.Step(copy.deepcopy(model), program.losses, program.routes, optimizer=ours, **options)

    step = make()
    state, _ = timed.run(step, step.init(), given[:3])
    state, _ = timed.run(make(), pickle.loads(pickle.dumps(state)), given[3:5], first=3)
    state = ff.State(state.params, state.buffers, state.optimizer, state.step)
    state, _ = timed.run(make(), state, given[5:6], first=5)
    state, _ = timed.run(make(), copy.deepcopy(state), given[6:], first=6)
    timed.assert_moved_alike(model, state, wanted)


@pytest.mark.parametrize("given", ["replace", "init"])
def test_a_count_that_is_given(given):
    program, (ours, theirs) = PROGRAMS["all at once"], OPTIMIZERS["sgd"]
    model, batches = program.model(), timed.batches(5)
    wanted, _, _ = timed.by_hand(program, model, batches, theirs, first=3)
    step = ff.Step(copy.deepcopy(model), program.losses, program.routes, optimizer=ours)
    state = step.init(step=3) if given == "init" else step.init().replace(step=torch.tensor(3))
    state, _ = timed.run(step, state, batches, first=3)
    timed.assert_moved_alike(model, state, wanted)
    assert state.step == 8


def test_no_step_asks_the_device_for_the_count(monkeypatch):
    program = PROGRAMS["all at once"]
    step = ff.Step(program.model(), program.losses, program.routes, optimizer=ff.optim.adam(0.1))
    untimed = ff.Step(step.model, program.losses, {"cls": "*", "dom": "dom"}, optimizer=ff.optim.adam(0.1))
    asked = []
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: asked.append(tensor) or tensor.item())
    state = step.init()
    for turn, batch in enumerate(timed.batches(6)):  # a step that has no timed route counts on, too
        state, _ = (untimed if turn == 2 else step)(state, batch)
    state, _ = step(state.replace(params=dict(state.params)), batch)
    state, _ = step.apply_gradients(state, step.compute(state, batch))
    assert not asked
    state = state.replace(step=torch.tensor(2))
    for _ in range(3):
        state, _ = step(state, batch)
    assert len(asked) == 1


def test_two_halves_are_the_step():
    program, (ours, _) = PROGRAMS["a body that rests and starts afresh"], OPTIMIZERS["adamw"]
    step = ff.Step(program.model(), program.losses, program.routes, optimizer=ours, donate=False)
    whole = halves = step.init()
    for count, batch in enumerate(timed.batches(program.steps)):
        torch.manual_seed(count)
        whole, _ = step(whole, batch)
        torch.manual_seed(count)
        half = step.compute(halves, batch)
        touched = {name for _, name, _ in program.active(count)}
        assert {path.split(".")[0] for path in half.gradients} == touched
        torch.manual_seed(count)
        apart = step.compute(halves, batch, per_loss=True)
        torch.manual_seed(count)
        assert step.per_loss_gradients(halves, batch)["cls"].keys() == half.gradients.keys()
        assert apart.per_loss["cls"].keys() == half.gradients.keys() == step.gradients(halves, batch).keys()
        halves, _ = step.apply_gradients(halves, half)
        assert all(map(torch.equal, whole.params.values(), halves.params.values()))


def test_a_half_may_not_move_what_rests():
    program = PROGRAMS["linear probe, then all afresh"]
    step = ff.Step(program.model(), program.losses, program.routes, optimizer=ff.optim.sgd(0.1))
    state = step.init()
    half = step.compute(state, timed.batches(1)[0])
    gradients = {**half.gradients, "encoder.1.bias": torch.zeros(5)}
    with pytest.raises(
        ValueError, match=r"gradients\['encoder.1.bias'\]: none of its routes is active at count 0; leave it out"
    ):
        step.apply_gradients(state, half.replace(gradients=gradients))


TRANSFORMS = {
    "chain": lambda: ff.optim.chain(ff.optim.clip_by_global_norm(1e6), ff.optim.adamw(0.05, weight_decay=0.1)),
    "partition": lambda: ff.optim.partition(
        {"encoder": ff.optim.adamw(0.05, weight_decay=0.1), "cls": ff.optim.adamw(0.05, weight_decay=0.1)}
    ),
    "from_torch": lambda: ff.optim.from_torch(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("scaled", [None, ff.LossScale(init=8.0, growth_interval=3)], ids=["", "scaled"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_state_starts_afresh_wherever_it_is_kept(transform, scaled):
    program, (_, theirs) = PROGRAMS["a body that rests and starts afresh"], OPTIMIZERS["adamw"]
    model, given = program.model(), timed.batches(program.steps)
    wanted, _, _ = timed.by_hand(program, model, given, theirs)
    step = ff.Step(
        copy.deepcopy(model), program.losses, program.routes, optimizer=TRANSFORMS[transform](), loss_scale=scaled
    )
    state, _ = timed.run(step, step.init(), given)
    timed.assert_moved_alike(model, state, wanted)
    if scaled is not None:
        assert state.optimizer["loss_scale"]["scale"] == 64.0


def test_the_route_that_thaws_decides():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})

    def losses(model, x):
        h = model["body"](x)
        return {"a": model["head"](h).square().mean(), "b": h.square().mean()}

    def counts(routes, steps=8):
        step = ff.Step(copy.deepcopy(model), losses, routes, optimizer=ff.optim.adam(0.1))
        state, found = step.init(), []
        for _ in range(steps):
            state, _ = step(state, torch.ones(3, 2))
            found.append(int(state.optimizer["body.weight"]["step"]))
        return found

    rests = {"a": [ff.Route("head"), ff.Route("body", stop=2)]}
    assert counts({**rests, "b": ff.Route("body", start=4)}) == [1, 2, 2, 2, 3, 4, 5, 6]
    assert counts({**rests, "b": ff.Route("body", start=4, reset=True)}) == [1, 2, 2, 2, 1, 2, 3, 4]
    assert counts({**rests, "b": ff.Route("body", start=2, reset=True)}) == [1, 2, 3, 4, 5, 6, 7, 8]  # it never rested
    # another route has thawed it when the one with reset comes
    others = {**rests, "a": [ff.Route("head"), ff.Route("body", stop=2), ff.Route("body", start=4)]}
    assert counts({**others, "b": ff.Route("body", start=5, reset=True)}) == [1, 2, 2, 2, 3, 4, 5, 6]
    assert counts({"a": "head", "b": ff.Route("body", every=3, reset=True)}) == [1, 1, 1, 1, 1, 1, 1, 1]


def test_an_absent_loss_does_not_put_a_reset_off():
    model = nn.ModuleDict({"body": nn.Linear(2, 2)})
    is_absent = [False]

    def losses(model, x):
        return {"a": None if is_absent[0] else model["body"](x).square().mean()}

    routes = {"a": [ff.Route("body", stop=1), ff.Route("body", start=2, reset=True)]}
    step = ff.Step(model, losses, routes, optimizer=ff.optim.adam(0.1))
    state = step.init()
    for is_absent[0] in (False, False, True):
        state, _ = step(state, torch.ones(3, 2))
    assert state.optimizer["body.weight"]["step"] == 0


def test_a_state_of_another_step_starts_afresh_where_a_route_says_so():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})

    def losses(model, x):
        return {"a": model["head"](model["body"](x)).square().mean()}

    adam = ff.optim.adam(0.1)
    trained = ff.Step(model, losses, {"a": "*"}, optimizer=adam)
    state = trained.init()
    for _ in range(3):
        state, _ = trained(state, torch.ones(3, 2))
    step = ff.Step(model, losses, {"a": [ff.Route("head"), ff.Route("body", start=4, reset=True)]}, optimizer=adam)
    state, _adoption = step.adopt(state)
    for counted in (3, 1, 2):
        state, _ = step(state, torch.ones(3, 2))
        assert state.optimizer["body.weight"]["step"] == counted
    assert state.optimizer["head.weight"]["step"] == 6


@pytest.mark.parametrize("options", [{}, {"donate": False}, {"compile": timed.COMPILED}], ids=str)
def test_a_step_that_fails_where_state_starts_afresh_changes_nothing(options):
    program = PROGRAMS["a body that rests and starts afresh"]
    step = ff.Step(program.model(), program.losses, program.routes, optimizer=ff.optim.adamw(0.1), **options)
    state, _ = timed.run(step, step.init(), timed.batches(5))
    before = copy.deepcopy(state)
    with pytest.raises(Exception, match="mat1 and mat2|shape"):
        step(state, torch.randn(3, 7))
    for path, entry in before.optimizer.items():
        assert all(torch.equal(kept, state.optimizer[path][slot]) for slot, kept in entry.items())
    assert any(tensor.any() for tensor in state.optimizer["encoder.0.weight"].values())
    timed.run(step, state, timed.batches(1), first=5)


def test_where_nothing_is_active_the_forward_runs_and_nothing_moves():
    model = timed.network()
    step = ff.Step(
        model, timed.adversarial, {"cls": ff.Route("*", start=2), "dom": ff.Route("encoder", start=3)},
        optimizer=ff.optim.adamw(0.1, weight_decay=0.5), donate=False,
    )  # fmt: skip
    start = step.init()
    state, metrics = step(start, torch.randn(6, 4))
    assert metrics.keys() == {"cls", "dom"}
    assert all(map(torch.equal, start.params.values(), state.params.values()))
    assert state.step == 1
    assert state.buffers["encoder.1.num_batches_tracked"] == 1
    assert step.gradients(state, torch.randn(6, 4)) == {}
    assert step.per_loss_gradients(state, torch.randn(6, 4)) == {"cls": {}, "dom": {}}


def test_a_weight_of_zero_is_another_thing():
    model = timed.network()
    step = ff.Step(
        model, timed.adversarial, {"cls": {"encoder": 0.0}, "dom": ff.Route("dom", start=2)},
        optimizer=ff.optim.adamw(0.1, weight_decay=0.5), donate=False,
    )  # fmt: skip
    start = step.init()
    state, _ = step(start, torch.randn(6, 4))
    assert not torch.equal(state.params["encoder.0.weight"], start.params["encoder.0.weight"])
    assert torch.equal(state.params["dom.weight"], start.params["dom.weight"])


def test_what_rests_is_a_constant_in_the_forward():
    model, seen = timed.network(), []
    model["encoder"][0].weight.register_hook(lambda gradient: seen.append("hook"))

    def losses(model, batch):
        found = timed.adversarial(model, batch)
        seen.append(model["encoder"][0].weight.requires_grad)
        return found

    step = ff.Step(
        model, losses, {"cls": [ff.Route("cls"), ff.Route("encoder", start=1)], "dom": "dom"},
        optimizer=ff.optim.sgd(0.1),
    )  # fmt: skip
    state = step.init()
    state, _ = step(state, torch.randn(6, 4))
    assert seen == [False]
    step(state, torch.randn(6, 4))
    assert seen == [False, True, "hook"]


def adaptive(model, batch):
    found = timed.adversarial(model, batch)
    (gradient,) = torch.autograd.grad(found["cls"], model["encoder"][0].weight, retain_graph=True)
    return {"cls": found["cls"] * (1 + gradient.norm().detach()), "dom": found["dom"]}


def test_losses_that_differentiate_at_what_rests():
    routes = {"cls": [ff.Route("cls"), ff.Route("encoder", start=1)], "dom": "dom"}
    step = ff.Step(timed.network(), adaptive, routes, optimizer=ff.optim.sgd(0.1))
    with pytest.raises(
        RuntimeError,
        match=r"at encoder.0.weight, which no loss may update at this count, where its routes are not active: that is "
        r"a constant in a Step's forward.*differentiable='encoder.0.weight'",
    ):
        step(step.init(), torch.randn(6, 4))
    step = ff.Step(timed.network(), adaptive, routes, optimizer=ff.optim.sgd(0.1), differentiable="encoder.0.weight")
    state, touched = step.init(), []
    for _ in range(2):
        touched.append({path.split(".")[0] for path in step.gradients(state, torch.randn(6, 4))})
        state, _ = step(state, torch.randn(6, 4))
    assert touched == [{"cls", "dom"}, {"encoder", "cls", "dom"}]


def test_a_loss_that_was_detached_is_found_where_its_routes_are_active():
    def losses(model, x):
        return {"a": model["head"](x).square().mean().detach()}

    routes = {"a": ff.Route("head", start=1)}
    step = ff.Step({"head": nn.Linear(2, 1)}, losses, routes, optimizer=ff.optim.sgd(0.1))
    state, _ = step(step.init(), torch.ones(3, 2))
    with pytest.raises(ff.RouteError, match="loss 'a' does not require grad"):
        step(state, torch.ones(3, 2))


def test_writing_to_what_rests_is_an_error_all_the_same():
    def losses(model, x):
        with torch.no_grad():
            model["head"].weight.mul_(0.9)
        return {"a": model["head"](x).square().mean(), "b": model["other"](x).square().mean()}

    routes = {"a": ff.Route("head", start=5), "b": "other"}
    step = ff.Step({"head": nn.Linear(2, 1), "other": nn.Linear(2, 1)}, losses, routes, optimizer=ff.optim.sgd(0.1))
    with pytest.raises(RuntimeError, match="writes to parameter head.weight, which a loss may update"):
        step(step.init(), torch.ones(3, 2))


def test_a_schedule_of_the_weight_reads_the_same_count():
    routes = {"a": ff.Route("head", weight=ff.schedules.linear(0.0, 1.0, 10), start=2, every=2)}

    def losses(model, x):
        return {"a": model["head"](x).mean()}

    step = ff.Step({"head": nn.Linear(2, 1)}, losses, routes, optimizer=ff.optim.sgd(0.0))
    state, found = step.init(), []
    for _ in range(6):
        found.append(step.gradients(state, torch.ones(3, 2)).get("head.bias"))
        state, _ = step(state, torch.ones(3, 2))
    assert [None if g is None else round(g.item(), 10) for g in found] == [None, None, 0.2, None, 0.4, None]


def test_an_optimizer_that_cannot_start_a_parameter_afresh():
    momentum = ff.optim.Transform(
        lambda params: [torch.zeros_like(p) for p in params.values()],
        lambda grads, state, params, step=None: (grads, state),
    )
    routes = {"cls": ff.Route("cls", start=3, reset=True), "dom": "dom"}
    with pytest.raises(
        ValueError,
        match=r"reset=True starts .* keeps tensors otherwise than by parameter .*:\n  cls.weight\n  cls.bias",
    ):
        ff.Step(timed.network(), timed.adversarial, routes, optimizer=momentum)
