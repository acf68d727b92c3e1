"""Timed routes in loops of the user's own: `step=` says what is active."""

from __future__ import annotations

import copy

import pytest
import sympy
import torch

import funcfreeze as ff
import timed
from timed import OPTIMIZERS, PROGRAMS


@pytest.mark.parametrize("way", ["backward", "combine"])
@pytest.mark.parametrize(
    "name", ["all at once", "overlapping", "gradual unfreezing", "a discriminator that starts late"]
)
def test_a_loop_equals_the_one_that_toggles(name, way):
    program, (_, theirs) = PROGRAMS[name], OPTIMIZERS["adamw"]
    model, given = program.model(), timed.batches(program.steps)
    wanted, _, _ = timed.by_hand(program, model, given, theirs)
    own = copy.deepcopy(model)
    plan, optimizer = ff.plan(own, program.routes), theirs(own.parameters())
    for count, batch in enumerate(given):
        torch.manual_seed(count)
        optimizer.zero_grad()
        losses = program.losses(own, batch)
        step = torch.tensor(count) if count % 2 else count
        if way == "backward":
            ff.backward(losses, plan if count % 3 else program.routes, own, step=step)
        else:
            ff.combine(losses, plan if count % 3 else program.routes, own, step=step).backward()
        optimizer.step()
    before = dict(model.named_parameters())
    for (path, mine), other in zip(own.named_parameters(), wanted.parameters(), strict=True):
        assert ((mine - before[path]) - (other - before[path])).abs().max() <= 1e-10, path


def test_the_plan_is_made_anew_for_every_active_set_of_one_graph():
    model = timed.network()
    routes = {"cls": [ff.Route("cls"), ff.Route("encoder", start=1, every=2)], "dom": ff.Route("dom", start=3)}
    found = []
    for count in (0, 1, 2, 3, 0, 3):
        for parameter in model.parameters():
            parameter.grad = None
        ff.backward(timed.adversarial(model, torch.randn(6, 4)), routes, model, step=count)
        found.append({path.split(".")[0] for path, p in model.named_parameters() if p.grad is not None})
    assert found == [
        {"cls"},
        {"cls", "encoder"},
        {"cls"},
        {"cls", "encoder", "dom"},
        {"cls"},
        {"cls", "encoder", "dom"},
    ]


def test_weights_that_are_schedules_read_the_step_of_backward():
    model = torch.nn.Linear(2, 1)
    routes = {"l": {"bias": ff.schedules.linear(0.0, 1.0, 10)}}
    ff.backward({"l": model(torch.ones(1, 2)).sum()}, routes, model, step=3)
    assert model.bias.grad.item() == pytest.approx(0.3)
    with pytest.raises(TypeError, match="there is no step here: give ff.combine or ff.backward step="):
        ff.backward({"l": model(torch.ones(1, 2)).sum()}, routes, model)


NO_COUNT = (
    r"2 problems:\n  - loss 'cls': encoder from 5: the route is timed, and there is no count of steps here; give "
    r"ff.combine or ff.backward step=, or use ff.Step\n  - loss 'dom': dom to 9: the route is timed"
)
TIMED = {"cls": ff.Route("encoder", start=5), "dom": ff.Route("dom", stop=9)}


def test_no_step_is_an_error():
    model = timed.network()
    losses = timed.adversarial(model, torch.randn(6, 4))
    with pytest.raises(ff.RouteError, match=NO_COUNT):
        ff.backward(losses, TIMED, model)
    with pytest.raises(ff.RouteError, match=NO_COUNT):
        ff.combine(losses, ff.plan(model, TIMED), model)
    with torch.no_grad(), pytest.raises(ff.RouteError, match=NO_COUNT):
        ff.combine(losses, TIMED, model)
    with pytest.raises(TypeError, match="step= is the number of steps taken so far, an int or a 0-d integer"):
        ff.backward(losses, TIMED, model, step=1.0)


def test_a_function_transform_has_no_count():
    params = {"encoder": torch.ones(2), "dom": torch.ones(2)}

    def losses(p):
        return {"cls": p["encoder"].sum(), "dom": p["dom"].sum()}

    with pytest.raises(ff.RouteError, match=NO_COUNT):
        ff.grad(losses, TIMED)(params)
    with pytest.raises(ff.RouteError, match=r"loss 'a': \* from 5: the route is timed"):
        ff.verify_equations({"a": 3 * sympy.symbols("w")}, {"a": ff.Route("w", start=5)}, at={"w": 1.0})


def test_a_loss_of_frozen_parameters_is_fine_while_its_route_rests():
    model = timed.network()
    model["dom"].requires_grad_(True)
    plan = ff.plan(model, TIMED)
    model["dom"].requires_grad_(False)
    losses = {
        "cls": model["cls"](model["encoder"](torch.randn(6, 4))).mean(),
        "dom": model["dom"](torch.ones(5)).mean(),
    }
    with pytest.raises(ff.RouteError, match="frozen in the model"):
        ff.backward(losses, plan, model, step=9)
