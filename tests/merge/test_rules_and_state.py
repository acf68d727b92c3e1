"""What rules keep belongs to their losses and is nobody else's; what complex gradients become."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.merge import Rule

GRAPH = {"backend": "aot_eager"}


def network():
    return nn.ModuleDict({"trunk": nn.Linear(3, 4), **{name: nn.Linear(4, 1) for name in "abc"}})


def losses_of(names):
    def losses(model, x):
        h = model["trunk"](x).tanh()
        return {name: model[name](h).sin().square().mean() * (1 + "abc".index(name)) for name in names}

    return losses


def step_for(names, rule, model=None, **options):
    routes = {name: ["trunk", name] for name in names}
    given = {"optimizer": ff.optim.sgd(0.1), "merge": {"trunk": rule}, **options}
    return ff.Step(model or network(), losses_of(names), routes, **given)


class Numbers(nn.Module):
    """Complex parameters after an odd number of real ones, and their conjugates."""

    def __init__(self):
        super().__init__()
        self.real, self.z = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, dtype=torch.complex128))


def waves(model, x):
    up = (model.z.conj() * x).real.sum() + model.real.square().sum()
    return {"a": up, "b": model.z.conj().sum().abs().square() * model.real.sin().sum()}


@pytest.mark.parametrize("compile", [False, GRAPH], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "rule", [ff.merge.mean(), Rule(vector=lambda meeting: meeting.matrix.mean(0), name="by hand")], ids=repr
)
def test_complex_ones_beside_an_odd_number_of_real_ones(rule, compile):
    model, x = Numbers(), torch.randn(2, dtype=torch.complex128)
    routes = {"a": "*", "b": "*"}
    step = ff.Step(copy.deepcopy(model), waves, routes, optimizer=ff.optim.sgd(1.0), merge=rule, compile=compile)
    state, _ = step(step.init(), x)
    half = {name: 0.5 * loss for name, loss in waves(model, x).items()}
    wanted = torch.autograd.grad(sum(half.values()), [model.real, model.z])
    for path, gradient in zip(("real", "z"), wanted, strict=True):
        torch.testing.assert_close(state.params[path], model.get_parameter(path).detach() - gradient)


@pytest.mark.parametrize("compile", [False, GRAPH], ids=["eager", "compiled"])
def test_what_init_gives_is_not_written_to(compile):
    begun = torch.ones(2)
    kept = {"norms": begun}

    def decide(meeting):
        norms = 0.5 * meeting.state["norms"] + 0.5 * meeting.norms
        return 1 / norms, {"norms": norms}

    step = step_for("ab", Rule(decide, init=lambda losses: kept), compile=compile)
    state = step.init()
    for _ in range(3):
        state, _ = step(state, torch.randn(5, 3))
    assert torch.equal(begun, torch.ones(2))
    (now,) = state.optimizer["merge"]["trunk"].values()
    assert not torch.equal(now["norms"], begun)


def test_what_belongs_to_other_losses_is_not_adopted():
    rule = ff.merge.gradnorm(lr=0.5)
    first = step_for("ab", rule)
    state = first.init()
    for _ in range(3):
        state, _ = first(state, torch.randn(5, 3))
    for names in ("ba", "ac", "abc"):
        other = step_for(names, rule)
        taken, adoption = other.adopt(copy.deepcopy(state))
        (own,) = taken.optimizer["merge"]["trunk"].values()
        assert torch.equal(own["weights"], torch.ones(len(names)))
        assert any("merge" in line for line in adoption.afresh), adoption
    taken, adoption = step_for("ab", rule).adopt(copy.deepcopy(state))
    (own,) = taken.optimizer["merge"]["trunk"].values()
    assert not torch.equal(own["weights"], torch.ones(2))
    assert adoption.afresh == ()


def test_a_rule_of_ones_own_is_none_of_ours_by_its_name():
    plan = ff.plan(network(), {"a": "*", "b": "*"}, merge=Rule(lambda meeting: 2 * meeting.norms, name="mean"))
    with pytest.raises(ff.RouteError, match=r"the merge rule mean\(\) of '\*' was a function"):
        ff.Plan.from_dict(plan.to_dict())


@pytest.mark.parametrize(
    ("given", "told"),
    [(None, "its `init` gave NoneType"), (torch.ones(2), "its `init` gave Tensor"), ({"n": 3}, "n is none")],
    ids=["nothing", "a tensor", "a number"],
)
def test_an_init_that_gives_something_else(given, told):
    rule = Rule(lambda meeting: (meeting.norms, {}), init=lambda losses: given, name="mine")
    with pytest.raises(TypeError, match=rf"merge 'trunk': the state of mine\(\) is tensors by name; {told}"):
        step_for("ab", rule)


def test_an_expanded_beginning():
    def decide(meeting):
        return meeting.norms, {"w": meeting.state["w"] + 1}

    rule = Rule(decide, init=lambda losses: {"w": torch.zeros(1).expand(losses)})
    step = step_for("ab", rule, compile=GRAPH)
    state, _ = step(step.init(), torch.randn(5, 3))
    (kept,) = state.optimizer["merge"]["trunk"].values()
    assert torch.equal(kept["w"], torch.ones(2))
