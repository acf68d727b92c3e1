"""What members share is computed once a call, and walked by those that are routed into it, as in a DCGAN's loop."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import funcfreeze as ff

GRAPH = {"backend": "aot_eager"}
SLOWLY = pytest.param({"compile": GRAPH}, marks=pytest.mark.slow)
RUNS = [
    {},
    {"donate": False},
    {"engine": "toggle"},
    {"compile": GRAPH},
    pytest.param({"compile": GRAPH, "donate": False}, marks=pytest.mark.slow),
]
ADAM = ff.optim.adam(2e-3, betas=(0.5, 0.999))


def dcgan():
    """Generator and discriminator, BatchNorm in both."""
    return {
        "gen": nn.Sequential(
            nn.ConvTranspose2d(4, 6, 4, 1, 0, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 1, 2, 2)
        ),
        "disc": nn.Sequential(
            nn.Conv2d(1, 6, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(6, 6, 3, 1, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(96, 1),
        ),
    }


def bce(logits, target):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(target)))


def fakes(model, real):
    return model["gen"](torch.randn(len(real), 4, 1, 1))


def disc_losses(model, real, *, shared):
    return {"real": bce(model["disc"](real), 1), "fake": bce(model["disc"](shared), 0)}


def gen_losses(model, real, *, shared):
    return {"fool": bce(model["disc"](shared), 1)}


def alternation(model, **run):
    return ff.alternate(
        {
            "disc": ff.Step(model, disc_losses, {"real": "disc", "fake": "disc"}, optimizer=ADAM),
            "gen": ff.Step(model, gen_losses, {"fool": "gen"}, optimizer=ADAM),
        },
        shared=fakes,
        **run,
    )


def plain_dcgan(model, reals, every=1):
    """The loop of the DCGAN tutorial; the discriminator is frozen for the generator's backward."""
    gen, disc = model["gen"], model["disc"]
    gens, discs = (torch.optim.Adam(net.parameters(), 2e-3, betas=(0.5, 0.999)) for net in (gen, disc))
    for number, real in enumerate(reals):
        torch.manual_seed(number)
        fake = gen(torch.randn(len(real), 4, 1, 1))
        discs.zero_grad()
        bce(disc(real), 1).backward()
        bce(disc(fake.detach()), 0).backward()
        discs.step()
        if number % every == 0:
            gens.zero_grad()
            disc.requires_grad_(False)
            bce(disc(fake), 1).backward()
            gens.step()
            disc.requires_grad_(True)


def images(count):
    return [torch.randn(5, 1, 8, 8) for _ in range(count)]


def run(step, batches):
    state = step.init()
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        state, metrics = step(state, batch)
    return state, metrics


def assert_moved_alike(state, model, start):
    after = nn.ModuleDict(model)
    before = dict(nn.ModuleDict(start).named_parameters())
    for path, parameter in after.named_parameters():
        torch.testing.assert_close(
            state.params[path] - before[path], parameter.detach() - before[path], rtol=0, atol=1e-10, msg=path
        )
    for path, buffer in after.named_buffers():
        torch.testing.assert_close(state.buffers[path], buffer, rtol=0, atol=1e-10, msg=path)


@pytest.mark.parametrize("options", RUNS)
@pytest.mark.parametrize("every", [1, 2])
def test_the_loop_of_dcgan(options, every):
    model, reals = dcgan(), images(5)
    start = copy.deepcopy(model)
    step = alternation(model, every={"gen": every}, **options)
    state, metrics = run(step, reals)
    plain_dcgan(model, reals, every)
    assert_moved_alike(state, model, start)
    assert int(state.buffers["gen.1.num_batches_tracked"]) == 5  # once a call
    assert list(metrics) == ["disc", "gen"]
    assert step.traces == (3 if "compile" in options else 0)  # the discriminator's step, two halves of the generator's


def test_the_multiply_adds_of_the_plain_loop():
    model, reals = dcgan(), images(2)
    step = alternation(model)
    with FlopCounterMode(display=False) as ours:
        run(step, reals)
    with FlopCounterMode(display=False) as theirs:
        plain_dcgan(model, reals)
    assert ours.get_total_flops() == theirs.get_total_flops()


@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}])
def test_verify(options):
    step = alternation(dcgan(), **options)
    report = ff.verify(step, step.init(), images(1)[0])
    assert report.ok, report


@pytest.mark.parametrize("options", [{}, {"engine": "toggle"}, {"compile": GRAPH}])
def test_two_members_walk_through_the_same_graph(options):
    """Of an encoder that a third one owns, and each through a part of its own; the first must not let it go."""
    model = {
        "encoder": nn.Linear(4, 6),
        "left": nn.Linear(6, 3),
        "right": nn.Linear(6, 3),
        "head": nn.Linear(3, 1),
    }
    start = copy.deepcopy(model)

    def trunk(model, batch):
        h = torch.tanh(model["encoder"](batch))
        return {"left": torch.tanh(model["left"](h)), "right": (torch.tanh(model["right"](h)), "a label")}

    def left(model, batch, *, shared):
        return {"l": model["head"](shared["left"]).square().mean(), "own": model["left"].weight.square().sum()}

    def right(model, batch, *, shared):
        assert shared["right"][1] == "a label"
        return {"r": (shared["right"][0] - batch[:, :3]).square().mean()}

    def alone(model, batch):
        return {"e": model["encoder"](batch).square().mean()}

    sgd = ff.optim.sgd(0.1)
    step = ff.alternate(
        {
            "left": ff.Step(model, left, {"l": ["left", "head"], "own": {"left": 0.5}}, optimizer=sgd),
            "right": ff.Step(model, right, {"r": ["right"]}, optimizer=sgd),
            "encoder": ff.Step(
                model, lambda m, b: {"e": m["encoder"](b).square().mean()}, {"e": "encoder"}, optimizer=sgd
            ),
        },
        shared=trunk,
        **options,
    )
    batches = [torch.randn(5, 4) for _ in range(5)]
    state, _ = run(step, batches)
    for batch in batches:
        made = trunk(model, batch)
        losses = left(model, batch, shared=made)
        own = [*model["left"].parameters(), *model["head"].parameters()]
        gradients = torch.autograd.grad(losses["l"] + 0.5 * losses["own"], own, retain_graph=True)
        with torch.no_grad():
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.data -= 0.1 * gradient  # torch would refuse the next walk's version check on `left` otherwise
        own = [*model["right"].parameters()]
        gradients = torch.autograd.grad(right(model, batch, shared=made)["r"], own)
        with torch.no_grad():
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.data -= 0.1 * gradient
        own = [*model["encoder"].parameters()]
        gradients = torch.autograd.grad(model["encoder"](batch).square().mean(), own)
        with torch.no_grad():
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.data -= 0.1 * gradient
    assert_moved_alike(state, model, start)


@pytest.mark.parametrize(
    ("weights", "traces"), [((1.0, -0.5), 2), (("schedule", 1.0), 2), ({"one": 1.0, "two": 3.0}, 1)]
)
def test_weights_on_the_way_through(weights, traces):
    """Compiled where one cotangent serves all parameters below, eager where each wants its own; sizes may change."""
    model = {"one": nn.Linear(3, 4), "two": nn.Linear(4, 4), "head": nn.Linear(4, 1)}
    start = copy.deepcopy(model)

    def made(model, batch):
        return [model["two"](torch.tanh(model["one"](batch))), torch.tanh(model["two"].weight)]

    def losses(model, batch, *, shared):
        features, weight = shared
        found = {"fit": model["head"](features).square().mean(), "near": (features @ weight).mean()}
        return found, {"features": features, "wide": model["one"](batch).mean()}

    ramp = ff.schedules.linear(0.0, 1.0, 4)
    if isinstance(weights, dict):
        rows = {"fit": {"one": 1.0, "two": 1.0, "head": 1.0}, "near": weights}
    else:
        fit, near = (ramp if weight == "schedule" else weight for weight in weights)
        rows = {"fit": {"*": fit}, "near": {"one": near, "two": near}}
    step = ff.alternate({"all": ff.Step(model, losses, rows, optimizer=ff.optim.sgd(0.1))}, shared=made, compile=GRAPH)
    state, plain = step.init(), copy.deepcopy(start)
    for number in range(5):
        batch = torch.randn(5, 3)
        state, metrics = step(state, batch)
        shared = made(plain, batch)
        torch.testing.assert_close(metrics["all"]["features"], shared[0].detach())
        assert not metrics["all"]["features"].requires_grad
        found, _ = losses(plain, batch, shared=shared)
        parameters = dict(nn.ModuleDict(plain).named_parameters())
        updates = {path: torch.zeros_like(parameter) for path, parameter in parameters.items()}
        for loss, row in rows.items():
            gradients = torch.autograd.grad(found[loss], [*parameters.values()], retain_graph=True, allow_unused=True)
            for path, gradient in zip(parameters, gradients, strict=True):
                weight = row.get("*", row.get(path.split(".")[0]))
                if weight is not None and gradient is not None:
                    updates[path] += gradient * (float(weight(number)) if callable(weight) else weight)
        with torch.no_grad():
            for path, parameter in parameters.items():
                parameter -= 0.1 * updates[path]
    assert_moved_alike(state, plain, start)
    assert step.traces == traces
    state, _ = step(state, torch.randn(7, 3))  # of another size


@pytest.mark.parametrize("options", [{}, SLOWLY])
def test_hooks_and_checkpoints_in_what_is_shared(options):
    """A hook on a parameter sees what comes through the shared graph and past it, once for each loss."""
    model = {"gen": nn.Sequential(nn.Linear(3, 4), nn.Tanh()), "disc": nn.Linear(4, 1)}
    start = copy.deepcopy(model)
    seen = []

    def hook(gradient):
        seen.append(gradient.clone())
        return 2 * gradient

    def made(model, batch):
        fake = checkpoint(model["gen"], batch, use_reentrant=False)
        fake.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return fake

    def losses(model, batch, *, shared):
        score = model["disc"](shared)
        return {"fool": score.mean(), "small": 3.0 * shared.square().mean() + model["gen"](batch).mean()}

    model["gen"][0].weight.register_hook(hook)
    step = ff.alternate(
        {"gen": ff.Step(model, losses, {"fool": "gen", "small": {"gen": 0.5}}, optimizer=ff.optim.sgd(0.1))},
        shared=made,
        **options,
    )
    batches = [torch.randn(5, 3) for _ in range(3)]
    state, _ = run(step, batches)
    assert len(seen) == 6  # the losses are kept apart above the hook, as in loops of one backward a loss
    plain = copy.deepcopy(start)
    for batch in batches:
        h = made(plain, batch)
        found = losses(plain, batch, shared=h)
        parameters = [*plain["gen"].parameters()]
        rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in found.values()]
        with torch.no_grad():
            for parameter, one, other in zip(parameters, *rows, strict=True):
                factor = 2 if parameter is plain["gen"][0].weight else 1
                parameter -= 0.1 * factor * (one + 0.5 * other)
    assert_moved_alike(state, plain, start)


def test_no_graph_is_kept_where_nobody_walks():
    seen = []

    def made(model, real):
        fake = fakes(model, real)
        seen.append(fake.requires_grad)
        return fake

    model = dcgan()
    step = ff.alternate(
        {
            "disc": ff.Step(model, disc_losses, {"real": "disc", "fake": "disc"}, optimizer=ADAM),
            "gen": ff.Step(model, gen_losses, {"fool": "gen"}, optimizer=ADAM),
        },
        shared=made,
        every={"gen": 2},
    )
    run(step, images(4))
    assert seen == [True, False, True, False]


def test_the_graph_is_let_go_after_the_last_member_that_walks():
    alive = {}

    def made(model, real):
        kept = torch.randn(1000, requires_grad=False)
        alive["shared"] = weakref.ref(kept)
        return model["gen"](real) * kept.sum().exp().clamp(max=1.0) + kept[:4]

    def last(model, real):
        gc.collect()
        alive["later"] = alive["shared"]() is not None
        return {"d": model["disc"](real).mean()}

    model = {"gen": nn.Linear(3, 4), "disc": nn.Linear(3, 1)}
    sgd = ff.optim.sgd(0.1)
    walks = ff.Step(model, lambda m, b, *, shared: {"g": (shared**2).mean()}, {"g": "gen"}, optimizer=sgd)
    step = ff.alternate({"gen": walks, "last": ff.Step(model, last, {"d": "disc"}, optimizer=sgd)}, shared=made)
    run(step, [torch.randn(5, 3)])
    assert alive["later"] is False


def test_by_member():
    """Gradients, halves and rows of one member: what is shared is computed for it, and nothing of the state changes."""
    model = dcgan()
    step = alternation(model)
    state = step.init()
    before = copy.deepcopy(state)
    (real,) = images(1)
    torch.manual_seed(0)
    gradients = step.gradients(state, real, member="gen")
    torch.manual_seed(0)
    half = step.compute(state, real, member="gen")
    torch.manual_seed(0)
    rows = step.per_loss_gradients(state, real, member="disc")
    wanted = copy.deepcopy(model)
    torch.manual_seed(0)
    loss = gen_losses(wanted, real, shared=fakes(wanted, real))["fool"]
    loss.backward()
    for name, parameter in wanted["gen"].named_parameters():
        torch.testing.assert_close(gradients[f"gen.{name}"], parameter.grad)
        torch.testing.assert_close(half.gradients[f"gen.{name}"], parameter.grad)
    assert rows.keys() == {"real", "fake"}
    assert int(half.buffers["gen.1.num_batches_tracked"]) == 1
    for path, tensor in before.buffers.items():
        assert torch.equal(tensor, state.buffers[path]), path
    state, _ = step.apply_gradients(state, half, member="gen")
    assert int(state.buffers["gen.1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}])
def test_an_error_leaves_the_state_as_it_was(options):
    model, reals = dcgan(), images(3)
    fails = []

    def losses(model, real, *, shared):
        if fails:
            raise KeyError("mine")
        return disc_losses(model, real, shared=shared)

    step = ff.alternate(
        {
            "disc": ff.Step(model, losses, {"real": "disc", "fake": "disc"}, optimizer=ADAM),
            "gen": ff.Step(model, gen_losses, {"fool": "gen"}, optimizer=ADAM),
        },
        shared=fakes,
        **options,
    )
    state, _ = run(step, reals[:2])
    before = copy.deepcopy(state)
    fails.append(True)
    with pytest.raises(KeyError, match="mine"):
        step(state, reals[2])
    fails.clear()
    for field in ("params", "buffers"):
        for path, tensor in getattr(before, field).items():
            assert torch.equal(tensor, getattr(state, field)[path]), path
    torch.manual_seed(7)
    one, _ = step(state, reals[2])
    torch.manual_seed(7)
    other, _ = step(before, reals[2])
    for path, tensor in other.params.items():
        torch.testing.assert_close(one.params[path], tensor)


def test_an_error_in_what_is_shared():
    def fails(model, real):
        raise KeyError("mine")

    step = ff.alternate(alternation(dcgan()).members, shared=fails)
    state = step.init()
    with pytest.raises(KeyError, match="(?s)mine.*raised by what the members of an alternation share: fails"):
        step(state, images(1)[0])
    assert int(state.step) == 0


def test_a_member_that_would_walk_where_another_has_updated():
    model = {"encoder": nn.Linear(3, 4), "head": nn.Linear(4, 1)}
    sgd = ff.optim.sgd(0.1)

    def member(routes):
        return ff.Step(
            model, lambda m, b, *, shared: {"loss": m["head"](shared).mean()}, {"loss": routes}, optimizer=sgd
        )

    def encoded(model, batch):
        return model["encoder"](batch)

    step = ff.alternate({"critic": member("encoder"), "actor": member(["encoder", "head"])}, shared=encoded)
    state = step.init()
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match="computed once") as told:
        step(state, torch.randn(2, 3))
    assert str(told.value) == (
        "what is shared is computed once, before any member runs, and these would walk back through it where its "
        "values are old by then:\n"
        "  member 'actor', after 'critic' has updated encoder.bias, encoder.weight\n"
        "  let the member that walks run first, or compute in its own losses what depends on these"
    )
    for path, tensor in before.params.items():
        assert torch.equal(tensor, state.params[path])
    step = ff.alternate({"head": member("head"), "encoder": member("encoder")}, shared=encoded)
    step(step.init(), torch.randn(2, 3))  # the head is not met on the way through what is shared


def test_what_is_met_on_the_way_counts_too():
    """A layer above the one that is wanted: its old value would be needed, and is overwritten."""
    model = {"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)}
    sgd = ff.optim.sgd(0.1)
    members = {
        name: ff.Step(model, lambda m, b, *, shared: {"loss": shared.square().mean()}, {"loss": name}, optimizer=sgd)
        for name in ("two", "one")
    }
    step = ff.alternate(members, shared=lambda m, b: m["two"](m["one"](b)))
    with pytest.raises(ValueError, match="member 'one', after 'two' has updated two.bias, two.weight"):
        step(step.init(), torch.randn(2, 3))
    reversed_ = ff.alternate(dict(reversed(members.items())), shared=lambda m, b: m["two"](m["one"](b)))
    with pytest.raises(ValueError, match="member 'two', after 'one' has updated one.bias, one.weight"):
        reversed_(reversed_.init(), torch.randn(2, 3))


def test_declarations_that_cannot_be():
    model = dcgan()
    adam = ADAM

    def steps(**options):
        return {
            "disc": ff.Step(model, disc_losses, {"real": "disc", "fake": "disc"}, optimizer=adam, **options),
            "gen": ff.Step(model, gen_losses, {"fool": "gen"}, optimizer=adam),
        }

    lone = steps()["gen"]
    with pytest.raises(ValueError, match=r"`losses` names 'shared': funcfreeze.alternate\(..., shared=f\) gives that"):
        lone.init()
    with pytest.raises(ValueError, match=r"(?s)member 'disc': `losses` names 'shared'.*member 'gen': `losses` names"):
        ff.alternate(steps())
    with pytest.raises(ValueError, match='engine="reference" .* cannot walk a graph that was made before'):
        ff.alternate(steps(), shared=fakes, engine="reference")
    with pytest.raises(ValueError, match="member 'disc' has microbatches=2, and what is shared is computed for the"):
        ff.alternate(steps(microbatches=2), shared=fakes)
    with pytest.raises(TypeError, match=r"shared is a function shared\(model, batch\), got str: 'gen'"):
        ff.alternate(steps(), shared="gen")
    nobody = ff.Step(model, lambda m, b: {"l": m["gen"](b).mean()}, {"l": "gen"}, optimizer=adam)
    with pytest.raises(ValueError, match="shared is given, and no member's losses name it"):
        ff.alternate({"one": nobody}, shared=fakes)
    with pytest.raises(ValueError, match="what is shared: `losses` names 'targets'"):
        ff.alternate(steps(), shared=lambda m, b, *, targets: b)
    step = alternation(model)
    with pytest.raises(ValueError, match="what is shared is computed for a whole batch, and this one is Microbatches"):
        step(step.init(), ff.Microbatches(images(2)))


def test_the_plan_says_what_is_shared():
    assert "\nshared  fakes, for disc, gen" in str(alternation(dcgan()).plan)


def test_a_batch_called_shared_is_a_batch():
    """The first two parameters are model and batch, however they are called."""
    model = nn.Linear(2, 1)
    step = ff.Step(model, lambda net, shared: {"l": net(shared).mean()}, {"l": "*"}, optimizer=ADAM)
    step(step.init(), torch.randn(3, 2))


@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}, {"donate": False}])
def test_a_member_that_does_not_ask_counts_too(options):
    """torch's fused kernels bump no version: nobody else would notice that values are old."""
    model = {"gen": nn.Linear(3, 3), "disc": nn.Linear(3, 1)}
    sgd = ff.optim.sgd(0.1)
    members = {
        "disc": ff.Step(model, lambda m, b: {"d": m["disc"](b).mean()}, {"d": "disc"}, optimizer=sgd),
        "gen": ff.Step(model, lambda m, b, *, shared: {"g": shared.mean()}, {"g": "gen"}, optimizer=sgd),
    }
    step = ff.alternate(members, shared=lambda m, b: m["disc"](m["gen"](b)).tanh(), **options)
    with pytest.raises(ValueError, match="member 'gen', after 'disc' has updated disc.bias, disc.weight"):
        step(step.init(), torch.randn(2, 3))
    step = ff.alternate(dict(reversed(members.items())), shared=lambda m, b: m["disc"](m["gen"](b)).tanh(), **options)
    step(step.init(), torch.randn(2, 3))


@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}])
@pytest.mark.parametrize("walkers", [1, 2])
def test_checkpointing_in_what_is_shared(options, walkers):
    """It is computed once more while the member walks, on the values and with the flags of the first time."""
    model = {name: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)) for name in ("one", "two")}
    start = copy.deepcopy(model)

    def plainly(model, batch):
        return [model["one"](batch).tanh(), model["two"](batch).tanh()]

    def made(model, batch):
        return checkpoint(lambda batch: tuple(plainly(model, batch)), batch, use_reentrant=False)

    def member(index, name):
        return ff.Step(
            model,
            lambda m, b, *, shared: {"loss": shared[index].square().mean() + m[name](b).mean()},
            {"loss": name},
            optimizer=ff.optim.sgd(0.5),
        )

    names = ["one", "two"][:walkers]
    step = ff.alternate({name: member(index, name) for index, name in enumerate(names)}, shared=made, **options)
    batches = [torch.randn(5, 3) for _ in range(4)]
    state, _ = run(step, batches)
    plain = copy.deepcopy(start)
    for batch in batches:
        shared = plainly(plain, batch)
        for index, name in enumerate(names):
            parameters = [*plain[name].parameters()]
            loss = shared[index].square().mean() + plain[name](batch).mean()
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.5 * gradient
    assert_moved_alike(state, plain, start)


@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}])
def test_reentrant_checkpointing_is_refused(options):
    model = {"gen": nn.Linear(3, 3)}
    step = ff.alternate(
        {"gen": ff.Step(model, lambda m, b, *, shared: {"g": shared.mean()}, {"g": "gen"}, optimizer=ADAM)},
        shared=lambda m, b: checkpoint(m["gen"], b.requires_grad_(), use_reentrant=True),
        **options,
    )
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing, whose parameters autograd cannot see"):
        step(step.init(), torch.randn(2, 3))


@pytest.mark.parametrize("options", [{}, SLOWLY])
def test_statistics_that_a_member_freezes_are_frozen_in_what_is_shared(options):
    model = {"gen": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "disc": nn.Linear(4, 1)}
    step = ff.alternate(
        {
            "gen": ff.Step(
                model,
                lambda m, b, *, shared: {"g": m["disc"](shared).mean()},
                {"g": "gen"},
                optimizer=ff.optim.sgd(0.1),
                frozen_statistics="gen",
            )
        },
        shared=lambda m, b: m["gen"](b),
        **options,
    )
    state = step.init()
    state, _ = step(state, torch.randn(5, 3))
    assert int(state.buffers["gen.1.num_batches_tracked"]) == 0
    assert torch.equal(state.buffers["gen.1.running_mean"], torch.zeros(4))
    assert model["gen"][1].training
    assert ff.verify(step, state, torch.randn(5, 3)).ok


def inner_nets():
    return {"enc": nn.Linear(3, 3), "h": nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))}


def two_places(model, batch):
    w = model["enc"](batch).tanh()
    return {"w": w, "y": model["h"](w)}


def path_length(model, batch, *, shared):
    outside = shared["y"].sum() + shared["w"].square().sum()
    (g,) = torch.autograd.grad(outside, shared["w"], create_graph=True)
    return {"loss": g.square().mean()}


def adaptive_weight(model, batch, *, shared):
    rec = shared["y"].square().mean() + model["enc"].weight.square().mean()
    (g,) = torch.autograd.grad(rec, model["enc"].weight, retain_graph=True)
    return {"loss": rec * g.norm().detach()}


def functional_gradient(model, batch, *, shared):
    g = torch.func.grad(lambda w: model["h"](w).sum())(shared["w"])
    return {"loss": g.square().mean() + shared["y"].mean()}


@pytest.mark.parametrize("losses", [path_length, adaptive_weight, functional_gradient])
@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}])
def test_gradients_inside_of_losses_at_what_is_shared(losses, options):
    """One place of it is above the other, which only the real graph knows."""
    model = inner_nets()
    start = copy.deepcopy(model)
    step = ff.alternate(
        {"one": ff.Step(model, losses, {"loss": ["enc", "h"]}, optimizer=ff.optim.sgd(0.1))},
        shared=two_places,
        **options,
    )
    batches = [torch.randn(5, 3) for _ in range(3)]
    state, _ = run(step, batches)
    plain = copy.deepcopy(start)
    parameters = [*nn.ModuleDict(plain).parameters()]
    for batch in batches:
        loss = losses(plain, batch, shared=two_places(plain, batch))["loss"]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * (0 if gradient is None else gradient)
    assert_moved_alike(state, plain, start)


def test_hooks_on_what_is_shared():
    def losses(model, batch, *, shared):
        shared["w"].register_hook(lambda gradient: 3 * gradient)
        return {"loss": model["h"](shared["w"]).square().mean()}

    model = inner_nets()
    start = copy.deepcopy(model)
    member = ff.Step(model, losses, {"loss": ["enc", "h"]}, optimizer=ff.optim.sgd(0.1))
    batch, plain = torch.randn(5, 3), copy.deepcopy(start)
    eager = ff.alternate({"one": member}, shared=two_places)
    state, _ = eager(eager.init(), batch)
    losses(plain, batch, shared=two_places(plain, batch))["loss"].backward()
    with torch.no_grad():
        for parameter in nn.ModuleDict(plain).parameters():
            parameter -= 0.1 * parameter.grad
    assert_moved_alike(state, plain, start)
    compiled = ff.alternate({"one": member}, shared=two_places, compile=GRAPH)
    with pytest.raises(RuntimeError, match="a hook on what is shared, which a compiled member cannot follow: register"):
        compiled(compiled.init(), batch)


@pytest.mark.parametrize("options", [{}, {"donate": False}, {"compile": GRAPH}])
def test_what_is_shared_moves_an_encoder_and_goes_through_it(options):
    model = {"q": nn.Linear(3, 3), "k": nn.Linear(3, 3)}
    start = copy.deepcopy(model)

    def made(model, batch):
        with torch.no_grad():
            for one, other in zip(model["k"].parameters(), model["q"].parameters(), strict=True):
                one.lerp_(other, 0.5)
        return model["k"](model["q"](batch))

    step = ff.alternate(
        {
            "q": ff.Step(
                model,
                lambda m, b, *, shared: {"loss": shared.square().mean()},
                {"loss": "q"},
                optimizer=ff.optim.sgd(0.1),
            )
        },
        shared=made,
        **options,
    )
    batches = [torch.randn(5, 3) for _ in range(3)]
    state, _ = run(step, batches)
    plain = copy.deepcopy(start)
    plain["k"].requires_grad_(False)
    for batch in batches:
        own = [*plain["q"].parameters()]
        gradients = torch.autograd.grad(made(plain, batch).square().mean(), own)
        with torch.no_grad():
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter -= 0.1 * gradient
    assert_moved_alike(state, plain, start)


@pytest.mark.parametrize("options", [{}, {"compile": GRAPH}])
def test_tensors_in_an_object_that_is_no_container(options):
    model = inner_nets()
    step = ff.alternate(
        {
            "one": ff.Step(
                model,
                lambda m, b, *, shared: {"loss": m["h"](shared.loc).mean()},
                {"loss": ["enc", "h"]},
                optimizer=ff.optim.sgd(0.1),
            )
        },
        shared=lambda m, b: torch.distributions.Normal(m["enc"](b), 1.0),
        **options,
    )
    with pytest.raises(
        TypeError, match=r"what is shared is tensors, in containers of any kind; got a Normal with a .*\.loc"
    ):
        step(step.init(), torch.randn(2, 3))


@pytest.mark.parametrize("options", [{}, {"donate": False}, SLOWLY])
def test_a_parameter_that_is_shared_is_as_it_was(options):
    """Its memory is overwritten by then."""
    model = {"emb": nn.Linear(3, 3, bias=False), "head": nn.Linear(3, 3, bias=False)}
    start = model["emb"].weight.detach().clone()
    sgd = ff.optim.sgd(0.1)
    step = ff.alternate(
        {
            "emb": ff.Step(model, lambda m, b: {"l": m["emb"](b).mean()}, {"l": "emb"}, optimizer=sgd),
            "head": ff.Step(
                model,
                lambda m, b, *, shared: ({"l": (m["head"](b) @ shared).mean()}, {"seen": shared}),
                {"l": "head"},
                optimizer=sgd,
            ),
        },
        shared=lambda m, b: m["emb"].weight,
        **options,
    )
    state, metrics = step(step.init(), torch.randn(4, 3))
    assert torch.equal(metrics["head"]["seen"], start)
    assert not torch.equal(state.params["emb.weight"], start)


@pytest.mark.parametrize("options", [{}, SLOWLY])
def test_inference_mode_around_it(options):
    step, (first, second) = alternation(dcgan(), **options), images(2)
    with torch.inference_mode():
        state, _ = step(step.init(), first)
    state, _ = step(state, second)
    assert int(state.step) == 2


def test_a_parameter_at_which_losses_differentiate():
    model = inner_nets()

    def losses(model, batch, *, shared):
        (g,) = torch.autograd.grad(shared["y"].sum(), model["h"][0].weight, create_graph=True)
        return {"loss": g.square().mean()}

    one = ff.Step(model, losses, {"loss": "enc"}, optimizer=ff.optim.sgd(0.1), differentiable="h.0.weight")
    step = ff.alternate({"one": one}, shared=two_places)
    state, batch = step.init(), torch.randn(5, 3)
    gradients = step.gradients(state, batch, member="one")
    losses(model, batch, shared=two_places(model, batch))["loss"].backward()
    torch.testing.assert_close(gradients["enc.weight"], model["enc"].weight.grad)


def test_verify_where_what_is_shared_wants_its_own_dtype():
    def disc(model, batch, *, shared):
        return {"d": model["disc"](shared).mean()}

    def gen(model, batch, *, shared):
        return {"g": -model["disc"](shared).mean()}

    model = {"gen": nn.Linear(4, 6).float(), "disc": nn.Linear(6, 1).float()}
    step = ff.alternate(
        {
            "disc": ff.Step(model, disc, {"d": "disc"}, optimizer=ADAM),
            "gen": ff.Step(model, gen, {"g": "gen"}, optimizer=ADAM),
        },
        shared=lambda m, b: m["gen"](torch.randn(len(b), 4, dtype=torch.float32)),
    )
    report = ff.verify(step, step.init(), torch.randn(8, 6, dtype=torch.float32))
    assert report.ok, report
    assert report.facts["dtype"] == "float32"
    assert report.facts["because"].startswith("float64 failed: RuntimeError, mat1 and mat2 must have the same dtype")


@pytest.mark.parametrize("options", [{}, {"donate": False}, {"compile": GRAPH}])
def test_statistics_come_out_of_a_skipped_call_as_they_were(options):
    """What is shared has met the NaN before any member could skip; who does not skip keeps what it was given."""
    model = dcgan()

    def members(**of_gen):
        skip = {"on_nonfinite": "skip"}
        disc = ff.Step(model, disc_losses, {"real": "disc", "fake": "disc"}, optimizer=ADAM, **skip)
        return {"disc": disc, "gen": ff.Step(model, gen_losses, {"fool": "gen"}, optimizer=ADAM, **of_gen)}

    def made(model, real):
        return model["gen"](torch.randn(len(real), 4, 1, 1) * real.mean().clamp(max=1.0))

    step = ff.alternate(members(on_nonfinite="skip"), shared=made, **options)
    state, _ = run(step, images(3))
    before = copy.deepcopy(state)
    state, metrics = step(state, torch.full((5, 1, 8, 8), float("nan")))
    assert all(bool(seen["ff/skipped"]) for seen in metrics.values())
    for field in ("params", "buffers"):
        for path, tensor in getattr(before, field).items():
            assert torch.equal(getattr(state, field)[path], tensor), path
    state, metrics = step(state, images(1)[0])
    assert int(state.buffers["gen.1.num_batches_tracked"]) == 4
    assert all(bool(tensor.isfinite().all()) for tensor in state.buffers.values())
