"""On a CUDA device: the same steps, CUDA graphs without copies of parameters, nothing that waits for the device."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff
from recipe_run import assert_same_displacement, recipe_run, step_run
from waiting import waiting_is_an_error

pytestmark = pytest.mark.gpu

GRAPHS = {"mode": "reduce-overhead", "options": {"triton.cudagraph_or_error": True}}
ROUTES = {"cls": ["encoder", "cls"], "dom": {"dom": 1.0, "encoder": -0.1}}
WEIGHTS = {"cls": {"encoder": 1.0, "cls": 1.0}, "dom": {"dom": 1.0, "encoder": -0.1}}


def network():
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64)),
            "cls": nn.Linear(64, 8),
            "dom": nn.Linear(64, 2),
        }
    ).cuda()


def losses(model, batch):
    x, label, domain = batch
    h = model["encoder"](x)
    return {"cls": F.cross_entropy(model["cls"](h), label), "dom": F.cross_entropy(model["dom"](h), domain)}


def batches(count, size=64):
    return [
        (
            torch.randn(size, 32, device="cuda"),
            torch.randint(8, (size,), device="cuda"),
            torch.randint(2, (size,), device="cuda"),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("compile", [None, False, True, GRAPHS], ids=["default", "eager", "inductor", "CUDA graphs"])
def test_a_step_equals_plain_pytorch(compile):
    """`None` is compiled on CUDA."""
    model, given = network(), batches(6)
    start = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adam(1e-2), compile=compile)
    wanted, returned = recipe_run(model, losses, WEIGHTS, given, lambda parameters: torch.optim.Adam(parameters, 1e-2))
    state, metrics = step_run(step, given)
    assert_same_displacement(state, start, wanted, rtol=1e-5)
    assert step.traces == (compile is not False)
    for found, seen in zip(returned, metrics, strict=True):  # also those of steps long past
        torch.testing.assert_close(seen["cls"], found["cls"], rtol=1e-3, atol=1e-3)


def test_cuda_graphs_keep_addresses_and_copy_no_parameters():
    """Addresses never change, so that nothing is recorded again and nothing is copied into a graph's own memory."""
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.adam(1e-2), compile=GRAPHS)
    state = step.init()
    given = batches(8)
    for batch in given[:4]:
        state, _ = step(state, batch)
    places = {path: tensor.data_ptr() for path, tensor in state.params.items()}
    allocated = torch.cuda.memory_allocated()
    for batch in given[4:]:
        state, _ = step(state, batch)
    assert {path: tensor.data_ptr() for path, tensor in state.params.items()} == places
    assert torch.cuda.memory_allocated() <= allocated + 2**16
    assert step.traces == 1


@pytest.mark.parametrize("compile", [False, True, GRAPHS], ids=["eager", "inductor", "CUDA graphs"])
@pytest.mark.parametrize("loss_scale", [None, ff.LossScale(2.0**8, growth_interval=3)], ids=["plain", "scaled"])
def test_nothing_waits_for_the_device(compile, loss_scale):
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.adam(1e-2), compile=compile, loss_scale=loss_scale)
    state = step.init()
    given = batches(6)
    for batch in given[:4]:
        state, _ = step(state, batch)
    with waiting_is_an_error():
        for batch in given[4:]:
            state, _ = step(state, batch)


@pytest.mark.parametrize("compile", [False, True, GRAPHS], ids=["eager", "inductor", "CUDA graphs"])
@pytest.mark.parametrize("loss_scale", [None, ff.LossScale(2.0**8)], ids=["plain", "scaled"])
def test_schedules_and_rmsprop_wait_for_nothing(compile, loss_scale):
    """A table of numbers too, which is copied to the device at the first step; the numbers are torch's."""
    lambdas = torch.optim.lr_scheduler.LambdaLR
    rate = ff.schedules.from_torch(lambdas, lr=1e-2, lr_lambda=lambda k: 0.7**k, steps=20)
    weight = 1 - ff.schedules.cosine(1.0, 0.5, 4)
    model, given = network(), batches(6)
    step = ff.Step(
        model,
        losses,
        {"cls": "*", "dom": {"*": weight}},
        optimizer=ff.optim.rmsprop(rate, momentum=0.9, centered=True),
        compile=compile,
        loss_scale=loss_scale,
    )
    eager = copy.deepcopy(model)
    optimizer = torch.optim.RMSprop(eager.parameters(), 1e-2, momentum=0.9, centered=True)
    scheduler = lambdas(optimizer, lambda k: 0.7**k)
    for number, batch in enumerate(given):
        optimizer.zero_grad()
        found = losses(eager, batch)
        (found["cls"] + float(weight(number)) * found["dom"]).backward()
        optimizer.step()
        scheduler.step()
    state = step.init()
    for batch in given[:3]:
        state, _ = step(state, batch)
    with waiting_is_an_error():
        for batch in given[3:]:
            state, _ = step(state, batch)
    assert step.traces == (compile is not False)
    for path, parameter in eager.named_parameters():
        torch.testing.assert_close(state.params[path], parameter.detach(), rtol=1e-3, atol=1e-4)


def test_float16_with_a_loss_scale_compiled():
    model, given = network(), batches(6)
    given[3][0].fill_(float("inf"))

    def half(model, batch):
        with torch.autocast("cuda", dtype=torch.float16):
            return losses(model, batch)

    runs = [
        step_run(
            ff.Step(
                model,
                half,
                ROUTES,
                optimizer=ff.optim.adam(1e-3),
                compile=compile,
                loss_scale=ff.LossScale(2.0**10, growth_interval=2),
            ),
            given,
        )[0]
        for compile in (True, False)
    ]
    assert float(runs[0].optimizer["loss_scale"]["scale"]) == float(runs[1].optimizer["loss_scale"]["scale"])
    for path, parameter in runs[1].params.items():
        assert parameter.isfinite().all()
        torch.testing.assert_close(runs[0].params[path], parameter, rtol=4e-3, atol=4e-3)


def test_bfloat16_parameters_with_float32_state():
    model, given = network().bfloat16(), [(x.bfloat16(), label, domain) for x, label, domain in batches(4)]
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adamw(1e-3, state_dtype=torch.float32), compile=True)
    state, _ = step_run(step, given)
    assert state.params["cls.weight"].dtype == torch.bfloat16
    assert state.optimizer["cls.weight"]["exp_avg"].dtype == torch.float32


def test_verify():
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.adam(1e-2))
    report = ff.verify(step, step.init(), batches(1)[0], steps=2)
    assert report.ok, report


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_a_state_of_torchs_whose_counts_are_on_the_cpu_goes_on(compile):
    """Where torch keeps them unless told otherwise; the fused kernel wants them on the device."""
    model, given = network(), batches(4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def train(batch):
        optimizer.zero_grad()
        sum(losses(model, batch).values()).backward()
        optimizer.step()

    train(given[0])
    step = ff.Step(model, losses, {"cls": "*", "dom": "*"}, optimizer=ff.optim.adam(1e-2), compile=compile)
    kept = {path: copy.deepcopy(dict(optimizer.state[p])) for path, p in model.named_parameters()}
    assert {entry["step"].device.type for entry in kept.values()} == {"cpu"}
    state = step.init().replace(optimizer=kept)
    for batch in given[1:]:
        state, _ = step(state, batch)
        train(batch)
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(state.params[path], parameter.detach(), rtol=1e-4, atol=1e-5)
        assert state.optimizer[path]["step"].device.type == "cuda"
        assert float(state.optimizer[path]["step"]) == float(optimizer.state[parameter]["step"]) == 4.0


@pytest.mark.parametrize("compile", [False, True, GRAPHS], ids=["eager", "inductor", "CUDA graphs"])
@pytest.mark.parametrize("decay", [0.9, 0.0, "schedule", "tensor"])
def test_turns_twins_and_what_is_shared_wait_for_nothing(compile, decay):
    """Members of which one rests at times, a twin that rests too, a graph that both use; and the numbers of a loop."""
    decays = {"schedule": ff.schedules.linear(0.5, 1.0, 8), "tensor": torch.tensor(0.9, device="cuda")}
    model = network()
    start = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    plain = copy.deepcopy(model)

    def features(model, batch):
        return model["encoder"](batch[0])

    def critic(model, batch, *, shared, targets):
        return {"dom": F.cross_entropy(model["dom"](shared), batch[2]) + targets["twin"](shared).square().mean()}

    def encoder(model, batch, *, shared):
        return {"cls": F.cross_entropy(model["cls"](shared), batch[1])}

    sgd, twin = ff.optim.sgd(0.1), ff.ema("cls", decays.get(decay, decay), every=2)
    step = ff.alternate(
        {
            "critic": ff.Step(model, critic, {"dom": "dom"}, optimizer=sgd, targets={"twin": ff.ema("cls", 0.5)}),
            "encoder": ff.Step(model, encoder, {"cls": ["cls", "encoder"]}, optimizer=sgd, targets={"slow": twin}),
        },
        every={"encoder": 2},
        shared=features,
        compile=compile,
    )
    state, given = step.init(), batches(12)
    for batch in given[:8]:
        state, _ = step(state, batch)
    with waiting_is_an_error():
        for batch in given[8:]:
            state, _ = step(state, batch)
    for number, batch in enumerate(given):
        h = plain["encoder"](batch[0])
        dom = [*plain["dom"].parameters()]
        rows = torch.autograd.grad(F.cross_entropy(plain["dom"](h.detach()), batch[2]), dom)
        cls = [*plain["cls"].parameters(), *plain["encoder"].parameters()]
        more = torch.autograd.grad(F.cross_entropy(plain["cls"](h), batch[1]), cls) if number % 2 == 0 else ()
        with torch.no_grad():
            for parameter, gradient in [*zip(dom, rows, strict=True), *zip(cls, more, strict=False)]:
                parameter -= 0.1 * gradient
    assert_same_displacement(state, start, plain, rtol=1e-3)


MERGE_RULES = {
    "mean": ff.merge.mean(),
    "pcgrad": ff.merge.pcgrad(),
    "mgda": ff.merge.mgda(),
    "upgrad": ff.merge.upgrad(),
    "cagrad": ff.merge.cagrad(0.5),
    "imtl_g": ff.merge.imtl_g(),
    "aligned_mtl": ff.merge.aligned_mtl(scale="median"),
    "graddrop": ff.merge.graddrop(),
    "gradnorm": ff.merge.gradnorm(),
    "dwa": ff.merge.dwa(3),
}


@pytest.mark.parametrize("compile", [False, True, GRAPHS], ids=["eager", "inductor", "CUDA graphs"])
@pytest.mark.parametrize("losses_met", [3, 10])
def test_merge_rules_wait_for_nothing(compile, losses_met):
    """A part of the trunk under every rule, in one graph; and the numbers of the same step on the CPU."""
    names = [f"loss{k}" for k in range(losses_met)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = nn.ModuleDict({name: nn.Linear(6, 5) for name in MERGE_RULES})
        heads = nn.ModuleDict({name: nn.Linear(5, 1) for name in names})
        model = nn.ModuleDict({"trunk": trunk, "heads": heads}).double()
        given = [torch.randn(8, 6, dtype=torch.float64) for _ in range(6)]

    def met(model, x):
        h = torch.tanh(sum(part(x) for part in model["trunk"].values()))
        return {name: (head(h) - k).square().mean() for k, (name, head) in enumerate(model["heads"].items())}

    routes = {name: ["trunk", f"heads.{name}"] for name in names}
    merge = {f"trunk.{name}": rule for name, rule in MERGE_RULES.items()}
    make = {"optimizer": ff.optim.sgd(0.1), "merge": merge}
    by_hand = ff.Step(model, met, routes, compile=False, **make)
    step = ff.Step(copy.deepcopy(model).cuda(), met, routes, compile=compile, **make)
    wanted, state = by_hand.init(), step.init()
    batches = [x.cuda() for x in given]
    for x in batches[:3]:
        state, metrics = step(state, x)
    with waiting_is_an_error():
        for x in batches[3:]:
            state, metrics = step(state, x)
    assert step.traces == (compile is not False)
    for x in given:
        wanted, expected = by_hand(wanted, x)
    for path, start in model.named_parameters():
        moved, right = state.params[path].cpu() - start.detach(), wanted.params[path] - start.detach()
        torch.testing.assert_close(moved, right, rtol=1e-4, atol=1e-7)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].cpu(), value, rtol=1e-4, atol=1e-7, equal_nan=True)
