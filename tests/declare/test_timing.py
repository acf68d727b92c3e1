"""When routes are active: what is said of it in plans, and the text of every error."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.gradients import Routing


def network():
    return nn.ModuleDict(
        {"backbone": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "cls": nn.Linear(4, 2), "dom": nn.Linear(4, 2)}
    )


def losses(model, x):
    h = model["backbone"](x)
    return {"cls": model["cls"](h).mean(), "dom": model["dom"](h).mean()}


ROUTES = {
    "cls": [ff.Route("cls"), ff.Route("backbone", start=1000, stop=5000, every=2)],
    "dom": [ff.Route("*.bias", weight=0.5, start=10), ff.Route("dom", stop=20)],
}


def test_a_plan_tells_timed_routes_in_a_line_each():
    lines = str(ff.plan(network(), ROUTES)).splitlines()
    assert [line for line in lines if line.startswith("timed")] == [
        "timed  cls: backbone from 1000 to 5000 every 2",
        "timed  dom: backbone.0.bias, backbone.1.bias, cls.bias from 10",
        "timed  dom: dom.weight to 20",
        "timed  dom: dom.bias with weight 0.5 from 10",
        "timed  dom: dom.bias with weight 1 to 20",
    ]
    assert not any(line.startswith("timed") for line in str(ff.plan(network(), {"cls": "*"})).splitlines())


def test_parameters_with_other_times_are_other_rows_of_a_large_plan():
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)]),
            "b": nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)]),
        }
    )
    shown = str(ff.plan(model, {"l": [ff.Route("a"), ff.Route("b", start=3, reset=True)]})).splitlines()
    assert [line.split()[0] for line in shown[:3]] == ["parameter", "a.*", "b.*"]
    assert shown[-1] == "timed  l: b from 3 reset"


def test_plans_compare_survive_json_and_have_a_hash():
    plan = ff.plan(network(), ROUTES)
    again = ff.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert hash(again) == hash(plan)
    later = {**ROUTES, "dom": [ff.Route("*.bias", weight=0.5, start=11), ff.Route("dom", stop=20)]}
    assert plan != ff.plan(network(), later)
    untimed = ff.plan(network(), {"cls": "*"})
    assert "timings" not in str(untimed.to_dict())
    assert hash(untimed) == hash(ff.plan(network(), {"cls": "*"}))
    step = ff.Step(network(), losses, again, optimizer=ff.optim.sgd(0.1))
    assert step.plan == plan


def test_a_plan_of_one_count():
    plan = ff.plan(network(), ROUTES)
    untimed = {"cls": ["cls", "backbone"], "dom": {"*.bias": 0.5}}
    assert plan.at(1000) == ff.plan(network(), untimed)
    assert plan.at(0).routed == ("cls.weight", "cls.bias", "dom.weight", "dom.bias")
    assert plan.at(10).rows[-1].weights == {"dom": (0.5, 1.0)}
    assert plan.at(999) == plan.at(1001)
    assert not plan.at(1000).timings


def test_data_that_is_no_timing():
    data = ff.plan(network(), {"cls": ff.Route("cls", start=3)}).to_dict()
    rows = [row for row in data["parameters"] if "timings" in row]
    rows[0]["timings"]["cls"][0]["every"] = 0
    with pytest.raises(ff.RouteError, match="not a timing's data: every is an int of at least 1, got 0"):
        ff.Plan.from_dict(data)
    rows[0]["timings"]["cls"] = []
    with pytest.raises(ff.RouteError, match="loss 'cls' has 0 timings and 1 weights for cls.weight"):
        ff.Plan.from_dict(data)


def test_a_route_shows_when():
    assert repr(ff.Route(["a", "b"], weight=0.5, every=2, start=4, stop=9, reset=True)) == (
        "Route(['a', 'b'], weight=0.5, every=2, start=4, stop=9, reset=True)"
    )
    assert repr(ff.Route("a")) == "Route('a')"
    assert ff.Route("a", start=3) == ff.Route("a", start=np.int64(3)) != ff.Route("a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "Route('backbone', every=0): every is an int of at least 1, got 0"),
        ({"every": True}, "Route('backbone', every=True): every is an int of at least 1, got True"),
        ({"every": 2.0}, "every is an int of at least 1, got 2.0"),
        ({"start": -1}, "Route('backbone', start=-1): start is an int of at least 0, got -1"),
        ({"start": torch.tensor(3)}, "start is an int of at least 0, got Tensor: tensor(3)"),
        ({"start": None}, "start is an int of at least 0, got None"),
        ({"stop": "x"}, "stop is an int above start, or None for no end; got 'x'"),
        ({"stop": False}, "stop is an int above start, or None for no end; got False"),
        ({"start": 5, "stop": 5}, "got stop=5 and start=5: it would never be its turn"),
        ({"stop": 0}, "got stop=0 and start=0: it would never be its turn"),
        ({"reset": True}, "reset=True means fresh optimizer state when the route becomes active again, which never"),
        ({"reset": True, "stop": 7}, "give start= or every=, or leave reset out"),
        ({"reset": True, "every": 5, "stop": 5}, "give start= or every=, or leave reset out"),
        ({"reset": 1, "start": 3}, "reset is True or False, got 1"),
    ],
    ids=str,
)
def test_times_that_make_no_sense(options, message):
    routes = {"cls": [ff.Route("cls"), ff.Route("backbone", **options)], "dom": "dom"}
    with pytest.raises(ff.RouteError) as caught:
        ff.Step(network(), losses, routes, optimizer=ff.optim.sgd(0.1))
    assert message in str(caught.value)
    assert "loss 'cls': Route('backbone'" in str(caught.value)


def test_all_that_is_wrong_is_told_at_once():
    routes = {
        "cls": [ff.Route("clas", every=0, start=-2), ff.Route("cls", stop=torch.tensor(1))],
        "dom": ff.Route("dom", reset=True),
    }
    with pytest.raises(ff.RouteError) as caught:
        ff.Step(network(), losses, routes, optimizer=ff.optim.sgd(0.1))
    told = str(caught.value)
    assert "every is an int of at least 1, got 0; start is an int of at least 0, got -2" in told
    assert "path('clas') matches no parameter" in told
    assert "loss 'cls': Route('cls', stop=tensor(1))" in told
    assert "loss 'dom': Route('dom', reset=True)" in told


def test_aliases_of_one_parameter_with_other_times():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    with pytest.raises(
        ff.RouteError, match="contradictory routes by its different names: 'a': 1.0 and 'b': 1.0 from 3"
    ):
        ff.plan(model, {"l": [ff.Route("a"), ff.Route("b", start=3)]})


def test_a_routing_needs_a_count():
    with pytest.raises(ff.RouteError, match="loss 'cls': backbone from 3: the route is timed, and there is no count"):
        Routing.of(ff.plan(network(), {"cls": ff.Route("backbone", start=3)}))
