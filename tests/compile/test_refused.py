"""What cannot be compiled says so, names the place and the eager alternative, and changes nothing."""

from __future__ import annotations

import time

import numpy as np
import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff


def make(module, losses=None, **options):
    losses = losses or (lambda model, batch: {"loss": model(batch).square().mean()})
    options = {"optimizer": ff.optim.adam(0.1), "compile": {"backend": "aot_eager"}, **options}
    return ff.Step(module, losses, {"loss": "*"}, **options)


class Calls(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.linear, self.f, self.seen, self.hidden = nn.Linear(4, 4), f, 0, None

    def forward(self, x):
        return self.f(self, self.linear(x))


def branches(module, h):
    return h * 2 if h.sum() > 0 else h


def reads_foreign_memory(module, h):
    return h * torch.from_dlpack(np.ones(4))


def fails(module, h):
    raise KeyError("of the user's own")


REFUSALS = {
    "branches": (branches, RuntimeError, r"test_refused\.py:\d+ \(return h \* 2 if .*\).*torch\.where.*compile=False"),
    "foreign": (
        reads_foreign_memory,
        RuntimeError,
        r"test_refused\.py:\d+ \(return h \* torch\.from_dlpack.*\): .*is one graph.*in the batch.*compile=False",
    ),
    "fails": (fails, KeyError, "of the user's own"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_forwards(refusal):
    f, kind, message = REFUSALS[refusal]
    module = Calls(f)
    step = make(module)
    state, batch = step.init(), torch.randn(3, 4)
    before = [leaf.clone() for leaf in optree.tree_leaves(state)]
    attributes = dict(vars(module))
    held = module.linear.weight
    with pytest.raises(kind, match=message):
        step(state, batch)
    assert all(map(torch.equal, before, optree.tree_leaves(state)))
    assert vars(module) == attributes
    assert module.linear.weight is held
    with pytest.raises(kind, match=message):  # as clear the second time
        step(state, batch)


def test_route_errors_are_those_of_an_eager_step():
    step = make(nn.Linear(4, 4), lambda model, batch: {"other": model(batch).sum()})
    with pytest.raises(ff.RouteError, match=r"(?s)loss 'other' has no route.*route for loss 'loss'"):
        step(step.init(), torch.randn(3, 4))


def test_an_optimizer_that_counts_in_python():
    def init(params):
        return {"count": 0}

    def update(grads, state, params, *, step=None):
        return {path: -0.1 * grad for path, grad in grads.items()}, {"count": state["count"] + 1}

    step = make(nn.Linear(4, 4), optimizer=ff.optim.Transform(init, update))
    with pytest.raises(TypeError, match=r"holds 0, which became 1: a compiled step cannot count in Python.*tensor"):
        step(step.init(), torch.randn(3, 4))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"compile": "yes"}, TypeError, r"compile is None .*True, False, or a mapping.*got str: 'yes'"),
        ({"compile": {"fullgraph": False}}, ValueError, r"takes torch.compile's backend, mode, options and dynamic"),
        ({"compile": True, "engine": "toggle"}, ValueError, r"only the routed engine is compiled.*engine='toggle'"),
    ],
)
def test_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        make(nn.Linear(4, 4), **options)


def test_none_and_false_are_eager_on_the_cpu():
    for compile in (None, False):
        step = make(nn.Linear(4, 4), compile=compile)
        step(step.init(), torch.randn(3, 4))
        assert step.traces == 0


def returns_a_clock(model, batch):
    return {"loss": model(batch).sum()}, {"time": time.perf_counter()}


GENERATOR = np.random.default_rng()


def draws_from_an_object_of_numpy(model, batch):
    return {"loss": model(batch).sum() * GENERATOR.random()}


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize(
    ("losses", "line"),
    [
        (returns_a_clock, "time.perf_counter"),
        (draws_from_an_object_of_numpy, "GENERATOR.random"),
    ],
)
def test_losses(losses, line):
    """Dynamo's words are about Dynamo; the user's line comes first, then what to do, and no dump of a graph."""
    step = make(nn.Linear(4, 4), losses)
    with pytest.raises(
        RuntimeError, match=rf"test_refused\.py:\d+ \(.*{line}.*\): .*one graph.*compile=False"
    ) as caught:
        step(step.init(), torch.randn(3, 4))
    assert "\n" not in str(caught.value)


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_sizes_than_torch_allows():
    step = ff.Step(
        nn.Linear(4, 4),
        lambda model, batch: {"loss": model(batch).sum()},
        {"loss": "*"},
        optimizer=ff.optim.sgd(0.1),
        compile={"backend": "aot_eager", "dynamic": False},
    )
    state = step.init()
    for size in (2, 3):
        state, _ = step(state, torch.randn(size, 4))
    with pytest.raises(RuntimeError, match=r"as many different sizes.*recompile_limit.*Pad batches"):
        step(state, torch.randn(4, 4))


def test_an_optimizer_of_torchs_that_asks_for_values():
    step = ff.Step(
        nn.Linear(4, 4),
        lambda model, batch: {"loss": model(batch).sum()},
        {"loss": "*"},
        optimizer=ff.optim.from_torch(torch.optim.Adam, lr=ff.optim.linear_schedule(0.1, 0.2, 5)),
        compile={"backend": "aot_eager"},
    )
    with pytest.raises(RuntimeError, match=r"in the optimizer: Python asks.*funcfreeze.optim.*compile=False"):
        step(step.init(), torch.randn(3, 4))


def test_sparse_buffers():
    model = nn.Linear(4, 4)
    model.register_buffer("graph", torch.eye(4).to_sparse())
    step = make(model)
    with pytest.raises(ValueError, match=r"graph: a compiled step takes no sparse .*compile=False"):
        step(step.init(), torch.randn(3, 4))


def test_a_compiler_that_is_switched_off():
    step = make(nn.Linear(4, 4))
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match=r"switched off.*compile=False"):
        step(step.init(), torch.randn(3, 4))


@pytest.mark.parametrize(
    ("compile", "message"),
    [
        ({"backend": "eager"}, "compiles nothing; use compile=False"),
        ({"backend": "aot_eager", "mode": "reduce-overhead"}, "mode and options are Inductor's"),
    ],
)
def test_options_are_never_ignored(compile, message):
    with pytest.raises(ValueError, match=message):
        make(nn.Linear(4, 4), compile=compile)


def test_the_users_line_is_told_by_the_thousandth_step_of_a_process(monkeypatch):
    monkeypatch.setattr("funcfreeze.model.own_code._NUMBERS", iter([100_000]))  # past the last line of the file
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
    step = make(model, lambda model, x: {"loss": model(x).square().mean()})
    with pytest.raises(RuntimeError, match=r"test_refused\.py:\d+ \(.*which a compiled step"):
        step(step.init(), torch.randn(8, 4))
