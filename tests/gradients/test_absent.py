"""An absent loss is None and nothing else, in every form; a loss that can update nothing is an error that says so."""

from __future__ import annotations

import random
from collections import UserDict

import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff

ENGINES = ["routed", "toggle", "reference"]
ROUTES = {"cls": ["encoder", "head"], "adv": {"encoder": -0.5}}

NUMBERS = [0, 0.0, False, True, 3, 1.5]
NOT_FLOATING = [torch.tensor(0), torch.tensor(False)]
CONSTANTS = [
    torch.tensor(0.0),
    torch.zeros(()),
    torch.tensor(2.5, dtype=torch.float32),
    nn.Parameter(torch.ones(())).data,
]

RETURN_NONE = "return None for a loss that is absent this step"


def model():
    return nn.ModuleDict({"encoder": nn.Linear(3, 2), "head": nn.Linear(2, 1), "still": nn.Linear(2, 2)})


def losses(m, batch):
    h = m["encoder"](batch)
    return {"cls": m["head"](m["still"](h)).square().mean(), "adv": h.square().mean()}


def with_adv(make):
    """The same losses with another `adv`."""
    return lambda m, batch: losses(m, batch) | {"adv": make(m, batch)}


class _Calls(nn.Module):
    def __init__(self, m, make):
        super().__init__()
        self.m, self.make = m, make

    def forward(self, batch):
        return with_adv(self.make)(self.m, batch)


def by_step(engine):
    def run(make, routes):
        m = model()
        step = ff.Step(m, with_adv(make), routes, optimizer=ff.optim.adam(), engine=engine)
        state, batch = step.init(), torch.randn(4, 3)
        before = [leaf.clone() for leaf in optree.tree_leaves(state)]
        try:
            for call in (step.gradients, step.per_loss_gradients, step):
                result = call(state, batch)
        except ff.RouteError:
            assert all(map(torch.equal, before, optree.tree_leaves(state)))
            raise
        return result

    return run


def by_compiled_step(make, routes):
    step = ff.Step(model(), with_adv(make), routes, optimizer=ff.optim.sgd(0.1), compile={"backend": "aot_eager"})
    return step(step.init(), torch.randn(4, 3))


def by_grad(engine):
    def run(make, routes):
        m = _Calls(model(), make)
        params = {path: p.detach() for path, p in m.named_parameters()}
        prefixed = {name: _prefixed(route) for name, route in routes.items()}
        f = ff.grad(lambda p, x: torch.func.functional_call(m, p, (x,)), prefixed, engine=engine)
        return f(params, torch.randn(4, 3))

    return run


def _prefixed(route):
    if isinstance(route, dict):
        return {f"m.{path}": weight for path, weight in route.items()}
    return [f"m.{path}" for path in route] if isinstance(route, list) else f"m.{route}" if route != "*" else "*"


def by_backward(make, routes):
    m = model()
    try:
        ff.backward(with_adv(make)(m, torch.randn(4, 3)), routes, m)
    except ff.RouteError:
        assert all(p.grad is None for p in m.parameters())
        raise


def by_verify(make, routes):
    step = ff.Step(model(), with_adv(make), routes, optimizer=ff.optim.sgd(0.1))
    return ff.verify(step, step.init(), torch.randn(4, 3), steps=1)


FORMS = {
    **{f"Step, {engine}": by_step(engine) for engine in ENGINES},
    "compiled Step": by_compiled_step,
    **{f"ff.grad, {engine}": by_grad(engine) for engine in ENGINES},
    "ff.backward": by_backward,
    "ff.verify": by_verify,
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
ALL_ROUTED = pytest.mark.parametrize(
    "routes", [ROUTES, {"cls": "*", "adv": "encoder"}], ids=["some frozen", "all routed"]
)


@pytest.mark.parametrize("form", [form for name, form in FORMS.items() if name != "compiled Step"])
@ALL_ROUTED
@pytest.mark.parametrize("absent", [*NUMBERS, *NOT_FLOATING, *CONSTANTS], ids=repr)
def test_a_number_or_a_constant_is_an_error_that_says_return_none(form, routes, absent):
    with pytest.raises(ff.RouteError) as caught:
        form(lambda m, batch: absent, routes)
    assert str(caught.value).startswith("loss 'adv' ")
    assert RETURN_NONE in str(caught.value)


@pytest.mark.parametrize("absent", [0, 0.0, False, torch.tensor(0), torch.tensor(0.0)], ids=repr)
def test_a_compiled_step_says_so_too(absent):
    """A trace each, which fails."""
    test_a_number_or_a_constant_is_an_error_that_says_return_none(by_compiled_step, ROUTES, absent)


@EVERY_FORM
@ALL_ROUTED
def test_none_is_absent(form, routes):
    form(lambda m, batch: None, routes)


def detached(m, batch):
    return losses(m, batch)["adv"].detach()


def under_no_grad(m, batch):
    with torch.no_grad():
        return losses(m, batch)["adv"]


def remade(m, batch):
    return torch.tensor(losses(m, batch)["adv"].tolist())


@pytest.mark.parametrize(
    "form",
    [form for name, form in FORMS.items() if name not in ("compiled Step", "ff.grad, reference", "Step, reference")],
)
@ALL_ROUTED
@pytest.mark.parametrize("mistake", [detached, under_no_grad, remade])
def test_a_loss_cut_off_by_mistake_is_the_same_error_also_where_parameters_are_frozen(form, routes, mistake):
    with pytest.raises(ff.RouteError, match="loss 'adv' does not require grad, so it can update nothing") as caught:
        form(mistake, routes)
    for cause in ("detached", ".item(), torch.tensor", "torch.no_grad()", "frozen parameters alone"):
        assert cause in str(caught.value)


@pytest.mark.parametrize("engine", ["reference"])
@pytest.mark.parametrize("mistake", [detached, under_no_grad])
def test_in_torch_func_too(engine, mistake):
    for form in (by_step(engine), by_grad(engine)):
        with pytest.raises(ff.RouteError, match="loss 'adv' does not require grad"):
            form(mistake, ROUTES)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_hangs_on_frozen_parameters_alone_is_one_nobody_can_tell_from_a_constant(engine):
    with pytest.raises(ff.RouteError, match="Or does it hang on frozen parameters alone, those that no route mentions"):
        by_step(engine)(lambda m, batch: m["still"].weight.square().sum(), ROUTES)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["batch", "closure", "other's parameter"])
def test_a_loss_with_a_graph_that_misses_its_parameters_touches_nothing(engine, where):
    outside = torch.randn(4, 3, requires_grad=True)

    def make(m, batch):
        return (batch if where == "batch" else outside).sum() if where != "other's parameter" else m["head"].bias.sum()

    step = ff.Step(model(), with_adv(make), ROUTES, optimizer=ff.optim.sgd(0.1), engine=engine)
    batch = torch.randn(4, 3, requires_grad=where == "batch")
    apart = step.per_loss_gradients(step.init(), batch)
    assert apart["adv"] == {}
    assert apart["cls"]
    _, metrics = step(step.init(), batch)
    assert not metrics["adv"].requires_grad
    assert batch.grad is None
    assert outside.grad is None


def test_all_problems_at_once():
    names = ["a", "b", "c", "d"]
    wrong = dict(zip(names, [0, torch.tensor(0), torch.tensor(0.0), torch.ones(2)], strict=True))
    order = random.sample(names, 4)
    m = model()
    for run in (
        lambda: by_backward(lambda m, b: None, {**ROUTES, **dict.fromkeys(names, "*")}),
        lambda: ff.backward({name: wrong[name] for name in order}, dict.fromkeys(names, "*"), m),
    ):
        with pytest.raises(ff.RouteError, match="4 problems"):
            run()


def test_losses_in_a_mapping_that_is_no_dict_may_be_absent_too():
    def of_mapping(m, batch):
        return UserDict(losses(m, batch) | {"adv": None})

    step = ff.Step(model(), of_mapping, ROUTES, optimizer=ff.optim.sgd(0.1))
    _, metrics = step(step.init(), torch.randn(4, 3))
    assert set(metrics) == {"cls"}
