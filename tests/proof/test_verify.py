"""`ff.verify` says ok to a right engine, and not ok to every fault that is planted in one."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff
from funcfreeze import gradients
from funcfreeze.computation.updating import Updating
from funcfreeze.gradients import Routed
from funcfreeze.gradients import routed as routed_module
from funcfreeze.gradients.passes import plan_passes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.cls, self.dom, self.still = nn.Linear(8, 3), nn.Linear(8, 2), nn.Linear(3, 3)


def losses(model, batch):
    h = model.encoder(batch)
    skip = torch.tanh(h)  # a skip past the head, so that stops must be blocked
    return {
        "cls": F.cross_entropy(model.still(model.cls(skip)) + h[:, :3], torch.arange(len(h)) % 3),
        "dom": F.cross_entropy(model.dom(skip * h), torch.arange(len(h)) % 2),
        "far": None if float(batch[0, 0]) > 100 else model.cls(skip).square().mean(),
    }


ROUTES = {"cls": ["encoder", "cls"], "dom": {"dom": 1.0, "encoder": -0.1}, "far": {"encoder": 0.5, "still": 1.0}}


def make(**options):
    return ff.Step(Net(), losses, ROUTES, optimizer=options.pop("optimizer", ff.optim.adamw(1e-2)), **options)


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
@pytest.mark.parametrize("donate", [True, False])
def test_right_engines_are_ok(engine, donate):
    step = make(engine=engine, donate=donate)
    report = ff.verify(step, step.init(), torch.randn(6, 4))
    assert report.ok, str(report)
    assert report.worst < 1e-6
    assert report.facts["dtype"] == "float64"
    assert report.to_dict()["ok"] is True


@pytest.mark.parametrize(
    "optimizer",
    [
        ff.optim.sgd(0.1, momentum=0.9, weight_decay=0.1),
        ff.optim.chain(ff.optim.clip_by_global_norm(0.5), ff.optim.adam(ff.optim.linear_schedule(1e-2, 0, 10))),
        ff.optim.partition({"encoder": ff.optim.adam(1e-3), ff.path("*") - "encoder": ff.optim.sgd(0.1)}),
        ff.optim.rmsprop(ff.schedules.cosine(1e-2, 0, 10), momentum=0.9),
        ff.optim.from_torch(torch.optim.RAdam, lr=1e-2),
    ],
)
def test_every_optimizer_is_verified(optimizer):
    step = make(optimizer=optimizer)
    state = step.init()
    report = ff.verify(step, state, torch.randn(6, 4))
    assert report.ok, str(report)
    state, _ = step(state, torch.randn(6, 4))
    assert ff.verify(step, state, torch.randn(6, 4), steps=2).ok


def test_nothing_is_left_changed():
    step = make()
    state, _ = step(step.init(), torch.randn(6, 4))
    batch = torch.randn(6, 4)
    before = [t.clone() for t in (*state.params.values(), *state.buffers.values(), *step.module.parameters(), batch)]
    flags, rng, python = [m.training for m in step.module.modules()], torch.get_rng_state(), random.getstate()
    ff.verify(step, state, batch)
    after = [*state.params.values(), *state.buffers.values(), *step.module.parameters(), batch]
    assert all(map(torch.equal, before, after))
    assert flags == [m.training for m in step.module.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert python == random.getstate()


def test_a_model_that_wants_its_own_dtype():
    class Single(Net):
        pass

    def own_dtype(model, batch):
        constant = torch.eye(4, dtype=torch.float32)
        return losses(model, batch @ constant)

    step = ff.Step(Single().float(), own_dtype, ROUTES, optimizer=ff.optim.adamw(1e-3))
    report = ff.verify(step, step.init(), torch.randn(6, 4).float())
    assert report.ok, str(report)
    assert report.facts["dtype"] == "float32"
    assert "float64 failed: RuntimeError" in report.facts["because"]
    assert max(check.tolerance for check in report.checks) == 1e-1


def test_the_report_says_what_reaches_what():
    step = make()
    text = str(ff.verify(step, step.init(), torch.randn(6, 4)))
    assert text.startswith("ok: engine 'routed' against the recipe (dtype float64, steps 5)")
    assert re.search(r"encoder\.\* \(4\) gradients +cls, dom, far ", text)
    assert "touched sets" in text
    assert "2 bit-identical" in text
    assert re.search(r"still.* gradients +far .*never touched", text)


def test_arguments():
    step = make()
    with pytest.raises(ValueError, match="at least one step, got steps=0"):
        ff.verify(step, step.init(), torch.randn(6, 4), steps=0)
    with pytest.raises(TypeError, match="expected a State"):
        ff.verify(step, None, torch.randn(6, 4))


# --- planted faults --------------------------------------------------------------------------------------------------


class Faulty:
    """The routed engine with its outcome spoiled."""

    finds_other_leaves = True

    def __init__(self, spoil: Callable[[list[Any], Any], list[Any]], twice: bool = False) -> None:
        self.spoil, self.twice = spoil, twice

    def merged(self, evaluate, params, routing, step, seed=None):
        def again(leaves):
            first = evaluate(leaves)
            if not self.twice:
                return first
            losses, beside = first
            counts = {path: b + 1 if b.ndim == 0 else b for path, b in beside.buffers.items()}
            return losses, beside._replace(buffers=counts)

        outcome = Routed().merged(again, params, routing, step, seed)
        return replace(outcome, gradients=self.spoil(list(outcome.gradients), routing))

    separate = Routed().separate


def unchanged(gradients, routing):
    return gradients


def drop_one(gradients, routing):
    index = routing.paths.index("encoder.1.weight")
    return [None if i == index else g for i, g in enumerate(gradients)]


def swap_a_sign(gradients, routing):
    index = routing.paths.index("dom.bias")
    return [-g if i == index else g for i, g in enumerate(gradients)]


def zero_for_none(gradients, routing):
    index = routing.paths.index("still.bias")
    return [torch.zeros(3, dtype=torch.float64) if i == index else g for i, g in enumerate(gradients)]


@pytest.mark.parametrize(
    ("engine", "subject"),
    [
        (Faulty(drop_one), "touched sets"),
        (Faulty(swap_a_sign), "dom.{weight,bias}.* (2) gradients"),
        (Faulty(zero_for_none), "touched sets"),
        (Faulty(unchanged, twice=True), "buffer counts"),
    ],
)
def test_planted_faults_of_an_outcome(engine, subject, monkeypatch):
    monkeypatch.setattr(gradients, "ENGINES", {**gradients.ENGINES, "routed": engine})
    step = make()
    report = ff.verify(step, step.init(), torch.randn(6, 4))
    assert not report.ok
    failed = [check.subject for check in report.checks if not check.ok]
    assert any(subject.split(".")[0] in name for name in failed), failed
    assert "NOT OK" in str(report)


def without_an_entry(passes):
    """A dropped edge: one of the places where cotangents enter is forgotten."""
    return [p._replace(entries=p.entries[1:]) if len(p.entries) > 1 else p for p in passes]


def without_blocking(passes):
    """An exit counted twice: the engine runs through the stops."""
    return [p._replace(blocked=()) for p in passes]


def with_unit_weights(passes):
    """A weight forgotten where flows merge."""
    return [
        p._replace(
            entries=tuple(
                e._replace(sources=tuple(source._replace(weight=0) for source in e.sources)) for e in p.entries
            )
        )
        for p in passes
    ]


@pytest.mark.parametrize("fault", [without_an_entry, without_blocking, with_unit_weights])
def test_planted_faults_of_the_plan(fault, monkeypatch):
    step = make()
    assert ff.verify(step, step.init(), torch.randn(6, 4)).ok
    monkeypatch.setattr(routed_module, "plan_passes", lambda *given: tuple(fault(plan_passes(*given))))
    report = ff.verify(step, step.init(), torch.randn(6, 4))
    assert not report.ok
    assert any("gradients" in check.subject and not check.ok for check in report.checks)


def test_a_frozen_parameter_that_moves_is_seen(monkeypatch):
    def update(self, state, computed):
        after, metrics = original(self, state, computed)
        moved = {path: p + 1e-9 if path == "still.bias" else p for path, p in after.params.items()}
        return after.replace(params=moved), metrics

    original = Updating.update
    monkeypatch.setattr(Updating, "update", update)
    step = make()
    report = ff.verify(step, step.init(), torch.randn(6, 4))
    failed = [check for check in report.checks if not check.ok]
    assert [check.subject for check in failed] == ["untouched parameters"]
    assert "still.bias has changed" in failed[0].detail


def test_losses_that_do_not_use_their_model_are_not_ok():
    net = Net()
    step = ff.Step(net, lambda model, batch: losses(net, batch), ROUTES, optimizer=ff.optim.adamw(1e-2))
    report = ff.verify(step, step.init(), torch.randn(6, 4))
    assert not report.ok
    assert "does `losses` use the model it is given?" in str(report)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_tied_buffers_and_complex_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Module(), nn.Module()
            self.one.register_buffer("n", torch.zeros(2))
            self.two.register_buffer("n", self.one.n)
            self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

    def odd(model, batch):
        h = batch.to(model.weight.dtype) @ model.weight
        model.one.n += h.abs().mean(0).detach()
        return {"a": (h.abs() + model.two.n).square().mean()}

    step = ff.Step(Odd(), odd, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    report = ff.verify(step, step.init(), torch.randn(4, 3).float())
    assert report.ok, str(report)


def test_an_imaginary_error_is_an_error():
    from funcfreeze.proof.comparison import _norm

    assert _norm([torch.tensor([3j])]) == 3.0
