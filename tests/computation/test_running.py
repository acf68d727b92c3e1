"""In and out of torch.optim: a run moves over in the middle, and back, and nobody can tell."""

from __future__ import annotations

import copy
from functools import partial

import optree
import pytest
import torch
from torch import nn, optim

import funcfreeze as ff

ROUTES = {"task": ["encoder", "head"], "small": {"encoder": -0.1}}


def network():
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh()),
            "head": nn.Linear(6, 2),
            "still": nn.Linear(2, 2),
        }
    )


def losses(model, batch):
    h = model["encoder"](batch)
    return {"task": model["still"](model["head"](h)).square().mean(), "small": h.abs().mean()}


def make(model, optimizer, **options):
    return ff.Step(model, losses, ROUTES, optimizer=optimizer, **options)


def train(model, optimizer, batches, scheduler=None):
    """The recipe in plain PyTorch."""
    for batch in batches:
        optimizer.zero_grad()
        found = losses(model, batch)
        for loss, weight, allowed in (
            ("task", 1.0, ("encoder", "head")),
            ("small", -0.1, ("encoder",)),
        ):
            for path, parameter in model.named_parameters():
                parameter.requires_grad_(path.startswith(allowed))
            (weight * found[loss]).backward(retain_graph=True)
        model.requires_grad_(True)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def take(step, state, batches):
    for batch in batches:
        state, _ = step(state, batch)
    return state


def displaced(model, start):
    return [p.detach() - q.detach() for p, q in zip(model.parameters(), start.parameters(), strict=True)]


def assert_equal_displacement(one, other, start):
    for mine, theirs in zip(displaced(one, start), displaced(other, start), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


CASES = {
    "sgd": (partial(optim.SGD, lr=1e-2), ff.optim.sgd(1e-2)),
    "momentum": (partial(optim.SGD, lr=1e-2, momentum=0.9), ff.optim.sgd(1e-2, momentum=0.9)),
    "nesterov": (
        partial(optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
        ff.optim.sgd(1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "dampening": (
        partial(optim.SGD, lr=1e-2, momentum=0.9, dampening=0.3),
        ff.optim.sgd(1e-2, momentum=0.9, dampening=0.3),
    ),
    "adam": (partial(optim.Adam, lr=1e-2, betas=(0.5, 0.99)), ff.optim.adam(1e-2, betas=(0.5, 0.99))),
    "amsgrad": (partial(optim.Adam, lr=1e-2, amsgrad=True), ff.optim.adam(1e-2, amsgrad=True)),
    "adamw": (partial(optim.AdamW, lr=1e-2, weight_decay=0.1), ff.optim.adamw(1e-2, weight_decay=0.1)),
    "adam, decoupled": (
        partial(optim.Adam, lr=1e-2, decoupled_weight_decay=True),
        ff.optim.adamw(1e-2, weight_decay=0),
    ),
    "fused": (partial(optim.AdamW, lr=1e-2, fused=True), ff.optim.adamw(1e-2)),
    "in a chain": (
        partial(optim.Adam, lr=1e-2),
        ff.optim.chain(ff.optim.clip_by_global_norm(1e9), ff.optim.adam(1e-2)),
    ),
    "rmsprop": (
        partial(optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
        ff.optim.from_torch(optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    ),
    "rmsprop of ours": (partial(optim.RMSprop, lr=1e-3, momentum=0.5), ff.optim.rmsprop(1e-3, momentum=0.5)),
    "adagrad": (partial(optim.Adagrad, lr=1e-2), ff.optim.from_torch(optim.Adagrad, lr=1e-2)),
    "a rate in a tensor": (partial(optim.Adam, lr=torch.tensor(1e-2, dtype=torch.float64)), ff.optim.adam(1e-2)),
}


GRAPH = {"backend": "aot_eager"}
KINDS = [
    *((case, {}) for case in CASES),
    *((case, options) for case in ("adamw", "momentum") for options in ({"donate": False}, {"compile": GRAPH})),
]


@pytest.mark.parametrize(("case", "options"), KINDS)
def test_a_run_that_moves_over_and_back_is_one_that_never_moved(case, options):
    built, transform = CASES[case]
    moving = network()
    never, start = copy.deepcopy(moving), copy.deepcopy(moving)
    mine, theirs = built(moving.parameters()), built(never.parameters())
    parts = [[torch.randn(8, 4) for _ in range(50)] for _ in range(3)]
    train(moving, mine, parts[0])
    step = make(moving, transform, **options)
    state = take(step, step.init(optimizer=mine), parts[1])
    step.export(state, optimizer=mine)
    train(moving, mine, parts[2])
    train(never, theirs, [batch for part in parts for batch in part])
    assert_equal_displacement(moving, never, start)
    assert_same_state(mine, theirs)
    for one, other in zip(moving.buffers(), never.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def assert_same_state(one, other):
    """Every slot of every parameter, and its kind."""
    for (mine, kept), (theirs, expected) in zip(
        one.state_dict()["state"].items(), other.state_dict()["state"].items(), strict=True
    ):
        assert mine == theirs
        assert kept.keys() == expected.keys()
        for slot, value in expected.items():
            assert type(kept[slot]) is type(value)
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(kept[slot], value, rtol=1e-9, atol=1e-12)


def test_groups_against_a_partition():
    moving = network()
    never, start = copy.deepcopy(moving), copy.deepcopy(moving)

    def built(model):
        groups = [
            {"params": list(model["encoder"].parameters()), "lr": 1e-3, "weight_decay": 0.2},
            {"params": [*model["head"].parameters(), *model["still"].parameters()]},
        ]
        return optim.AdamW(groups, lr=1e-2, weight_decay=0.0)

    transform = ff.optim.partition(
        {"encoder": ff.optim.adamw(1e-3, weight_decay=0.2), "head": ff.optim.adamw(1e-2, weight_decay=0.0)}
    )
    mine, theirs = built(moving), built(never)
    parts = [[torch.randn(8, 4) for _ in range(5)] for _ in range(3)]
    train(moving, mine, parts[0])
    step = make(moving, transform)
    state = take(step, step.init(optimizer=mine), parts[1])
    assert int(state.step) == 10
    step.export(state, optimizer=mine)
    train(moving, mine, parts[2])
    train(never, theirs, [*parts[0], *parts[1], *parts[2]])
    assert_equal_displacement(moving, never, start)


GROUPED = {
    "numbers": ff.optim.adamw({"encoder": 1e-3, "head": 1e-2}, weight_decay={"encoder.0": 0.2, "head.bias": 0.1}),
    "tensors": ff.optim.adamw(
        {"encoder": torch.tensor(1e-3, dtype=torch.float64), "head": 1e-2},
        weight_decay={"encoder.0": 0.2, "head.bias": torch.tensor(0.1, dtype=torch.float64)},
    ),
    "schedules": ff.optim.adamw(
        {"encoder": ff.schedules.constant(1e-3), "head": lambda step: 1e-2},
        weight_decay={"encoder.0": ff.schedules.constant(0.2), "head.bias": 0.1},
    ),
}


@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}], ids=str)
@pytest.mark.parametrize("kind", GROUPED)
def test_groups_against_rates_by_selector(kind, options):
    moving = network()
    never, start = copy.deepcopy(moving), copy.deepcopy(moving)

    def built(model):
        groups = [
            {"params": [model["encoder"][0].weight], "lr": 1e-3, "weight_decay": 0.2},
            {"params": [*model["encoder"][1].parameters()], "lr": 1e-3, "weight_decay": 0.0},
            {"params": [model["head"].weight], "lr": 1e-2, "weight_decay": 0.0},
            {"params": [model["head"].bias, *model["still"].parameters()], "lr": 1e-2, "weight_decay": 0.1},
        ]
        return optim.AdamW(groups)

    mine, theirs = built(moving), built(never)
    parts = [[torch.randn(8, 4) for _ in range(5)] for _ in range(3)]
    train(moving, mine, parts[0])
    step = make(moving, GROUPED[kind], **options)
    state = take(step, step.init(optimizer=mine), parts[1])
    step.export(state, optimizer=mine)
    train(moving, mine, parts[2])
    train(never, theirs, [*parts[0], *parts[1], *parts[2]])
    assert_equal_displacement(moving, never, start)
    assert_same_state(mine, theirs)


def test_scheduled_rates_and_decays_go_into_their_groups():
    model = network()

    def built(groups):
        return optim.AdamW([{"params": group} for group in groups], lr=1.0, weight_decay=0.5)

    tx = ff.optim.adamw(
        {"encoder": lambda step: 0.1 / (step + 1), "head": 0.3},
        weight_decay={"*.weight": lambda step: 0.5 / (step + 1)},
    )
    step = make(model, tx)
    state = take(step, step.init(), [torch.randn(8, 4) for _ in range(4)])
    encoder = [*model["encoder"].parameters()]
    matrices, bias = [p for p in encoder if p is not model["encoder"][1].bias], model["encoder"][1].bias
    optimizer = built([matrices, [bias], [model["head"].weight], [model["head"].bias]])
    with pytest.raises(ValueError, match="the running AdamW is not as the Step's optimizer") as caught:
        step.export(state, optimizer=optimizer)
    assert str(caught.value).splitlines()[1:] == [
        "  weight_decay: the Step has 0.0, param_groups[1] has 0.5, for encoder.1.bias",
        "  lr: the Step has 0.3, param_groups[2] has 1.0, for head.weight",
        "  lr: the Step has 0.3, param_groups[3] has 1.0, for head.bias",
        "  weight_decay: the Step has 0.0, param_groups[3] has 0.5, for head.bias",
    ]
    groups = optimizer.param_groups
    groups[1]["weight_decay"], groups[3]["weight_decay"] = 0.0, 0.0
    groups[2]["lr"] = groups[3]["lr"] = 0.3
    step.export(state, optimizer=optimizer)
    groups = optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.02, 0.02, 0.3, 0.3])
    assert [group["weight_decay"] for group in groups] == pytest.approx([0.1, 0.0, 0.1, 0.0])
    mixed = built([[*model["encoder"].parameters(), *model["head"].parameters()]])
    with pytest.raises(ValueError, match="lr: param_groups\\[0\\] has one, the Step gives 0.02 and 0.3") as caught:
        step.export(state, optimizer=mixed)
    assert "weight_decay: param_groups[0] has one, the Step gives 0.0 and 0.1" in str(caught.value)


def test_a_scheduler_goes_on():
    moving = network()
    never, start = copy.deepcopy(moving), copy.deepcopy(moving)
    mine, theirs = (optim.Adam(model.parameters(), lr=0.1) for model in (moving, never))
    falling = [optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)) for o in (mine, theirs)]
    parts = [[torch.randn(8, 4) for _ in range(5)] for _ in range(3)]
    train(moving, mine, parts[0], falling[0])
    step = make(moving, ff.optim.adam(lambda step: 0.1 / (step + 1)))
    state = take(step, step.init(optimizer=mine), parts[1])
    step.export(state, optimizer=mine)
    assert mine.param_groups[0]["lr"] == pytest.approx(0.1 / 11)
    falling[0].last_epoch = 10
    train(moving, mine, parts[2], falling[0])
    train(never, theirs, [*parts[0], *parts[1], *parts[2]], falling[1])
    assert_equal_displacement(moving, never, start)


def test_the_count_of_steps():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1 / 6, momentum=0.9)
    train(model, optimizer, [torch.randn(8, 4)])
    step = make(model, ff.optim.sgd(lambda step: 0.1 / (step + 1), momentum=0.9))
    with pytest.raises(ValueError, match=r"lr: the Step has 0.1, param_groups\[0\] has 0.01666"):
        step.init(optimizer=optimizer)  # it keeps no count
    assert int(step.init(optimizer=optimizer, step=5).step) == 5
    assert int(step.init(step=7).step) == 7
    for wrong in (-1, 2.5, True, "3"):
        with pytest.raises((TypeError, ValueError), match="init\\(step=...\\) is the number of steps taken"):
            step.init(step=wrong)


@pytest.mark.parametrize(
    "form", [int, float, torch.tensor, lambda n: torch.tensor([n]), lambda n: torch.tensor(int(n))]
)
def test_counts_in_any_form(form):
    model = network()
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, [torch.randn(8, 4) for _ in range(3)])
    for entry in optimizer.state.values():
        entry["step"] = form(float(entry["step"]))
    step = make(model, ff.optim.adam(1e-2))
    state = take(step, step.init(optimizer=optimizer), [torch.randn(8, 4)])
    assert {float(entry["step"]) for entry in state.optimizer.values()} == {4.0}
    step.export(state, optimizer=optimizer)
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {4.0}


def test_what_has_not_begun_begins_on_either_side():
    model = network()
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    step = make(model, ff.optim.adam(1e-2))
    state = step.init(optimizer=optimizer)
    assert int(state.step) == 0
    step.export(state, optimizer=optimizer)
    assert not any(optimizer.state.values())
    state = take(step, state, [torch.randn(8, 4)])
    step.export(state, optimizer=optimizer)
    assert sum(bool(entry) for entry in optimizer.state.values()) == 5  # not of what no loss may update
    never = copy.deepcopy(model)
    other = optim.Adam(never.parameters(), lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    batch = torch.randn(8, 4)
    train(model, optimizer, [batch])
    train(never, other, [batch])
    assert all(map(torch.equal, model.parameters(), never.parameters()))


def tensors(state_dict):
    return [leaf for leaf in optree.tree_leaves(state_dict) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("donate", [True, False])
def test_neither_side_writes_to_the_other(donate):
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, [torch.randn(8, 4) for _ in range(3)])
    before = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in model.parameters()]
    step = make(model, ff.optim.adamw(1e-2), donate=donate)
    state = take(step, step.init(optimizer=optimizer), [torch.randn(8, 4) for _ in range(3)])
    assert all(map(torch.equal, tensors(before), tensors(optimizer.state_dict())))
    assert all(map(torch.equal, values, model.parameters()))
    step.export(state, optimizer=optimizer)
    kept = [leaf.clone() for leaf in optree.tree_leaves(state)]
    train(model, optimizer, [torch.randn(8, 4)])
    assert all(map(torch.equal, kept, optree.tree_leaves(state)))
    after = copy.deepcopy(optimizer.state_dict())
    take(step, state, [torch.randn(8, 4)])
    assert all(map(torch.equal, tensors(after), tensors(optimizer.state_dict())))


def test_tied_and_frozen_parameters():
    def tied():
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "frozen": nn.Linear(3, 3)})
        model["b"].weight = model["a"].weight
        model["frozen"].requires_grad_(False)
        return model

    def both(model, x):
        return {"l": model["frozen"](model["b"](model["a"](x))).square().mean()}

    moving = tied()
    never, start = copy.deepcopy(moving), copy.deepcopy(moving)
    mine, theirs = (optim.Adam(model.parameters(), lr=1e-2) for model in (moving, never))

    def plain(model, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            both(model, x)["l"].backward()
            optimizer.step()

    parts = [[torch.randn(5, 3) for _ in range(5)] for _ in range(3)]
    plain(moving, mine, parts[0])
    step = ff.Step(moving, both, {"l": "*"}, optimizer=ff.optim.adam(1e-2))
    state = take(step, step.init(optimizer=mine), parts[1])
    step.export(state, optimizer=mine)
    plain(moving, mine, parts[2])
    plain(never, theirs, [*parts[0], *parts[1], *parts[2]])
    assert_equal_displacement(moving, never, start)


def test_everything_that_differs_is_named_at_once():
    model = network()
    other = nn.Parameter(torch.zeros(3))
    groups = [
        {"params": [*model["encoder"].parameters()], "weight_decay": 0.5, "betas": (0.8, 0.9)},
        {"params": [model["head"].weight], "lr": 0.3},
        {"params": [other]},
    ]
    optimizer = optim.AdamW(groups, lr=1e-2)
    step = make(model, ff.optim.adamw(1e-2))
    with pytest.raises(ValueError, match="the running AdamW is not as the Step's optimizer") as caught:
        step.init(optimizer=optimizer)
    encoder = "encoder.0.weight, encoder.1.weight, encoder.1.bias"
    assert str(caught.value).splitlines()[1:] == [
        "  param_groups[2]['params'][0] of shape (3,): not of this model",
        "  head.bias: a loss may update it, and the running optimizer does not have it",
        f"  betas: the Step has (0.9, 0.999), param_groups[0] has (0.8, 0.9), for {encoder}",
        f"  weight_decay: the Step has 0.01, param_groups[0] has 0.5, for {encoder}",
        "  lr: the Step has 0.01, param_groups[1] has 0.3, for head.weight",
    ]


def test_another_optimizer_is_refused():
    model = network()
    train(model, optimizer := optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), [torch.randn(8, 4)])
    with pytest.raises(ValueError, match="the Step's optimizer is AdamW, the running one SGD, for encoder.0.weight"):
        make(model, ff.optim.adamw(1e-2)).init(optimizer=optimizer)
    with pytest.raises(TypeError, match="optimizer= is a running optimizer such as torch.optim.AdamW"):
        make(model, ff.optim.adamw(1e-2)).init(optimizer=ff.optim.adamw(1e-2))
    with pytest.raises(ValueError, match="momentum: the Step has 0, param_groups\\[0\\] has 0.9"):
        make(model, ff.optim.sgd(1e-2)).init(optimizer=optimizer)


def test_state_of_a_parameter_that_no_loss_may_update():
    model = network()
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    losses(model, torch.randn(8, 4))["task"].backward()
    optimizer.step()
    text = "still.weight: the running optimizer keeps step, exp_avg, exp_avg_sq for it, and no loss of the Step may"
    with pytest.raises(ValueError, match=text):
        make(model, ff.optim.adam(1e-2)).init(optimizer=optimizer)


def test_an_export_that_is_refused_writes_nothing():
    model = network()
    step = make(model, ff.optim.adam(1e-2))
    state = take(step, step.init(), [torch.randn(8, 4)])
    optimizer = optim.Adam(model.parameters(), lr=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"lr: the Step has 0.01, param_groups\[0\] has 0.5"):
        step.export(state, optimizer=optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer.state


def test_digits_that_would_be_lost():
    model = nn.ModuleDict({"l": nn.Linear(3, 2, dtype=torch.bfloat16)})

    def loss(model, x):
        return {"l": model["l"](x).square().mean()}

    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    step = ff.Step(model, loss, {"l": "*"}, optimizer=ff.optim.adam(1e-2, state_dtype=torch.float32))
    loss(model, torch.randn(4, 3, dtype=torch.bfloat16))["l"].backward()
    optimizer.step()
    state = step.init(optimizer=optimizer)
    assert state.optimizer["l.weight"]["exp_avg"].dtype == torch.float32
    with pytest.raises(
        ValueError, match="l.weight: exp_avg is torch.float32 in the State, and load_state_dict would make it"
    ):
        step.export(state, optimizer=optimizer)


def test_under_a_loss_scale():
    model = network()
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, [torch.randn(8, 4)])
    step = make(model, ff.optim.adam(1e-2), loss_scale=ff.LossScale(8.0))
    state = take(step, step.init(optimizer=optimizer), [torch.randn(8, 4)])
    assert float(state.optimizer["optimizer"]["head.bias"]["step"]) == 2
    step.export(state, optimizer=optimizer)
    assert float(optimizer.state[model["head"].bias]["step"]) == 2


def test_a_transform_that_torch_has_no_name_for():
    model = network()
    lion = ff.optim.Transform(
        lambda params: {path: torch.zeros_like(p) for path, p in params.items()},
        lambda grads, state, params, *, step=None: ({path: -0.01 * g.sign() for path, g in grads.items()}, state),
    )
    with pytest.raises(
        ValueError, match="head.bias: its part of the Step's optimizer has no counterpart in torch.optim"
    ):
        make(model, lion).init(optimizer=optim.Adam(model.parameters()))


def test_two_transforms_that_keep_something_for_one_parameter():
    model = network()
    averaged = ff.optim.Transform(
        lambda params: {path: {"mean": torch.zeros_like(p)} for path, p in params.items()},
        lambda grads, state, params, *, step=None: (grads, state),
    )
    step = make(model, ff.optim.chain(averaged, ff.optim.adam(1e-2)))
    text = "head.bias: the Step's optimizer keeps something for it in several places, torch.optim in one"
    with pytest.raises(ValueError, match=text):
        step.init(optimizer=optim.Adam(model.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match=text):
        step.export(step.init(), optimizer=optim.Adam(model.parameters(), lr=1e-2))


class Nested(optim.Optimizer):
    """Keeps tensors in containers, as some of people's own do."""

    def __init__(self, params, lr=0.1, container=dict):
        super().__init__(params, {"lr": lr, "container": container})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    mean = torch.zeros_like(parameter)
                    state["m"] = {dict: {"mean": mean}, list: [mean], tuple: (mean,)}[group["container"]]
                (mean,) = state["m"].values() if isinstance(state["m"], dict) else state["m"]
                mean.mul_(0.9).add_(parameter.grad)
                parameter.add_(mean, alpha=-group["lr"])


@pytest.mark.parametrize("container", [dict, list, tuple])
def test_an_optimizer_that_keeps_containers(container):
    moving = network()
    never, start = copy.deepcopy(moving), copy.deepcopy(moving)
    mine, theirs = (Nested(model.parameters(), container=container) for model in (moving, never))
    parts = [[torch.randn(8, 4) for _ in range(4)] for _ in range(3)]
    train(moving, mine, parts[0])
    step = make(moving, ff.optim.from_torch(Nested, container=container))
    state = take(step, step.init(optimizer=mine), parts[1])
    step.export(state, optimizer=mine)
    kept = [leaf.clone() for leaf in tensors(state)]
    train(moving, mine, parts[2])
    assert all(map(torch.equal, kept, tensors(state)))
    train(never, theirs, [*parts[0], *parts[1], *parts[2]])
    assert_equal_displacement(moving, never, start)
    _, adoption = make(moving, ff.optim.from_torch(Nested, container=container)).adopt(state)
    assert not adoption.afresh


def test_a_rate_in_a_tensor_stays_one():
    model = network()
    optimizer = optim.Adam(model.parameters(), lr=torch.tensor(0.1, dtype=torch.float64))
    step = make(model, ff.optim.adam(lambda step: 0.1 / (step + 1)))
    state = take(step, step.init(optimizer=optimizer), [torch.randn(8, 4)])
    step.export(state, optimizer=optimizer)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
