"""Routes, selectors and the plan: what is selected, how it prints, and the text of every error."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.declare.plan import resolve_plan
from funcfreeze.model.sites import module_leaves


def network():
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
            "heads": nn.ModuleList(nn.Linear(3, 2) for _ in range(11)),
        }
    )


def plan_of(routes, model=None):
    return resolve_plan(routes, module_leaves(model if model is not None else network()))


def chosen(selector, model=None):
    return [row.path for row in plan_of({"loss": selector}, model).rows if row.weights]


def test_a_name_is_a_subtree_and_never_a_prefix_of_another():
    assert chosen("heads.1") == ["heads.1.weight", "heads.1.bias"]
    assert chosen("encoder.1.weight") == ["encoder.1.weight"]


def test_a_star_spans_dots():
    assert chosen("encoder*bias") == ["encoder.0.bias", "encoder.1.bias", "encoder.2.bias"]
    assert len(chosen("*")) == 28


def test_a_glob_may_name_modules():
    assert chosen("heads.[01]") == ["heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias"]


def test_selectors_are_sets():
    assert chosen(ff.path("encoder") - "encoder.0" & ff.path("*.bias")) == ["encoder.1.bias", "encoder.2.bias"]
    assert chosen(ff.kind(nn.BatchNorm1d) | "heads.10.bias") == [
        "encoder.1.weight",
        "encoder.1.bias",
        "heads.10.bias",
    ]
    assert chosen(~ff.path("heads") & ff.where(lambda path, p: p.ndim == 2)) == ["encoder.0.weight", "encoder.2.weight"]
    assert chosen(ff.regex(r"heads\.(3|4)\.bias")) == ["heads.3.bias", "heads.4.bias"]
    assert "encoder" - ff.path("encoder.0") == ff.path("encoder") - "encoder.0"


def test_kind_takes_everything_inside():
    model = nn.ModuleDict({"a": nn.TransformerEncoderLayer(4, 2, 8), "b": nn.Linear(4, 4)})
    assert all(path.startswith("a.") for path in chosen(ff.kind(nn.TransformerEncoderLayer), model))
    assert len(chosen(ff.kind(nn.TransformerEncoderLayer), model)) == 12


def test_kind_sees_parametrized_modules():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Conv1d(1, 1, 1))
    assert set(chosen(ff.kind(nn.Linear), model)) == {
        "0.bias",
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    }
    assert set(chosen("0.parametrizations.weight", model)) < set(chosen("0", model))


def test_frozen_parameters_are_passed_over_by_patterns():
    model = network()
    model["encoder"][0].requires_grad_(False)
    assert "encoder.0.weight" not in chosen("*", model)
    assert chosen(ff.kind(nn.Linear) - "heads", model) == ["encoder.2.weight", "encoder.2.bias"]
    assert len(chosen(ff.path("*") - "encoder.0", model)) == 26
    seen = []
    chosen(ff.where(lambda path, p: seen.append(path) or True), model)
    assert "encoder.0.weight" not in seen


def test_every_shorthand_of_a_route():
    plan = plan_of(
        {
            "one": "encoder.0",
            "union": ["encoder.0", "encoder.1", "encoder.0.bias"],
            "signed": {"encoder.0": 1.0, "encoder.1": -0.1},
            "sum": [ff.Route("encoder.0"), ff.Route(["encoder.0.bias", "encoder.1"], weight=0.5)],
        }
    )
    rows = {row.path: dict(row.weights) for row in plan.rows}
    assert rows["encoder.0.bias"] == {"one": (1.0,), "union": (1.0,), "signed": (1.0,), "sum": (1.0, 0.5)}
    assert rows["encoder.1.bias"] == {"union": (1.0,), "signed": (-0.1,), "sum": (0.5,)}


def test_plans_compare_and_survive_json():
    routes = {
        "a": {"encoder": -0.3 * ff.optim.dann_schedule(800), "heads.0": torch.tensor(2.0)},
        "b": [ff.Route("heads.1"), ff.Route("heads.1.bias", weight=0.5)],
    }
    plan = plan_of(routes)
    assert ff.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan == plan_of(routes)
    assert plan != plan_of(routes | {"b": "heads.1"})
    assert plan_of(plan) == plan


def test_a_plan_is_taken_in_the_order_of_the_parameters():
    leaves = module_leaves(network())
    plan = plan_of({"a": "encoder.0.weight"})
    assert resolve_plan(plan, leaves[::-1]).rows == plan.rows[::-1]
    assert [row.path for row in resolve_plan(plan, leaves[::-1]).rows if row.weights] == ["encoder.0.weight"]


def test_a_large_plan_prints_by_modules():
    model = network()
    model["encoder"][0].weight.requires_grad_(False)
    plan = plan_of({"cls": ["encoder", "heads.0"], "adv": {"encoder": -0.3 * ff.optim.dann_schedule(800)}}, model)
    assert str(plan).splitlines() == [
        "parameter            elements  cls  adv",
        "encoder.0.weight           16    ·    ·  frozen: requires_grad is False",
        "encoder.0.bias              4    1   w1",
        "encoder.[1-2].* (4)        23    1   w1",
        "heads.0.* (2)               8    1    ·",
        "heads.[1-10].* (20)        80    ·    ·  frozen: no route",
        "w1 = -0.3 * dann_schedule(total_steps=800, gamma=10.0)",
        "cls updates 7 of 28 parameters (35 of 131 elements)",
        "adv updates 5 of 28 parameters (27 of 131 elements)",
        "frozen: 21 of 28 parameters (96 of 131 elements)",
    ]


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ({"a": "encodr"}, "loss 'a': path('encodr') matches no parameter; did you mean 'encoder'"),
        ({"a": ff.path("*") - "hedas"}, "path('hedas') matches no parameter; did you mean 'heads'"),
        ({"a": ff.kind(nn.Conv2d)}, "kind(Conv2d) matches no parameter; the modules here are BatchNorm1d, Linear"),
        ({"a": ff.path("encoder") & "heads"}, "(path('encoder') & path('heads')) leaves no trainable parameter"),
        (
            {"a": {"encoder": 1.0, "*.bias": -1.0}},
            "loss 'a': encoder.0.bias is claimed by 2 entries, 'encoder': 1.0 and '*.bias': -1.0; take it out "
            'of all but one, as in path("*") - "encoder"',
        ),
        ({"a": {"encoder": "fast"}}, "a weight is a finite number, a 0-d tensor or a schedule, got str: 'fast'"),
        ({"a": {"encoder": torch.ones(2)}}, "got a tensor of shape (2,) and dtype torch.float32"),
        ({"a": {"encoder": torch.ones((), requires_grad=True)}}, "a weight is not differentiated"),
        ({"a": []}, "loss 'a': an empty list selects nothing"),
        ({"a": {}}, "loss 'a': an empty mapping selects nothing"),
        ({"a": ["encoder", ff.Route("heads")]}, "a list holds either selectors (their union) or Routes"),
        ({"a": 3}, "loss 'a': a selector is a string, or made by path, regex, kind or where; got int: 3"),
        ({3: "encoder"}, "a loss is named by a string, got int: 3"),
        ({}, "routes are a mapping such as"),
        (["encoder"], 'routes are a mapping such as {"cls": "*", "adv": "encoder"}, got list: [\'encoder\']'),
    ],
)
def test_mistakes_in_routes(routes, message):
    with pytest.raises(ff.RouteError) as caught:
        plan_of(routes)
    assert message in str(caught.value)


def test_all_problems_at_once():
    with pytest.raises(ff.RouteError) as caught:
        plan_of({"a": "encodr", "b": {"heads": float("inf")}, "c": ["hedas.0", "heads.12"]})
    text = str(caught.value)
    assert text.startswith("4 problems:")
    assert all(name in text for name in ("'encodr'", "loss 'b'", "'hedas.0'", "'heads.12'"))


def test_a_frozen_parameter_may_not_be_named():
    model = network()
    model["encoder"].requires_grad_(False)
    for name in ("encoder", "encoder.0.weight"):
        with pytest.raises(ff.RouteError, match=r"names only frozen parameters \(encoder\.0\.weight.*requires_grad_"):
            plan_of({"a": ["heads", name]}, model)
    with pytest.raises(ff.RouteError, match="matches only parameters whose requires_grad is False"):
        plan_of({"a": "encoder*"}, model)


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def test_ties():
    assert chosen("head", tied()) == chosen("embed", tied()) == chosen(ff.kind(nn.Linear), tied()) == ["embed.weight"]
    assert plan_of({"a": "*"}, tied()).rows[0].names == ("embed.weight", "head.weight")
    assert "embed.weight = head.weight" in str(plan_of({"a": "*"}, tied()))
    with pytest.raises(ff.RouteError, match="leaves no trainable parameter"):
        plan_of({"a": ff.path("*") - "head"}, tied())


def test_contradictory_routes_to_tied_names():
    with pytest.raises(ff.RouteError, match=r"tied as embed.weight = head.weight.*claimed by 2 entries"):
        plan_of({"a": {"embed": 1.0, "head": -1.0}}, tied())
    with pytest.raises(ff.RouteError, match=r"contradictory routes by its different names: 'embed': 1.0 and 'head'"):
        plan_of({"a": [ff.Route("embed"), ff.Route("head", weight=-1.0)]}, tied())
    row = plan_of({"a": [ff.Route("embed"), ff.Route("*", weight=0.5)]}, tied()).rows[0]
    assert row.weights["a"] == (1.0, 0.5)


def test_a_plan_of_other_parameters():
    plan = plan_of({"a": "encoder"})
    other = network()
    other["encoder"][0] = nn.Linear(5, 4)
    del other["encoder"][1]
    other["extra"] = nn.Linear(1, 1)
    with pytest.raises(ff.RouteError) as caught:
        plan_of(plan, other)
    assert "encoder.0.weight has shape (4, 4) in the plan and (4, 5) in the model" in str(caught.value)
    assert "the model has extra.weight, the plan does not" in str(caught.value)


def test_weights_that_plain_data_cannot_hold():
    plan = plan_of({"a": {"encoder": lambda step: 1.0}})
    with pytest.raises(ff.RouteError, match="was a function, which plain data cannot hold"):
        ff.Plan.from_dict(plan.to_dict())
    with pytest.raises(ff.RouteError, match="this is not a plan's data: KeyError"):
        ff.Plan.from_dict({"losses": []})
