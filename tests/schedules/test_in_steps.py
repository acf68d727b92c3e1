"""Schedules where they are used: as rates and weights of steps, eager and compiled, and in loops of one's own."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import lr_scheduler as torchs

import funcfreeze as ff
from funcfreeze.schedules import cosine, dann, exponential, from_torch, join, linear, piecewise, polynomial, table

COMPILED = [False, {"backend": "aot_eager"}]
STEPS = 9


def network():
    return nn.ModuleDict({"encoder": nn.Linear(4, 3), "cls": nn.Linear(3, 2), "dom": nn.Linear(3, 1)})


def losses(model, x):
    h = model["encoder"](x).tanh()
    return {"cls": model["cls"](h).square().mean(), "dom": model["dom"](h).square().mean()}


def by_hand(model, batches, weight, scheduled):
    """The recipe, with a rate that torch's own scheduler sets and a weight computed by Python."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.05)
    scheduler = scheduled(optimizer)
    for number, x in enumerate(batches):
        found = losses(model, x)
        optimizer.zero_grad()
        encoder = [*model["encoder"].parameters()]
        (found["cls"] + weight(number) * found["dom"]).backward(inputs=encoder, retain_graph=True)
        found["cls"].backward(inputs=[*model["cls"].parameters()], retain_graph=True)
        found["dom"].backward(inputs=[*model["dom"].parameters()])
        optimizer.step()
        scheduler.step()
    return {path: parameter.detach().clone() for path, parameter in model.named_parameters()}


RATES = {
    "a formula": (
        from_torch(torchs.LinearLR, lr=0.05, total_iters=4),
        lambda optimizer: torchs.LinearLR(optimizer, total_iters=4),
    ),
    "a table": (
        from_torch(torchs.LambdaLR, lr=0.05, lr_lambda=lambda k: 0.7**k, steps=STEPS),
        lambda optimizer: torchs.LambdaLR(optimizer, lambda k: 0.7**k),
    ),
    "joined": (
        join([from_torch(torchs.LinearLR, lr=0.05, total_iters=3), cosine(0.05, 0.0, 6)], [3]),
        lambda optimizer: torchs.SequentialLR(
            optimizer, [torchs.LinearLR(optimizer, total_iters=3), torchs.CosineAnnealingLR(optimizer, 6)], [3]
        ),
    ),
    "a product": (
        table([0.5**k for k in range(20)]) * 0.05 * piecewise([1, 0.1], [4]),
        lambda optimizer: torchs.ChainedScheduler(
            [torchs.ExponentialLR(optimizer, 0.5), torchs.MultiStepLR(optimizer, [4])]
        ),
    ),
}


@pytest.mark.parametrize("compile", COMPILED, ids=["eager", "compiled"])
@pytest.mark.parametrize(("rate", "scheduled"), RATES.values(), ids=RATES)
def test_a_step_is_the_recipe_with_torchs_scheduler(rate, scheduled, compile):
    model, batches = network(), [torch.randn(5, 4) for _ in range(STEPS)]
    weight = -0.3 * (1 - polynomial(1, 0.2, 6, 2)) + table([0.5, -0.5, 0.25])
    step = ff.Step(
        model,
        losses,
        {"cls": ["encoder", "cls"], "dom": {"dom": 1.0, "encoder": weight}},
        optimizer=ff.optim.rmsprop(rate),
        compile=compile,
    )
    state = step.init()
    for x in batches:
        state, _ = step(state, x)
    assert step.traces == (compile is not False)
    expected = by_hand(
        model,
        batches,
        lambda k: -0.3 * (1 - (0.2 + 0.8 * (1 - min(k / 6, 1)) ** 2)) + [0.5, -0.5, 0.25][min(k, 2)],
        scheduled,
    )
    for path, value in expected.items():
        torch.testing.assert_close(state.params[path], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_kind_compiled_once_and_as_eagerly(backend):
    schedules = [
        getattr(ff.schedules, name)(*arguments)
        for name, arguments in {
            "constant": (0.3,),
            "linear": (1, 0, 4),
            "cosine": (1, 0, 4),
            "cosine_wave": (1, 0, 3),
            "cosine_restarts": (1, 0, 2, 2),
            "exponential": (1, 0.5, 2),
            "staircase": (1, 0.5, 2),
            "polynomial": (1, 0, 5, 2),
            "piecewise": ([1, 2, 3], [2, 4]),
            "triangle_wave": (0, 1, 2, 1),
            "table": ([1, 2, 5],),
            "dann": (5,),
        }.items()
    ]
    assert len(schedules) == len(ff.schedules.__all__) - 3  # Schedule, join, from_torch
    schedules += [join(schedules[:4], [1, 2, 5]), schedules[1] * schedules[2] - 0.5, 1 - schedules[10]]
    model = nn.ParameterDict({f"p{index}": nn.Parameter(torch.zeros(2)) for index in range(len(schedules))})
    routes = {f"p{index}": {f"p{index}": schedule} for index, schedule in enumerate(schedules)}
    step = ff.Step(
        model,
        lambda m, x: {path: p.sum() * x for path, p in m.items()},
        routes,
        optimizer=ff.optim.sgd(1.0),
        compile={"backend": backend},
    )
    state = step.init()
    for number in range(7):
        before = {path: p.clone() for path, p in state.params.items()}
        state, _ = step(state, torch.ones(()))
        for index, schedule in enumerate(schedules):
            moved = before[f"p{index}"] - state.params[f"p{index}"]
            torch.testing.assert_close(moved, schedule(number).expand(2), rtol=1e-12, atol=1e-12)
    assert step.traces == 1


def test_a_table_is_no_constant_of_the_graph():
    """It would be copied to the device at every step, and compared number by number where graphs are cached."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([tuple(value.shape) for value in inputs])
        assert not [name for name, _ in graph.named_buffers()]
        return graph.forward

    step = ff.Step(
        nn.Linear(2, 1),
        lambda m, x: {"a": m(x).sum()},
        {"a": {"*": table([float(k) for k in range(1000)])}},
        optimizer=ff.optim.sgd(0.5 * table([1.0, 2.0, 3.0])),
        compile={"backend": backend},
    )
    state = step.init()
    for number in range(4):
        bias = float(state.params["bias"])
        state, _ = step(state, torch.zeros(1, 2))
        assert float(state.params["bias"]) - bias == pytest.approx(-number * 0.5 * min(number + 1, 3), rel=1e-12)
    assert len(graphs) == 1
    assert (1000,) not in graphs[0]


def test_a_plan_with_any_schedule_is_plain_data():
    model = network()
    for weight in (
        -0.3 * dann(800),
        1 - cosine(1, 0, 10) * exponential(1, 0.9),
        join([linear(0, 1, 10), 1.0], [10]),
        from_torch(torchs.LambdaLR, lr=1.0, lr_lambda=lambda k: 1 / (1 + k), steps=5),
    ):
        plan = ff.plan(model, {"cls": "cls", "dom": {"dom": 1.0, "encoder": weight}})
        assert ff.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        assert f"w1 = {weight!r}" in str(plan)
        assert ff.Route("encoder", weight=weight) == ff.Route(
            "encoder", weight=type(weight).from_dict(weight.to_dict())
        )


def test_a_long_table_does_not_fill_the_screen():
    plan = ff.plan(network(), {"cls": {"*": table([k / 7 for k in range(10_000)])}})
    (shown,) = [line for line in str(plan).splitlines() if line.startswith("w1 = ")]
    assert shown.startswith("w1 = table(values=(0.0, 0.14285714285714285, ")
    assert " ... " in shown
    assert shown.endswith("1428.4285714285713))")
    assert len(shown) < 240


@pytest.mark.parametrize("compiled", [False, True])
def test_in_a_loop_of_ones_own(compiled):
    """Also inside of `torch.compile`, with the step in a tensor."""
    for rate in (1 - linear(1, 0.5, 4), 0.1 * table([1, 2, 4]), join([table([1, 2]), 0.5], [3])):
        tx, counter = ff.optim.sgd(rate), CompileCounter()

        def update(grads, params, step, tx=tx):
            return tx.update(grads, {"w": {}}, params, step=step)[0]

        torch.compiler.reset()
        run = torch.compile(update, backend=counter, fullgraph=True) if compiled else update
        for number in range(6):
            moved = run({"w": torch.ones(2)}, {"w": torch.zeros(2)}, torch.tensor(number))["w"]
            torch.testing.assert_close(moved, -rate(number).expand(2))
        assert counter.frame_count == compiled


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_table_in_a_function_that_somebody_compiles(device):
    schedule, counter = 0.5 * table([1.0, 2.0, 3.0]), CompileCounter()
    run = torch.compile(lambda step: schedule(step) + 1, backend=counter, fullgraph=True)
    for step in (0, 2, 1, 7):
        value = run(torch.tensor(step, device=device))
        assert (value.device.type, value.shape) == (device, ())
        if device == "cpu":
            assert float(value) == 1 + 0.5 * min(step + 1, 3)
    assert counter.frame_count == 1
    assert float(schedule(1)) == 1.0


def test_under_a_transform_a_table_is_kept_by_no_wrapper():
    schedule = table([1.0, 2.0, 4.0])

    def weighted(x, step):
        return (schedule(step) * x).sum()

    gradient = torch.func.grad(weighted)(torch.ones(2), torch.tensor(2))
    assert gradient.tolist() == [4.0, 4.0]
    for device in ("meta", "cpu"):  # where it is placed inside of a transform, and used outside
        x, step = torch.ones(2, device=device), torch.tensor(1, device=device)
        assert torch.func.grad(weighted)(x, step).device == schedule(step).device == x.device
    batched = torch.func.vmap(lambda step: schedule(step))(torch.arange(4))
    assert batched.tolist() == [1.0, 2.0, 4.0, 4.0]
    assert float(schedule(1)) == 2.0


def test_verify_and_a_loss_scale_read_them_too():
    model = network()
    step = ff.Step(
        model,
        losses,
        {"cls": ["encoder", "cls"], "dom": {"dom": 1.0, "encoder": -0.3 * dann(5)}},
        optimizer=ff.optim.rmsprop(from_torch(torchs.OneCycleLR, max_lr=0.1, total_steps=20, cycle_momentum=False)),
        loss_scale=ff.LossScale(8.0),
    )
    report = ff.verify(step, step.init(), torch.randn(5, 4), steps=3)
    assert report.ok, report


def test_outside_of_a_step_there_is_no_step():
    model = network()
    found = losses(model, torch.ones(1, 4))
    text = r"the weight 1 - linear\(a=0, b=1, steps=5\) is a schedule of the step, and there is no step here"
    with pytest.raises(TypeError, match=text):
        ff.backward(found, {"cls": {"*": 1 - linear(0, 1, 5)}, "dom": "*"}, model)
