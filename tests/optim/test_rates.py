"""Rates and decays by selector, against torch.optim with parameter groups."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from trajectories import assert_close, gradients, in_place_displacements, pure_displacements, start

import funcfreeze as ff
from funcfreeze.declare.selectors import RouteError
from funcfreeze.optim import adam, adamw, chain, clip_by_global_norm, from_torch, partition, rmsprop, sgd

STEPS = 5
FORMS = [pure_displacements, in_place_displacements]
GRAPH = {"backend": "aot_eager"}
FAMILIES = {
    "sgd": (sgd, torch.optim.SGD, {}),
    "momentum": (sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "dampening": (sgd, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "adam": (adam, torch.optim.Adam, {}),
    "amsgrad": (adam, torch.optim.Adam, {"amsgrad": True}),
    "adamw": (adamw, torch.optim.AdamW, {}),
    "rmsprop": (rmsprop, torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "plain rmsprop": (rmsprop, torch.optim.RMSprop, {}),
}
FAMILY = pytest.mark.parametrize(("family", "oracle", "options"), FAMILIES.values(), ids=FAMILIES)


def falling(step):
    """A schedule of the user's own."""
    return 0.1 / (1 + step)


KINDS = {
    "numbers": ({"a": 0.03, "late": 0.2, "scale": 0.2, "never": 1.0}, {"*.weight": 0.4, "scale": 0.7}),
    "tensors": (
        {"a": torch.tensor(0.03), "late": 0.2, "scale": torch.tensor(0.2, dtype=torch.float64), "never": 1.0},
        {"*.weight": torch.tensor(0.4), "scale": torch.tensor(0.7, dtype=torch.float64)},
    ),
    "schedules": (
        {"a": ff.schedules.linear(0.1, 0.02, 4), "late": falling, "scale": 0.5 * ff.schedules.cosine(0.3, 0.1, 5)},
        {"*.weight": ff.schedules.linear(0.5, 0.1, 5), "scale": falling},
    ),
    "one rate": (0.05, {"*.weight": ff.schedules.linear(0.5, 0.1, 5), "scale": 0.3}),
    "one decay": ({"a": 0.03, "late": falling, "scale": 0.2, "never": 0.0}, 0.3),
    "a decay for all that changes": (0.05, falling),
}


def meant(given, path, step, rest=0.0):
    """What a mapping says about a parameter, worked out without the package's selectors."""
    if isinstance(given, dict):
        fitting = [value for key, value in given.items() if path.startswith(key) or path.endswith(key.lstrip("*"))]
        assert len(fitting) <= 1
        given = fitting[0] if fitting else rest
    return float(given(step) if callable(given) else given)


def torch_displacements(build, params, grads, lr, weight_decay):
    """How far torch.optim moves the parameters, each in a group of its own whose options are set before each step."""
    moving = {path: nn.Parameter(param.clone()) for path, param in params.items()}
    optimizer = build([{"params": [param]} for param in moving.values()], lr=0.1)
    for step, given in enumerate(grads):
        for path, group in zip(moving, optimizer.param_groups, strict=True):
            group |= {"lr": meant(lr, path, step), "weight_decay": meant(weight_decay, path, step)}
        optimizer.zero_grad(set_to_none=True)
        for path, grad in given.items():
            moving[path].grad = grad.clone()
        optimizer.step()
    return {path: param.detach() - params[path] for path, param in moving.items()}


def covering(lr):
    """A mapping has to cover `never` too."""
    return {"never": 0.3, **lr} if isinstance(lr, dict) else lr


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@FAMILY
def test_a_transform_moves_as_torchs_groups_do(family, oracle, options, kind, maximize, form):
    lr, decay = KINDS[kind]
    expected = torch_displacements(
        partial(oracle, maximize=maximize, **options), start(), gradients(), covering(lr), decay
    )
    tx = family(covering(lr), weight_decay=decay, maximize=maximize, **options)
    assert_close(form(tx, start(), gradients()), expected, 1e-6 if kind == "tensors" else 1e-10)


def network():
    return nn.ModuleDict(
        {
            "backbone": nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5)),
            "head": nn.Linear(5, 2),
            "still": nn.Linear(2, 2),
        }
    ).double()


def losses(model, batch):
    h = model["backbone"](batch)
    return {"task": model["still"](model["head"](h)).square().mean(), "small": h.abs().mean()}


ROUTES = {"task": ["backbone", "head"], "small": {"backbone": -0.1}}
MATRICES = ff.where(lambda path, p: p.ndim > 1)
NORMS = ff.kind(nn.LayerNorm)
BACKBONE_NORM = "backbone.1."


def make(optimizer, model=None, **options):
    return ff.Step(network() if model is None else model, losses, ROUTES, optimizer=optimizer, **options)


def batches():
    return [torch.randn(6, 4, dtype=torch.float64) for _ in range(STEPS)]


def trained_by_torch(model, build, options_of, given, max_norm=None):
    """The recipe, with a parameter group for each parameter, by `options_of(path, step)`."""
    model = copy.deepcopy(model)
    routed = {path: p for path, p in model.named_parameters() if not path.startswith("still")}
    optimizer = build([{"params": [p]} for p in routed.values()], lr=0.1)
    for step, batch in enumerate(given):
        for path, group in zip(routed, optimizer.param_groups, strict=True):
            group.update(options_of(path, routed[path], step))
        found = losses(model, batch)
        optimizer.zero_grad()
        (found["task"]).backward(retain_graph=True)
        added = torch.autograd.grad(found["small"], [*model["backbone"].parameters()])
        for p, g in zip(model["backbone"].parameters(), added, strict=True):
            p.grad -= 0.1 * g
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(routed.values(), max_norm)
        optimizer.step()
    return model


def assert_moved_alike(step, given, before, after):
    state = step.init()
    for batch in given:
        state, metrics = step(state, batch)
    for path, p in after.named_parameters():
        origin = before.get_parameter(path)
        moved, wanted = state.params[path] - origin.detach(), (p - origin).detach()
        torch.testing.assert_close(moved, wanted, rtol=1e-10, atol=1e-13, msg=path)
        assert bool(wanted.any()) != path.startswith("still")
    return metrics


WARM = ff.schedules.linear(0.0, 1.0, 4)


def layerwise():
    """Rates that fall from layer to layer, under one schedule."""
    mapping = {f"backbone.{i}": WARM * (0.01 * 0.5 ** (4 - i)) for i in (0, 1, 3)} | {"head": 0.01 * WARM}

    def meant(path, p, step):
        depth = int(path.split(".")[1]) if path.startswith("backbone") else 4
        return {"lr": 0.01 * 0.5 ** (4 - depth) * min(step / 4, 1.0), "weight_decay": 0.1}

    return mapping, 0.1, meant


PROGRAMS = {
    "fine-tuning with two rates": (
        {"backbone": 1e-3, "head": 1e-2},
        0.01,
        lambda path, p, step: {"lr": 1e-3 if path.startswith("backbone") else 1e-2, "weight_decay": 0.01},
    ),
    "no decay of biases and norms": (
        0.01,
        {MATRICES: 0.05},
        lambda path, p, step: {"lr": 0.01, "weight_decay": 0.05 if p.ndim > 1 else 0.0},
    ),
    "no decay of norms, by module": (
        0.01,
        {ff.path("*") - NORMS - "still": 0.05},
        lambda path, p, step: {"lr": 0.01, "weight_decay": 0.0 if path.startswith(BACKBONE_NORM) else 0.05},
    ),
    "layer-wise": layerwise(),
    "both, one a schedule": (
        {"backbone": torch.tensor(1e-3, dtype=torch.float64), "head": falling},
        {MATRICES: ff.schedules.linear(0.2, 0.0, 5), "head.bias": 0.3},
        lambda path, p, step: {
            "lr": 1e-3 if path.startswith("backbone") else falling(step),
            "weight_decay": 0.2 * (1 - step / 5) if p.ndim > 1 else 0.3 if path == "head.bias" else 0.0,
        },
    ),
    "all but one": (
        {ff.path("*") - "head.bias" - "still": 0.01, "head.bias": 0.2},
        {"*.bias": 0.1},
        lambda path, p, step: {
            "lr": 0.2 if path == "head.bias" else 0.01,
            "weight_decay": 0.1 if path.endswith("bias") else 0.0,
        },
    ),
}


OPTIMIZERS = ("momentum", "dampening", "adam", "adamw", "rmsprop")
ALL = "both, one a schedule"
CASES = [
    *((kind, program, {}) for kind in OPTIMIZERS for program in PROGRAMS),
    *((kind, ALL, {"donate": False}) for kind in OPTIMIZERS),
    *((kind, ALL, {"compile": GRAPH}) for kind in OPTIMIZERS),
    *(("adamw", program, {"compile": GRAPH}) for program in ("no decay of norms, by module", "layer-wise")),
    ("adamw", ALL, {"compile": GRAPH, "donate": False}),
]


@pytest.mark.parametrize(("kind", "program", "options"), CASES, ids=str)
def test_a_step_moves_as_torchs_groups_do(kind, program, options):
    lr, decay, meant = PROGRAMS[program]
    family, oracle, given = FAMILIES[kind]
    model, data = network(), batches()
    after = trained_by_torch(model, partial(oracle, **given), meant, data)
    step = make(family(lr, weight_decay=decay, **given), copy.deepcopy(model), **options)
    assert_moved_alike(step, data, model, after)
    assert step.traces == ("compile" in options)


@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}], ids=str)
def test_in_a_chain_and_under_a_partition(options):
    lr, decay, meant = PROGRAMS[ALL]
    model, data = network(), batches()
    step = make(chain(clip_by_global_norm(0.1), adamw(lr, weight_decay=decay)), copy.deepcopy(model), **options)
    assert_moved_alike(step, data, model, trained_by_torch(model, torch.optim.AdamW, meant, data, max_norm=0.1))

    parts = {
        "backbone": adamw({"*.weight": 1e-2, "*.bias": falling}, weight_decay={NORMS: 0.3}),
        "head": adamw({"*": torch.tensor(0.03, dtype=torch.float64)}, weight_decay=0.0),
    }

    def by_part(path, p, step):
        if path.startswith("head"):
            return {"lr": 0.03, "weight_decay": 0.0}
        return {
            "lr": falling(step) if path.endswith("bias") else 1e-2,
            "weight_decay": 0.3 if path.startswith(BACKBONE_NORM) else 0.0,
        }

    step = make(partition(parts), copy.deepcopy(model), **options)
    assert_moved_alike(step, data, model, trained_by_torch(model, torch.optim.AdamW, by_part, data))


@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}], ids=str)
def test_it_is_verified(options):
    lr, decay, _ = PROGRAMS[ALL]
    step = make(chain(clip_by_global_norm(0.1), adamw(lr, weight_decay=decay)), **options)
    report = ff.verify(step, step.init(), batches()[0])
    assert report.ok, report


@pytest.mark.parametrize(
    ("kinds", "options"), [([*FAMILIES], {}), (["adamw"], {"compile": GRAPH})], ids=["eager", "compiled"]
)
def test_a_skipped_step_changes_no_bit(kinds, options):
    """Decays in tensors are no arguments of torch's kernel: what is done for them beside it is skipped as well."""
    for family, oracle, given in map(FAMILIES.get, kinds):
        tx = family({"backbone": falling, "head": 0.1}, weight_decay={MATRICES: falling}, **given)
        step = make(tx, loss_scale=ff.LossScale(), **options)
        state, _ = step(step.init(), batches()[0])
        state.params["head.weight"][0, 0] = -0.0
        before = {path: p.clone() for path, p in state.params.items()}
        state, _ = step(state, torch.full((6, 4), float("nan"), dtype=torch.float64))
        for path, p in state.params.items():
            assert torch.equal(p.view(torch.int64), before[path].view(torch.int64)), (oracle, path)


@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}], ids=str)
def test_one_kernel_call_for_each_distinct_pair(options, monkeypatch):
    calls = []
    kernel = torch._fused_adamw_

    def counted(params, *args, **kwargs):
        calls.append(len(params))
        return kernel(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", counted)
    cosine = ff.schedules.cosine(1e-2, 0.0, 10)
    lr = {"backbone.0": cosine, "backbone.1": ff.schedules.cosine(1e-2, 0.0, 10), "backbone.3": 0.1, "head": 0.1}
    step = make(adamw(lr, weight_decay={MATRICES: 0.05}), **options)
    state = step.init()
    for batch in batches():
        state, _ = step(state, batch)
        # (cosine, 0.05), (cosine, 0), (0.1, 0.05), (0.1, 0)
        assert sorted(calls) == [1, 2, 2, 3]
        calls.clear()


def test_a_schedule_is_called_once_a_step():
    calls = []

    def counted(step):
        calls.append(int(step))
        return 0.01

    step = make(adamw({"backbone": counted, "head": counted}, weight_decay={MATRICES: 0.1, "*.bias": 0.2}))
    state = step.init()
    for batch in batches()[:3]:
        state, _ = step(state, batch)
    assert calls == [0, 1, 2]


def test_nothing_is_traced_again():
    rate, decay = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    tx = adamw({"backbone": rate, "head": falling}, weight_decay={MATRICES: decay, "*.bias": falling})
    eager, compiled = make(tx, model := network(), compile=False), make(tx, copy.deepcopy(model), compile=GRAPH)
    one, other = eager.init(), compiled.init()
    for batch in batches():
        one, _ = eager(one, batch)
        other, _ = compiled(other, batch)
        rate.mul_(0.5)
        decay.mul_(0.7)
        assert_close(dict(other.params), dict(one.params), 1e-12)
    assert compiled.traces == 1


def test_the_state_is_by_path_in_torchs_names():
    step = make(adamw({"backbone": 1e-3, "head": falling}, weight_decay={MATRICES: 0.1}))
    state = step.init()
    assert state.optimizer.keys() == set(step.plan.routed)
    assert {tuple(entry) for entry in state.optimizer.values()} == {("step", "exp_avg", "exp_avg_sq")}
    plain = make(adamw(1e-3), step.model)
    plain(state, batches()[0])  # of one structure with a rate for all: they share a State


def test_tied_parameters_by_any_name():
    model = nn.ModuleDict({"embed": nn.Linear(3, 3, bias=False), "out": nn.Linear(3, 3, bias=False)})
    model["out"].weight = model["embed"].weight

    def tied(model, x):
        return {"a": model["out"](model["embed"](x)).square().mean()}

    for name in ("embed", "out", "out.weight"):
        step = ff.Step(copy.deepcopy(model), tied, {"a": "*"}, optimizer=sgd({name: 0.5}))
        state = step.init()
        grad = step.gradients(state, torch.ones(2, 3, dtype=model["out"].weight.dtype))["embed.weight"]
        state, _ = step(state, torch.ones(2, 3, dtype=model["out"].weight.dtype))
        torch.testing.assert_close(state.params["embed.weight"] - model["embed"].weight, -0.5 * grad)
    with pytest.raises(RouteError, match="lr: embed.weight: claimed by embed and out; take one from the other"):
        ff.Step(model, tied, {"a": "*"}, optimizer=sgd({"embed": 0.5, "out": 0.1}))


def test_sparse_gradients_where_nothing_decays():
    model = nn.ModuleDict({"table": nn.Embedding(5, 2, sparse=True), "w": nn.Linear(2, 1)})

    def embedded(model, x):
        return {"a": model["w"](model["table"](x)).square().mean()}

    moved = []
    for sparse in (True, False):
        copied = copy.deepcopy(model)
        copied["table"].sparse = sparse
        tx = sgd({"table": 0.5, "w": 0.1}, weight_decay={"w": 0.1})
        step = ff.Step(copied, embedded, {"a": "*"}, optimizer=tx)
        state, _ = step(step.init(), torch.tensor([1, 1, 4]))
        moved.append(dict(state.params))
    assert_close(*moved, 1e-6)
    step = ff.Step(model, embedded, {"a": "*"}, optimizer=sgd(0.1, weight_decay={"table": 0.1}))
    with pytest.raises(ValueError, match="takes no such sparse gradients:\n  table.weight: layout torch.sparse_coo"):
        step(step.init(), torch.tensor([1]))


def test_half_precision_with_its_state_in_float32():
    tx = adamw({"w": falling, "b": 0.1}, weight_decay={"w": falling}, state_dtype=torch.float32)
    params = {"w": torch.randn(3, dtype=torch.bfloat16), "b": torch.randn(2, dtype=torch.bfloat16)}
    grads = {path: torch.randn_like(p) for path, p in params.items()}
    updates, _ = tx.update(grads, tx.init(params), params, step=0)
    wide = adamw({"w": falling, "b": 0.1}, weight_decay={"w": falling})
    exact, _ = wide.update(
        {path: g.double() for path, g in grads.items()},
        wide.init({path: p.double() for path, p in params.items()}),
        {path: p.double() for path, p in params.items()},
        step=0,
    )
    for path, update in updates.items():
        assert update.dtype == torch.bfloat16
        torch.testing.assert_close(update.double(), exact[path], rtol=1e-2, atol=1e-4)
        kept = {path: p.clone() for path, p in params.items()}
    adamw({"*": falling}, weight_decay={"w": falling}).in_place(
        grads, adamw(0.1).init(kept), kept, step=torch.tensor(0)
    )()
    torch.testing.assert_close(kept["w"].double(), params["w"].double() + exact["w"], rtol=2e-2, atol=2e-2)


# what people get wrong


def told(optimizer):
    with pytest.raises(RouteError) as caught:
        make(optimizer)
    head, *problems = str(caught.value).split("\n  ")
    assert head == "adamw: the rates do not fit the parameters that are updated:"
    return problems


BACKBONE = ", ".join(f"backbone.{i}.{name}" for i in (0, 1, 3) for name in ("weight", "bias"))


def test_everything_that_is_wrong_is_told_at_once():
    assert told(adamw({"backbon": 1e-3, "head": 1e-2, "*.bias": 1.0, "still.weight": 1.0}, weight_decay={"x": 1})) == [
        "lr: path('backbon') matches no parameter; did you mean 'backbone' or 'backbone.3' or 'backbone.1'?",
        'lr: head.bias: claimed by head and *.bias; take one from the other, as in ff.path("*") - "encoder"',
        "lr: backbone.0.weight, backbone.1.weight, backbone.3.weight: claimed by none of backbon, head, *.bias, "
        "still.weight",
        "lr: still.weight takes only what nothing updates (still.weight); leave it out, or route a loss there",
        "weight_decay: path('x') matches no parameter; there are 'backbone', 'head', 'still'",
    ]


def test_typical_mistakes():
    assert told(adamw({"backbone": 1e-5, "*": 1e-3})) == [
        f'lr: {BACKBONE}: claimed by backbone and *; take one from the other, as in ff.path("*") - "encoder"'
    ]
    assert told(adamw({"head": 1e-3})) == [f"lr: {BACKBONE}: claimed by none of head"]
    assert told(adamw(weight_decay={"still": 0.1})) == [
        "weight_decay: still takes only what nothing updates (still.weight, still.bias); leave it out, or route a loss "
        "there"
    ]
    frozen = network()
    frozen["head"].requires_grad_(False)
    with pytest.raises(RouteError, match=r"lr: path\('head'\) names only frozen parameters \(head.weight, head.bias"):
        ff.Step(frozen, losses, {"task": "backbone", "small": "backbone"}, optimizer=sgd({"backbone": 1, "head": 2}))


def test_what_a_rate_may_be():
    with pytest.raises(RouteError) as caught:
        adamw({"a": -1, "b": "x", ff.path("a"): torch.ones(2), "c": torch.optim.lr_scheduler.StepLR})
    assert str(caught.value).splitlines() == [
        "adamw: lr is a mapping selector -> number, 0-d tensor or schedule:",
        "  a: written twice",
        "  a tensor lr['a'] must be 0-d, got shape (2,)",
        "  lr['b'] must be a number, got str: 'x'",
        "  lr['c'] is a scheduler of torch's; make a schedule of its class: funcfreeze.schedules.from_torch(StepLR, "
        "lr=..., ...)",
    ]
    with pytest.raises(RouteError, match="it is empty, and every parameter needs one"):
        sgd({})
    with pytest.raises(RouteError, match=r"weight_decay\['a'\] must be at least 0, got -0.1"):
        rmsprop(weight_decay={"a": -0.1})
    with pytest.raises(RouteError, match="a selector is a string, or made by path, regex, kind or where; got int: 3"):
        adam({3: 0.1})
    with pytest.raises(TypeError, match="adam: lr is one rate, or a mapping from selectors such as"):
        adam([{"params": "head", "lr": 0.1}])
    with pytest.raises(TypeError, match=r"from_torch\(NAdam\): lr by selector is for sgd, adam, adamw and rmsprop"):
        from_torch(torch.optim.NAdam, lr={"a": 0.1})
    tx, params = adamw(weight_decay={"w": falling}), {"w": torch.ones(2)}
    with pytest.raises(TypeError, match="adamw: weight_decay is a schedule and must be told the step"):
        tx.update(params, tx.init(params), params)


def test_parameters_that_come_later():
    tx = sgd({"w": 0.1})
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    assert tx.init({"w": params["w"]}) == {"w": {}}
    updates, _ = tx.update({"w": torch.ones(2)}, {}, params)  # what is untouched needs no rate
    torch.testing.assert_close(updates["w"], torch.full((2,), -0.1))
    with pytest.raises(RouteError, match="lr: b: claimed by none of w"):
        tx.update({"b": torch.ones(1)}, {}, params)


def test_a_part_of_a_shared_partition_in_which_nothing_is_updated():
    tx = partition({"backbone": adamw({"*": 0.1}), "head": adamw({"*.weight": 0.1, "*.bias": 0.2}), "still": sgd()})
    step = ff.Step(network(), lambda m, x: {"task": losses(m, x)["task"]}, {"task": "head"}, optimizer=tx)
    step(step.init(), batches()[0])


def test_in_a_loop_that_somebody_compiles():
    tx = adamw(
        {"a": ff.schedules.linear(0.1, 0.02, 4), "late": 0.2, "scale": 0.2, "never": 0.1}, weight_decay={"a": 0.1}
    )
    params, grads = start(), gradients()
    state = tx.init(params)
    run = torch.compile(lambda grads, state, params, step: tx.update(grads, state, params, step=step), backend="eager")
    for step, given in enumerate(grads[:2]):
        seen, _ = run(given, state, params, torch.tensor(step))
        wanted, state = tx.update(given, state, params, step=torch.tensor(step))
        assert_close(
            {p: u for p, u in seen.items() if u is not None}, {p: u for p, u in wanted.items() if u is not None}
        )
