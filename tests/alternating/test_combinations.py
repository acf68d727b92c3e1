"""Options together, in random combinations, against a plain loop that does each of them by hand."""

from __future__ import annotations

import copy
import os
import random
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import funcfreeze as ff

GRAPH = {"backend": "aot_eager"}
SLOW = pytest.mark.slow
ROWS = 12


def nets():
    def block(i, o):
        # no bias where BatchNorm takes it away again: its gradient is rounding, of which Adam makes steps
        return nn.Sequential(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.Tanh(), nn.Dropout(0.2))

    return {"encoder": block(4, 6), "q": nn.Sequential(block(6, 6), nn.Linear(6, 1)), "pi": nn.Linear(6, 2)}


def critic(model, batch, targets):
    x, y = batch
    with torch.no_grad():
        wanted = y + 0.5 * targets["q"](targets["slow"](x)) if targets else y
    h = model["encoder"](x)
    return {"td": (model["q"](h) - wanted).square().mean(), "small": h.square().mean()}


def actor(model, batch, targets):
    x, _ = batch
    h = model["encoder"](x)
    near = (h - targets["slow"](x)).square().mean() if targets else h.abs().mean()
    return {"pi": (model["pi"](h).softmax(-1)[:, :1] * model["q"](h)).mean(), "near": near}


ROUTES = {
    "critic": {"td": ["encoder", "q"], "small": {"encoder": 0.3}},
    "actor": {"pi": "pi", "near": {"encoder": -0.2, "pi": 1.0}},
}
LOSSES = {"critic": critic, "actor": actor}


def drawn(seed):
    """A combination."""
    draw = random.Random(seed)
    return {
        "every": draw.choice([1, 2]),
        "start": draw.choice([0, 1]),
        "microbatches": {name: draw.choice([None, 2, 3]) for name in LOSSES},
        "frozen": {name: draw.choice([None, "encoder", "q"]) for name in LOSSES},
        "on_nonfinite": {name: draw.choice(["ignore", "skip"]) for name in LOSSES},
        "targets": draw.random() < 0.8,
        "decay": draw.choice([0.9, 0.0, "schedule"]),
        "target_every": draw.choice([1, 2]),
        "buffers": draw.choice(["own", "copied", "averaged"]),
        "mode": draw.choice([None, "eval"]),
        "timed": draw.choice([None, {"start": 1}, {"every": 2}, {"stop": 3}]),
        "donate": draw.random() < 0.7,
        "poisoned": draw.choice([None, 1, 2]),
    }


def routes_of(name, timed):
    if name == "actor" or timed is None:
        return ROUTES[name]
    return {**ROUTES["critic"], "small": ff.Route("encoder", weight=0.3, **timed)}


def decay_of(options):
    return ff.schedules.linear(0.5, 1.0, 8) if options["decay"] == "schedule" else options["decay"]


def built(model, options, **run):
    """The combination as it is declared here."""
    targets = {
        "q": ff.ema("q", decay_of(options), every=options["target_every"], buffers=options["buffers"]),
        "slow": ff.ema("encoder", 0.95, mode=options["mode"]),
    }

    def member(name, owned):
        function = LOSSES[name]

        def asking(model, batch, *, targets):
            return function(model, batch, targets)

        return ff.Step(
            model,
            asking if options["targets"] else lambda model, batch: function(model, batch, None),
            routes_of(name, options["timed"]),
            optimizer=ff.optim.adam(1e-2, eps=1e-3) if name == "critic" else ff.optim.sgd(0.05, momentum=0.9),
            microbatches=options["microbatches"][name],
            frozen_statistics=options["frozen"][name],
            on_nonfinite=options["on_nonfinite"][name],
            targets=owned or None,
        )

    by = {"critic": targets, "actor": {}} if options["targets"] else {"critic": {}, "actor": {}}
    return ff.alternate(
        {name: member(name, by[name]) for name in LOSSES},
        every={"actor": options["every"]},
        start={"actor": options["start"]},
        donate=options["donate"],
        **run,
    )


@contextmanager
def norms_frozen(module):
    norms = [] if module is None else [part for part in module.modules() if isinstance(part, nn.BatchNorm1d)]
    for norm in norms:
        norm.eval()
    yield
    for norm in norms:
        norm.train()


class PlainLoop:
    """What somebody would write without the package."""

    def __init__(self, model, options):
        self.model, self.options = model, options
        own = [*model["encoder"].parameters(), *model["q"].parameters()]
        self.groups = {"critic": own, "actor": [*model["encoder"].parameters(), *model["pi"].parameters()]}
        self.optimizers = {
            "critic": torch.optim.Adam(own, 1e-2, eps=1e-3),
            "actor": torch.optim.SGD(self.groups["actor"], 0.05, momentum=0.9),
        }
        self.twins = {"q": copy.deepcopy(model["q"]), "slow": copy.deepcopy(model["encoder"])}
        self.clocks = {"critic": 0, "actor": 0}
        self.skipped = []
        if options["mode"] == "eval":
            self.twins["slow"].eval()

    def call(self, number, batch):
        self.turn("critic", batch)
        if number >= self.options["start"] and (number - self.options["start"]) % self.options["every"] == 0:
            self.turn("actor", batch)

    def turn(self, name, batch):
        count, options = self.clocks[name], self.options
        self.clocks[name] += 1
        kept = [buffer.clone() for buffer in self.buffers()]
        gradients, is_finite = self.gradients(name, batch, count)
        if options["on_nonfinite"][name] == "skip" and not is_finite:
            for buffer, before in zip(self.buffers(), kept, strict=True):
                buffer.copy_(before)
            self.skipped.append((name, count))
            return
        for parameter in self.groups[name]:
            parameter.grad = gradients.get(parameter)
        self.optimizers[name].step()
        if name == "critic" and options["targets"]:
            self.move(count)

    def gradients(self, name, batch, count):
        parts = [batch]
        if options_number := self.options["microbatches"][name]:
            parts = [*zip(*(tensor.chunk(options_number) for tensor in batch), strict=True)]
        frozen = self.options["frozen"][name]
        gradients, is_finite = {}, True
        for part in parts:
            with norms_frozen(None if frozen is None else self.model[frozen]):
                self.follow_modes()
                losses = LOSSES[name](self.model, part, self.twins if self.options["targets"] else None)
            for loss, value in losses.items():
                is_finite = is_finite and bool(value.isfinite())
                for parameter, weight in self.weights(name, loss, count):
                    (found,) = torch.autograd.grad(value, [parameter], retain_graph=True, allow_unused=True)
                    if found is not None:
                        gradients[parameter] = gradients.get(parameter, 0) + weight * found / len(parts)
        return gradients, is_finite and all(bool(g.isfinite().all()) for g in gradients.values())

    def weights(self, name, loss, count):
        encoder, q, pi = ([*self.model[part].parameters()] for part in ("encoder", "q", "pi"))
        if loss == "small":
            timed = {"start": 0, "stop": 10**9, "every": 1, **(self.options["timed"] or {})}
            if count not in range(timed["start"], timed["stop"], timed["every"]):
                return []
        return {
            "td": [(p, 1.0) for p in encoder + q],
            "small": [(p, 0.3) for p in encoder],
            "pi": [(p, 1.0) for p in pi],
            "near": [*((p, -0.2) for p in encoder), *((p, 1.0) for p in pi)],
        }[loss]

    def follow_modes(self):
        pairs = [("q", "q")] if self.options["mode"] == "eval" else [("q", "q"), ("slow", "encoder")]
        for twin, part in pairs:
            for own, other in zip(self.twins[twin].modules(), self.model[part].modules(), strict=True):
                own.training = other.training

    @torch.no_grad()
    def move(self, count):
        given = decay_of(self.options)
        decay = float(given(count)) if callable(given) else given
        if count % self.options["target_every"] == 0:
            self.average("q", "q", decay)
            for own, other in zip(self.twins["q"].buffers(), self.model["q"].buffers(), strict=True):
                if self.options["buffers"] == "averaged" and own.is_floating_point():
                    own.mul_(decay).add_(other, alpha=1 - decay)
                elif self.options["buffers"] != "own":
                    own.copy_(other)
        self.average("slow", "encoder", 0.95)

    def average(self, twin, part, decay):
        for own, other in zip(self.twins[twin].parameters(), self.model[part].parameters(), strict=True):
            own.mul_(decay).add_(other, alpha=1 - decay)

    def buffers(self):
        modules = [*self.model.values(), *self.twins.values()]
        return [buffer for module in modules for buffer in module.buffers()]


def batches(options, count=5):
    given = [(torch.randn(ROWS, 4), torch.randn(ROWS, 1)) for _ in range(count)]
    can_be = "skip" in options["on_nonfinite"].values() and "ignore" not in options["on_nonfinite"].values()
    if options["poisoned"] is not None and can_be:
        given[options["poisoned"]][0][0, 0] = float("nan")
    return given


def near(one, other, what, options):
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=lambda text: f"{what}: {text} {options}")


def assert_equal_to_the_loop(seed, **run):
    options = drawn(seed)
    model = nets()
    start = copy.deepcopy(model)
    step, loop = built(model, options, **run), PlainLoop(copy.deepcopy(model), options)
    state, given = step.init(), batches(options)
    skipped = []
    for number, batch in enumerate(given):
        torch.manual_seed(number)
        state, metrics = step(state, batch)
        skipped += [name for name, seen in metrics.items() if bool(seen.get("ff/skipped", False))]
        torch.manual_seed(number)
        loop.call(number, batch)
    assert skipped == [name for name, _ in loop.skipped], options
    before = dict(nn.ModuleDict(start).named_parameters())
    for path, parameter in nn.ModuleDict(loop.model).named_parameters():
        near(state.params[path] - before[path], parameter.detach() - before[path], path, options)
    for path, buffer in nn.ModuleDict(loop.model).named_buffers():
        near(state.buffers[path], buffer, path, options)
    for name, twin in loop.twins.items() if options["targets"] else ():
        for path, tensor in twin.state_dict().items():
            near(state.targets[name][path], tensor, f"target {name}: {path}", options)
    assert {name: int(clock) for name, clock in state.clocks.items()} == loop.clocks
    if "compile" in run:
        assert step.traces <= 12, step.traces


@pytest.mark.parametrize("number", [pytest.param(n, marks=SLOW if n > 11 else ()) for n in range(24)])
def test_random_combinations(number):
    assert_equal_to_the_loop(int(os.environ["FUNCFREEZE_TEST_SEED"]) + number)


@pytest.mark.parametrize("number", [pytest.param(n, marks=SLOW if n > 1 else ()) for n in range(8)])
def test_random_combinations_compiled(number):
    assert_equal_to_the_loop(int(os.environ["FUNCFREEZE_TEST_SEED"]) + 1000 + number, compile=GRAPH)
