"""Metrics in containers of every kind: detached, apart from the state, and of their own type."""

from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import funcfreeze as ff
from containers import CONTAINERS, Own, Plain, held, kinds

ENGINES = ["routed", "toggle", "reference"]
EVERY = pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)


def model():
    return nn.ModuleDict({"encoder": nn.Linear(3, 2), "head": nn.Linear(2, 1)})


ROUTES = {"cls": "*", "adv": {"encoder": -0.5}}


def losses(m, batch):
    h = m["encoder"](batch)
    return {"cls": m["head"](h).square().mean(), "adv": h.square().mean()}


def values(m, batch):
    """Two metrics: one on the graph, one that shares memory with a parameter."""
    return m["encoder"](batch).sin(), m["head"].weight.detach()[0]


def tensors(tree):
    return [leaf for leaf in held(tree) if isinstance(leaf, torch.Tensor)]


@EVERY
@pytest.mark.parametrize("engine", ENGINES)
def test_they_are_detached_keep_their_values_and_their_kind(make, engine):
    given = []

    def with_metrics(m, batch):
        given.append(make(*values(m, batch)))
        return losses(m, batch), {"out": given[-1], "again": [given[-1]]}

    m, batch = model(), torch.randn(4, 3)
    wanted = [tensor.detach().clone() for tensor in tensors(make(*values(m, batch)))]
    shapes = kinds(make(*values(m, batch)))
    step = ff.Step(m, with_metrics, ROUTES, optimizer=ff.optim.sgd(0.5), engine=engine)
    state = step.init()
    state, metrics = step(state, batch)
    state, _ = step(state, torch.randn(4, 3))
    for tree in (metrics["out"], metrics["again"][0]):
        assert kinds(tree) == shapes
        assert not any(tensor.requires_grad for tensor in tensors(tree))
        assert all(map(torch.equal, tensors(tree), wanted)), "a later step, which overwrites parameters, does not show"
    assert metrics["out"] is not given[0]
    if engine != "reference":  # there all tensors are torch.func's, and dead by now
        assert any(tensor.requires_grad for tensor in tensors(given[0])), "the user's own container was not written to"


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name != "namespace"])  # torch 2.13 makes none
def test_in_a_compiled_step(name):
    make = CONTAINERS[name]

    def with_metrics(m, batch):
        return losses(m, batch), {"out": make(*values(m, batch))}

    m, batch = model(), torch.randn(4, 3)
    wanted = with_metrics(copy.deepcopy(m), batch)[1]["out"]
    step = ff.Step(m, with_metrics, ROUTES, optimizer=ff.optim.sgd(0.5), compile={"backend": lambda g, _: g.forward})
    state = step.init()
    state, metrics = step(state, batch)
    state, later = step(state, torch.randn(4, 3))
    assert step.traces == 1
    assert kinds(metrics["out"]) == kinds(later["out"]) == kinds(wanted)
    assert not any(tensor.requires_grad for tensor in tensors(metrics["out"]))
    for got, expected in zip(tensors(metrics["out"]), tensors(wanted), strict=True):
        torch.testing.assert_close(got, expected.detach())
    assert not torch.equal(tensors(metrics["out"])[0], tensors(later["out"])[0])


@EVERY
@pytest.mark.parametrize("engine", ENGINES)
def test_what_ff_grad_returns_beside_gradients(make, engine):
    def with_aux(params, x):
        h = params["w"] * x
        return {"a": h.sum(), "b": h.square().sum()}, make(h.sin(), x)

    params, x = {"w": torch.randn(3)}, torch.randn(3, requires_grad=True)
    with torch.no_grad():
        _, aux = ff.grad(with_aux, {"a": "*", "b": "*"}, has_aux=True, engine=engine)(params, x)
    wanted = make((params["w"] * x).sin(), x)
    assert kinds(aux) == kinds(wanted)
    assert not any(tensor.requires_grad for tensor in tensors(aux))
    assert all(map(torch.equal, tensors(aux), tensors(wanted)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [UserDict, Own, dict])
def test_the_mapping_of_metrics_itself_may_be_of_any_kind(kind, engine):
    def with_metrics(m, batch):
        return kind(losses(m, batch)), kind({"out": Plain(*values(m, batch))})

    step = ff.Step(model(), with_metrics, ROUTES, optimizer=ff.optim.sgd(0.5), engine=engine)
    _, metrics = step(step.init(), torch.randn(4, 3))
    assert type(metrics) is dict
    assert set(metrics) == {"cls", "adv", "out"}
    assert not metrics["out"].one.requires_grad
    assert ff.verify(step, step.init(), torch.randn(4, 3), steps=1).ok


@pytest.mark.parametrize("engine", ENGINES)
def test_models_outputs_of_transformers(engine):
    outputs = pytest.importorskip("transformers.modeling_outputs")
    encoding = pytest.importorskip("transformers").BatchEncoding

    def with_metrics(m, batch):
        h, weight = values(m, batch)
        out = outputs.CausalLMOutput(loss=h.sum(), logits=h, hidden_states=(h, weight))
        return losses(m, batch), {"out": out, "tokens": encoding({"ids": weight, "h": h})}

    m, batch = model(), torch.randn(4, 3)
    h, weight = (tensor.detach().clone() for tensor in values(m, batch))
    step = ff.Step(m, with_metrics, ROUTES, optimizer=ff.optim.sgd(0.5), engine=engine)
    state, metrics = step(step.init(), batch)
    step(state, batch)
    out, tokens = metrics["out"], metrics["tokens"]
    assert type(out) is outputs.CausalLMOutput
    assert list(out) == ["loss", "logits", "hidden_states"]
    assert out.logits is out["logits"]
    assert out.attentions is None
    assert torch.equal(out.logits, h)
    assert torch.equal(out.hidden_states[1], weight)
    assert torch.equal(tokens["ids"], weight)
    assert torch.equal(tokens.h, h)
    assert not any(tensor.requires_grad for tensor in tensors({**out, **tokens}))


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_in_a_models_output_of_transformers(engine):
    from dataclasses import dataclass

    generic = pytest.importorskip("transformers.utils")

    @dataclass
    class Losses(generic.ModelOutput):
        cls: torch.Tensor | None = None
        adv: torch.Tensor | None = None
        other: torch.Tensor | None = None

    def absent_or_not(m, batch):
        found = losses(m, batch[0])
        return Losses(cls=found["cls"], adv=found["adv"] if batch[1] else None)

    m, x = model(), torch.randn(4, 3)
    step = ff.Step(m, absent_or_not, ROUTES, optimizer=ff.optim.sgd(0.1), engine=engine)
    plain = ff.Step(m, losses, ROUTES, optimizer=ff.optim.sgd(0.1), engine=engine)
    wanted = plain.gradients(plain.init(), x)
    got = step.gradients(step.init(), (x, True))
    torch.testing.assert_close(got, wanted)
    assert step.per_loss_gradients(step.init(), (x, False))["adv"] == {}
    _, metrics = step(step.init(), (x, False))
    assert set(metrics) == {"cls"}
    assert ff.verify(step, step.init(), (x, True), steps=1).ok
    m.zero_grad()
    ff.backward(absent_or_not(m, (x, True)), ROUTES, m)
    for path, gradient in wanted.items():
        torch.testing.assert_close(m.get_parameter(path).grad, gradient)
    with pytest.raises(ff.RouteError, match="loss 'other' has no route"):
        ff.backward(Losses(*losses(m, x).values(), other=losses(m, x)["cls"]), ROUTES, m)


class Cache:
    """An object of the user's own, no container."""

    def __init__(self, *tensors):
        self.layers = [list(tensors)]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_object_that_hides_tensors_of_the_graph_is_refused_by_name(engine):
    def with_metrics(m, batch):
        h, _ = values(m, batch)
        return losses(m, batch), {"policy": Normal(h, 1.0), "cache": [Cache(torch.ones(1), h)]}

    step = ff.Step(model(), with_metrics, ROUTES, optimizer=ff.optim.sgd(0.1), engine=engine)
    state = step.init()
    before = {path: p.clone() for path, p in state.params.items()}
    with pytest.raises(TypeError, match="holds a tensor of the autograd graph where it cannot be exchanged") as caught:
        step(state, torch.randn(4, 3))
    assert "Normal.loc" in str(caught.value)
    assert "Cache.layers[0][1]" in str(caught.value)
    assert "return tensors in dicts, lists, tuples, dataclasses or mappings" in str(caught.value)
    assert all(torch.equal(state.params[path], p) for path, p in before.items())


def test_an_object_that_hides_the_memory_of_a_parameter_is_refused_by_name():
    step = ff.Step(
        model(),
        lambda m, batch: (losses(m, batch), {"cache": Cache(m["head"].bias.detach())}),
        ROUTES,
        optimizer=ff.optim.sgd(0.1),
    )
    state = step.init()
    with pytest.raises(TypeError, match=r"holds memory of a parameter where it .*: Cache.layers\[0\]\[0\]; return"):
        step(state, torch.randn(4, 3))
    assert step.gradients(state, torch.randn(4, 3))


def test_other_objects_stay_the_objects_they_are():
    h, module = Cache(torch.ones(2)), nn.Linear(2, 2)
    step = ff.Step(
        model(),
        lambda m, batch: (losses(m, batch), {"cache": h, "module": module, "f": torch.sin, "policy": Normal(0.0, 1.0)}),
        ROUTES,
        optimizer=ff.optim.sgd(0.1),
    )
    _, metrics = step(step.init(), torch.randn(4, 3))
    assert metrics["cache"] is h
    assert metrics["module"] is module
    assert metrics["f"] is torch.sin


OPTIMIZERS = {
    "chain": lambda: ff.optim.chain(ff.optim.clip_by_global_norm(0.01), ff.optim.adam(0.1)),
    "pure": lambda: ff.optim.chain(ff.optim.sgd(1.0), ff.optim.clip_by_global_norm(0.01)),
    "two": lambda: ff.optim.chain(
        ff.optim.clip_by_global_norm(0.01), ff.optim.clip_by_global_norm(0.001), ff.optim.sgd()
    ),
}


def two_layers():
    return nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 1)})


def two_losses(model, x):
    h = model["a"](x)
    return {"fit": model["b"](h).square().mean(), "small": h.square().mean()}


GRAPH = {"compile": {"backend": lambda graph, _: graph.forward}}
NORMS = [
    *((kind, scale, options) for kind in OPTIMIZERS for scale in (None, 8.0) for options in ({}, {"donate": False})),
    ("chain", None, GRAPH),
    ("pure", 8.0, GRAPH),
]


@pytest.mark.parametrize(("kind", "scale", "options"), NORMS)
def test_the_norm_that_clipping_saw(kind, scale, options):
    loss_scale = None if scale is None else ff.LossScale(scale)
    step = ff.Step(
        two_layers(),
        two_losses,
        {"fit": "*", "small": "a"},
        optimizer=OPTIMIZERS[kind](),
        loss_scale=loss_scale,
        **options,
    )
    state = step.init()
    for _ in range(3):
        batch = torch.randn(4, 3)
        norm = torch.stack([g.norm() for g in step.gradients(state, batch).values()]).norm()
        state, metrics = step(state, batch)
        assert list(metrics) == ["fit", "small", "ff/grad_norm"]
        assert metrics["ff/grad_norm"].ndim == 0
        assert not metrics["ff/grad_norm"].requires_grad
        torch.testing.assert_close(metrics["ff/grad_norm"], norm)
    half = step.compute(state, batch)
    norm = torch.stack([g.norm() for g in half.gradients.values()]).norm()
    doubled = half.replace(gradients={path: 2 * g for path, g in half.gradients.items()})
    assert "ff/grad_norm" not in half.metrics
    _, metrics = step.apply_gradients(state, doubled)
    torch.testing.assert_close(metrics["ff/grad_norm"], 2 * norm)
    assert step.traces == (3 if "compile" in options else 0)


def test_the_norms_of_parts_and_of_nothing():
    clipped = ff.optim.chain(ff.optim.clip_by_global_norm(0.01), ff.optim.sgd())
    parts = ff.optim.partition({"a": clipped, "b": clipped})

    def maybe(model, x):
        found = two_losses(model, x)
        return {"fit": found["fit"] if x.sum() > 0 else None, "small": None}

    step = ff.Step(two_layers(), maybe, {"fit": "*", "small": "a"}, optimizer=parts)
    state = step.init()
    gradients = step.gradients(state, torch.ones(4, 3))
    state, metrics = step(state, torch.ones(4, 3))
    assert list(metrics) == ["fit", "ff/grad_norm/a", "ff/grad_norm/b"]
    for part in "ab":
        own = torch.stack([g.norm() for path, g in gradients.items() if path.startswith(part)]).norm()
        torch.testing.assert_close(metrics[f"ff/grad_norm/{part}"], own)
    state, metrics = step(state, -torch.ones(4, 3))
    assert metrics == {}


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": "aot_eager"}}], ids=str)
def test_names_that_are_kept_for_our_own(options):
    optimizer = ff.optim.sgd()
    with pytest.raises(ff.RouteError, match="loss 'ff/fit': names that begin with 'ff/' are those of the step's own"):
        ff.Step(two_layers(), two_losses, {"ff/fit": "*"}, optimizer=optimizer, **options)

    def named(model, x):
        return two_losses(model, x), {"ff/grad_norm": x.mean(), "fine": 1}

    step = ff.Step(two_layers(), named, {"fit": "*", "small": "a"}, optimizer=optimizer, **options)
    state = step.init()
    before = {path: p.clone() for path, p in state.params.items()}
    with pytest.raises(ff.RouteError, match="metric 'ff/grad_norm': names that begin with 'ff/' .* rename it"):
        step(state, torch.ones(2, 3))
    assert all(torch.equal(p, before[path]) for path, p in state.params.items())
    fine = ff.Step(two_layers(), two_losses, {"fit": "*", "small": "a"}, optimizer=optimizer, **options)
    half = fine.compute(state := fine.init(), torch.ones(2, 3)).replace(metrics={"ff/x": torch.ones(())})
    with pytest.raises(ValueError, match=r"metrics\['ff/x'\]: such names are kept for metrics that a step adds itself"):
        fine.apply_gradients(state, half)
