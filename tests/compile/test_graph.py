"""What is in the compiled graph, counted: matmuls, compilations, and verification of a compiled step."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx

import funcfreeze as ff
from bench import workloads
from funcfreeze.optim.opaque import KERNELS

OPERATIONS = tuple(
    getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "convolution", "convolution_backward")
)


def counting(counts):
    """A backend that notes how many matrix products and convolutions are in each graph."""

    def compile(graph, inputs):
        counts.append(sum(_products(node) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compile, bw_compiler=compile, inference_compiler=compile)


def _products(node):
    """A convolution's backward is one product for the input's gradient and one for the weight's, where wanted."""
    if node.target is torch.ops.aten.convolution_backward.default:
        return sum(node.args[-1][:2])
    return int(node.target in OPERATIONS)


def in_our_graph(workload):
    counts = []
    step = ff.Step(
        workload.model,
        workload.losses,
        workload.routes,
        optimizer=ff.optim.sgd(0.1),
        compile={"backend": counting(counts)},
    )
    step(step.init(), workload.batch())
    assert len(counts) == step.traces == 1
    return counts[0]


def by_hand(workload):
    """In the forward and the backward of the best that a careful user writes: one loss, one backward."""
    counts = []
    model = workload.model
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in routed(workload))
    torch.compile(lambda batch: workload.by_hand(model, batch), backend=counting(counts))(workload.batch()).backward()
    return sum(counts)


def routed(workload):
    step = ff.Step(workload.model, workload.losses, workload.routes, optimizer=ff.optim.sgd(0.1), compile=False)
    return set(step.plan.routed)


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


WORKLOADS = {
    "adversarial": lambda: workloads.adversarial(16, 8),
    "resnet": lambda: workloads.resnet(image=32, size=4),
    "vit-4": lambda: workloads.vit(4, width=32, depth=1, size=4),
    "gpt": lambda: workloads.gpt(width=32, depth=1, size=2, length=8),
    "gan": lambda: workloads.gan(16, size=8),
    "actor-critic": lambda: workloads.actor_critic(16),
}


def test_the_designs_example_has_57():
    """An adversarial loss that only the encoder follows; gradients of the two losses apart have 74."""
    workload = workloads.adversarial(16, 8)
    routes = {"cls": ["encoder", "classes"], "dom": "encoder"}
    assert in_our_graph(dataclasses.replace(workload, routes=routes)) == 57


LONG = {"resnet", "vit-4", "gpt", "adversarial"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in WORKLOADS])
def test_no_more_products_than_by_hand(name):
    assert 0 < in_our_graph(WORKLOADS[name]()) <= by_hand(WORKLOADS[name]())


@pytest.mark.parametrize("hooked", ["an activation", "a parameter"])
def test_a_hook_keeps_no_more_apart_than_eagerly(hooked):
    counts, linear = [], torch.nn.Linear
    model = torch.nn.ModuleDict(
        {"trunk": torch.nn.Sequential(*[linear(4, 4) for _ in range(6)]), "a": linear(4, 1), "b": linear(4, 1)}
    )
    if hooked == "a parameter":
        model["a"].weight.register_hook(lambda grad: grad * 2)

    def losses(model, x):
        h = model["trunk"](x)
        seen = h * 1.0
        if hooked == "an activation":
            seen.register_hook(lambda grad: grad * 2)
        return {"a": model["a"](seen).sum(), "b": model["b"](h).sum()}

    step = ff.Step(
        model, losses, {"a": "*", "b": "*"}, optimizer=ff.optim.sgd(0.1), compile={"backend": counting(counts)}
    )
    step(step.init(), torch.randn(3, 4))
    assert counts == [23]  # 8 forward, 8 for weights, 7 for activations; with the losses apart 34


@pytest.mark.parametrize(
    "make",
    [
        ff.optim.adam,
        pytest.param(partial(ff.optim.sgd, momentum=0.9), marks=pytest.mark.slow),
        pytest.param(ff.optim.rmsprop, marks=pytest.mark.slow),
    ],
)
def test_optimizers_kernels_run_after_the_graph(make, monkeypatch):
    calls, graphs = [], []
    for operator, kernel in KERNELS.items():

        def noted(params, grads, *args, kernel=kernel, **kwargs):
            calls.append(len(grads))
            kernel(params, grads, *args, **kwargs)

        monkeypatch.setitem(KERNELS, operator, noted)

    def compile(graph, inputs):
        graphs.append((len(inputs), {node.target for node in graph.graph.nodes} & {*KERNELS}))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compile, inference_compiler=compile)
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(20)])
    step = ff.Step(
        model, lambda model, x: {"a": model(x).sum()}, {"a": "*"}, optimizer=make(0.1), compile={"backend": backend}
    )
    step(step.init(), torch.randn(3, 2))
    assert calls == [40]
    assert graphs == [(41, set())]  # 40 parameters and the batch; nothing of the optimizer


def test_schedules_do_not_recompile():
    step = ff.Step(
        torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 2)}),
        lambda model, x: {"l": model["b"](model["a"](x)).square().mean(), "m": model["a"](x).mean()},
        {"l": "*", "m": {"a": -0.3 * ff.optim.dann_schedule(10)}},
        optimizer=ff.optim.adamw(ff.optim.linear_schedule(1e-2, 1e-3, 5)),
        compile={"backend": "aot_eager"},
    )
    state = step.init()
    for _ in range(5):
        state, _ = step(state, torch.randn(3, 4))
    assert step.traces == 1


def test_rates_and_weights_in_tensors_are_read_at_every_step():
    rate, weight = torch.tensor(0.1), torch.tensor(1.0)
    step = ff.Step(
        torch.nn.Linear(4, 4),
        lambda model, x: {"l": model(x).sum()},
        {"l": ff.Route("*", weight=weight)},
        optimizer=ff.optim.sgd(rate),
        compile={"backend": "aot_eager"},
    )
    state, x = step.init(), torch.ones(1, 4)
    moves = []
    for new_rate, new_weight in ((0.1, 1.0), (0.2, 1.0), (0.2, -3.0)):
        rate.fill_(new_rate), weight.fill_(new_weight)
        before = state.params["bias"].clone()
        state, _ = step(state, x)
        moves.append(float((state.params["bias"] - before)[0]))
    assert moves == pytest.approx([-0.1, -0.2, 0.6], rel=1e-5)
    assert step.traces == 1


def test_a_new_size_is_compiled_once_and_then_any():
    step = ff.Step(
        torch.nn.Linear(4, 4),
        lambda model, x: {"l": model(x).square().mean()},
        {"l": "*"},
        optimizer=ff.optim.sgd(0.1),
        compile={"backend": "aot_eager"},
    )
    state = step.init()
    for size in (6, 7, 8, 9, 17):
        state, _ = step(state, torch.randn(size, 4))
    assert step.traces == 2


def test_verify_runs_the_compiled_step():
    torch.set_default_dtype(torch.float64)
    model = torch.nn.ModuleDict(
        {"body": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.3)), "head": torch.nn.Linear(4, 2)}
    )
    step = ff.Step(
        model,
        lambda model, x: {"a": model["head"](model["body"](x)).square().mean(), "b": model["body"](x).mean()},
        {"a": "*", "b": {"body": -0.1}},
        optimizer=ff.optim.adam(1e-2),
        compile=True,  # with dropout, whose numbers Inductor draws in its own way
    )
    report = ff.verify(step, step.init(), torch.randn(6, 4))
    assert report.ok, report


@torch._functorch.config.patch(enable_autograd_cache=False)  # or nothing might be compiled
@pytest.mark.parametrize("donate", [True, False])
def test_the_states_tensors_are_static_inputs(donate, monkeypatch):
    """So CUDA graphs do not copy them; copies made for each step are not. By Inductor's account, on any device."""
    seen, original = [], compile_fx.get_static_input_idxs

    def noticed(fixed):
        seen.append(list(original(fixed)))
        return seen[-1]

    monkeypatch.setattr(compile_fx, "get_static_input_idxs", noticed)
    step = ff.Step(
        torch.nn.Linear(4, 4),
        lambda model, x: {"l": model(x).square().mean()},
        {"l": "*"},
        optimizer=ff.optim.sgd(0.1, momentum=0.9),
        compile={"options": {"triton.cudagraphs": True}},  # else the optimizer's kernel runs after the graph
        donate=donate,
    )
    step(step.init(), torch.randn(3, 4))
    assert seen[-1] == ([0, 1, 2, 3] if donate else [])  # 2 parameters, 2 buffers of momentum


def test_the_options_of_cuda_graphs_run_anywhere():
    step = ff.Step(
        torch.nn.Linear(4, 4),
        lambda model, x: {"l": model(x).square().mean()},
        {"l": "*"},
        optimizer=ff.optim.sgd(0.1),
        compile={"mode": "reduce-overhead"},
    )
    eager = ff.Step(step.module, step.losses, step.plan, optimizer=step.optimizer, compile=False)
    mine, theirs = step.init(), eager.init()
    for _ in range(3):
        x = torch.randn(3, 4)
        mine, metrics = step(mine, x)
        theirs, wanted = eager(theirs, x)
        torch.testing.assert_close(metrics, wanted)
    torch.testing.assert_close(mine.params["weight"], theirs.params["weight"])
