"""A batch in parts gives the update of the loop that accumulates gradients, or of the whole batch where it is one."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff
from bench.memory import peak_bytes
from funcfreeze.computation.microbatches import split

GRAPH = {"backend": "aot_eager"}
RUNS = {
    "eager": {},
    "kept": {"donate": False},
    "reference": {"engine": "reference"},
    "toggle": {"engine": "toggle"},
    "compiled": {"compile": GRAPH},
    "compiled, kept": {"compile": GRAPH, "donate": False},
}
ROUTES = {"cls": ["encoder", "cls"], "adv": {"adv": 1.0, "encoder": -0.1}}


def network():
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2)),
            "cls": nn.Linear(6, 3),
            "adv": nn.Linear(6, 2),
        }
    )


def losses(model, batch):
    h = model["encoder"](batch["x"])
    found = {
        "cls": F.cross_entropy(model["cls"](h), batch["y"]),
        "adv": F.cross_entropy(model["adv"](h), batch["d"]) if batch["adversary"] else None,
    }
    return found, {"size": len(batch["y"]), "mean": h.mean()}


def batch(size=12, adversary=True):
    return {
        "x": torch.randn(size, 4),
        "y": torch.randint(3, (size,)),
        "d": torch.randint(2, (size,)),
        "adversary": adversary,
    }


def parts_of(whole, number):
    rows = len(whole["y"]) // number
    return [
        {name: v[i * rows : (i + 1) * rows] if isinstance(v, torch.Tensor) else v for name, v in whole.items()}
        for i in range(number)
    ]


def accumulate(model, optimizer, parts, shares):
    """The loop that people write, with the reversed gradient by hand."""
    optimizer.zero_grad()
    for part, share in zip(parts, shares, strict=True):
        found, _ = losses(model, part)
        (found["cls"] * share["cls"]).backward(
            retain_graph=True, inputs=[*model["encoder"].parameters(), *model["cls"].parameters()]
        )
        if found["adv"] is not None:
            heads = [*model["adv"].parameters()]
            trunk = [*model["encoder"].parameters()]
            given = torch.autograd.grad(found["adv"] * share["adv"], [*heads, *trunk])
            for parameter, gradient in zip([*heads, *trunk], given, strict=True):
                signed = gradient if any(parameter is head for head in heads) else -0.1 * gradient
                parameter.grad = signed if parameter.grad is None else parameter.grad + signed
    optimizer.step()


def displaced(start, now):
    return {path: (now[path].detach() - start[path]).double() for path in start}


def values(model):
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {path: value.detach().clone() for path, value in found.items()}


def assert_same(start, state, model):
    mine, theirs = displaced(start, {**state.params, **state.buffers}), displaced(start, values(model))
    for path, moved in theirs.items():
        torch.testing.assert_close(mine[path], moved, rtol=0, atol=1e-10, msg=path)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_loop_that_accumulates(run):
    """With batch statistics, dropout, an adversary that is absent in some parts, and parts of a loader's own."""
    model = network()
    start, plain = values(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-2)
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adamw(1e-2), microbatches=3, **run)
    state = step.init()
    given = [
        batch(),
        batch(),
        ff.Microbatches([batch(4), batch(5), batch(6, adversary=False), batch(4)]),
        batch(),
        ff.Microbatches([batch(7)]),
    ]
    torch.manual_seed(0)
    for one in given:
        state, metrics = step(state, one)
        assert metrics["size"] == tuple(
            len(part["y"]) for part in (one if isinstance(one, tuple) else parts_of(one, 3))
        )
    torch.manual_seed(0)
    for one in given:
        parts = one if isinstance(one, tuple) else parts_of(one, 3)
        accumulate(plain, optimizer, parts, [dict.fromkeys(ROUTES, 1 / len(parts))] * len(parts))
    assert_same(start, state, plain)
    assert int(state.step) == 5
    assert int(state.buffers["encoder.1.num_batches_tracked"]) == 3 + 3 + 4 + 3 + 1


@pytest.mark.parametrize("run", [{}, {"compile": GRAPH}], ids=["eager", "compiled"])
def test_one_graph_whatever_the_shares(run):
    """The shares are inputs; sizes are Dynamo's affair."""
    step = ff.Step(network(), losses, ROUTES, optimizer=ff.optim.sgd(0.1), **run)
    state = step.init()
    for number in (2, 3, 5, 4):
        state, _ = step(state, ff.Microbatches([batch(4) for _ in range(number)]))
    assert step.traces == (2 if run else 0)


class Reader(nn.Module):
    """A language model in which positions are left out of the loss."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, tokens):
        return self.head(self.table(tokens))


def language(model, given):
    logits = model(given["tokens"])
    return {
        "lm": F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), ignore_index=-100),
        "small": logits.square().mean(),
    }


@pytest.mark.parametrize("run", [{}, {"compile": GRAPH}, {"engine": "toggle"}], ids=["eager", "compiled", "toggle"])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_means_over_tokens_are_weighted_by_tokens(run, number):
    """A mean of means is not the mean; parts that differ by a row are fine where every loss is counted."""
    model = Reader()
    tokens = torch.randint(7, (8, 6))
    labels = torch.where(torch.rand(8, 6) < torch.linspace(0.1, 0.9, 8)[:, None], -100, tokens)
    given = {"tokens": tokens, "labels": labels}
    counts = {
        "lm": lambda part: (part["labels"] != -100).sum(),
        "small": lambda part: part["tokens"].numel(),
    }
    routes = {"lm": "*", "small": {"head": 0.5}}
    whole = ff.Step(model, language, routes, optimizer=ff.optim.adam(1e-2))
    split = ff.Step(model, language, routes, optimizer=ff.optim.adam(1e-2), microbatches=number, counts=counts, **run)
    one, other = whole.init(), split.init()
    start = {path: value.clone() for path, value in one.params.items()}
    for _ in range(4):
        one, wanted = whole(one, given)
        other, seen = split(other, given)
        for name, value in wanted.items():
            torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-12)
    moved = displaced(start, one.params)
    for path, displacement in displaced(start, other.params).items():
        torch.testing.assert_close(displacement, moved[path], rtol=0, atol=1e-10)


@pytest.mark.parametrize("run", [{}, {"compile": GRAPH}, {"engine": "toggle"}], ids=["eager", "compiled", "toggle"])
def test_a_part_without_a_single_token(run):
    """Its mean is NaN, and so is its gradient times 0; it counts nothing."""
    model, tokens = Reader(), torch.randint(7, (4, 6))
    given = {"tokens": tokens, "labels": torch.where(torch.arange(4)[:, None] == 1, -100, tokens)}
    counts = {"lm": lambda part: int((part["labels"] != -100).sum()), "small": lambda part: 1.0}
    routes = {"lm": "*", "small": {"head": 0.5}}
    whole = ff.Step(model, language, routes, optimizer=ff.optim.adam(1e-2))
    step = ff.Step(model, language, routes, optimizer=ff.optim.adam(1e-2), microbatches=4, counts=counts, **run)
    wanted, seen = whole.gradients(whole.init(), given), step.gradients(step.init(), given)
    for path, gradient in wanted.items():
        torch.testing.assert_close(seen[path], gradient)
    one, other = whole(whole.init(), given), step(step.init(), given)
    for path, value in one[0].params.items():
        torch.testing.assert_close(other[0].params[path], value)
    torch.testing.assert_close(other[1]["lm"], one[1]["lm"])
    assert ff.verify(step, step.init(), given, steps=2).ok


def test_gradients_and_halves():
    model, given = network().eval(), batch()
    whole = ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1))
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1), microbatches=4)
    state = step.init()
    for path, gradient in whole.gradients(state, given).items():
        torch.testing.assert_close(step.gradients(state, given)[path], gradient)
    rows, wanted = step.per_loss_gradients(state, given), whole.per_loss_gradients(state, given)
    assert rows.keys() == wanted.keys()
    for name, row in wanted.items():
        for path, gradient in row.items():
            torch.testing.assert_close(rows[name][path], gradient)
    half = step.compute(state, given, per_loss=True)
    torch.testing.assert_close(half.per_loss["adv"]["adv.bias"], wanted["adv"]["adv.bias"])
    after, _ = step.apply_gradients(state, step.compute(state, given))
    assert int(after.step) == 1


def test_one_gradient_for_two_parameters_is_not_added_to_twice():
    """Autograd gives one tensor to both summands."""
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(3))})
    step = ff.Step(
        model, lambda model, x: {"l": ((model["a"] + model["b"]) * x).sum()}, {"l": "*"}, optimizer=ff.optim.sgd(1.0)
    )
    parts = [torch.randn(3) for _ in range(4)]
    state, _ = step(step.init(), ff.Microbatches(parts))
    for path in "ab":
        torch.testing.assert_close(state.params[path], -torch.stack(parts).mean(0))


def test_a_momentum_encoder_is_written_in_every_part():
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "average": nn.Linear(2, 2)})

    def moving(model, x):
        for average, own in zip(model["average"].parameters(), model["net"].parameters(), strict=True):
            average.data.mul_(0.5).add_(own.data, alpha=0.5)
        return {"l": (model["net"](x) - model["average"](x)).square().mean()}

    start = copy.deepcopy(model)
    step = ff.Step(model, moving, {"l": "net"}, optimizer=ff.optim.sgd(0.1))
    state, _ = step(step.init(), ff.Microbatches([torch.ones(1, 2)] * 3))
    wanted = start["average"].weight
    for _ in range(3):
        wanted = 0.5 * wanted + 0.5 * start["net"].weight
    torch.testing.assert_close(state.params["average.weight"], wanted.detach())


@pytest.mark.parametrize("scale", [None, ff.LossScale(2.0**6)], ids=["plain", "scaled"])
def test_with_a_loss_scale(scale):
    model, given = network().eval(), batch()
    one = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adam(1e-2))
    other = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adam(1e-2), microbatches=3, loss_scale=scale)
    first, second = one(one.init(), given)[0], other(other.init(), given)[0]
    for path, value in first.params.items():
        torch.testing.assert_close(second.params[path], value)


def test_memory_is_that_of_one_part_and_one_gradient_more():
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())))
    fit = {"fit": "*"}
    x = torch.randn(4096, 64)

    def reconstruction(model, x):
        return {"fit": (model(x) - x).square().mean()}

    def peak(number):
        step = ff.Step(model, reconstruction, fit, optimizer=ff.optim.sgd(0.1), microbatches=number)
        state, given = step.init(), x if number else x[:512]
        state, _ = step(state, given)
        return peak_bytes(lambda: step(state, given))

    gradient = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = 512 * 64 * x.element_size()
    assert peak(8) <= peak(None) + gradient + rows // 8
    assert peak(8) < peak(1) / 4


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=pytest.mark.slow if "compile" in run else ()) for run in RUNS.values()], ids=RUNS
)
def test_verify(run):
    step = ff.Step(
        network(),
        losses,
        ROUTES,
        optimizer=ff.optim.adam(1e-2),
        microbatches=2,
        counts={"cls": lambda part: len(part["y"])},
        **run,
    )
    report = ff.verify(step, step.init(), batch(), steps=2)
    assert report.ok, report
    report = ff.verify(step, step.init(), ff.Microbatches([batch(4), batch(3, adversary=False)]), steps=2)
    assert report.ok, report


@dataclass
class Pair:
    left: torch.Tensor
    right: list


def test_batches_of_every_kind_are_split():
    first, second = split(
        (Pair(torch.arange(4), ["a"]), {"x": torch.arange(8).view(4, 2), "scale": torch.tensor(2.0)}), 2
    )
    assert first[0].left.tolist() == [0, 1]
    assert second[0].left.tolist() == [2, 3]
    assert second[0].right == ["a"]
    assert second[1]["x"].tolist() == [[4, 5], [6, 7]]
    assert second[1]["scale"] == 2.0


def test_what_does_not_split_is_told():
    def step(**options):
        return ff.Step(network(), losses, ROUTES, optimizer=ff.optim.sgd(0.1), **options)

    three = step(microbatches=3)
    state = three.init()
    with pytest.raises(ValueError, match=r"microbatches=3: the batch has 10 rows, which is no multiple: a mean over"):
        three(state, batch(10))
    with pytest.raises(ValueError, match=r"the batch has 2 rows; give the parts yourself, as funcfreeze.Microbatches"):
        three(state, batch(2))
    with pytest.raises(ValueError, match=r"there are tensors with 6, 9 rows; give the parts yourself"):
        three(state, {**batch(9), "d": torch.zeros(6)})
    with pytest.raises(ValueError, match="there are none with rows; give"):
        three(state, {"x": 1})
    for wrong in (0, True, 2.0, "2"):
        with pytest.raises(ValueError, match="microbatches is the number of parts that a batch is split into"):
            step(microbatches=wrong)
    with pytest.raises(ValueError, match=r"(?s)counts:.*no loss is called 'clss'; did you mean 'cls'.*'adv': a func"):
        step(counts={"clss": len, "adv": 3})
    with pytest.raises(TypeError, match="counts is a mapping such as"):
        step(counts=len)
    with pytest.raises(ValueError, match=r"counts\['cls'\] gave -1; it gives a number of at least 0"):
        step(microbatches=3, counts={"cls": lambda part: -1})(state, batch(12))
    with pytest.raises(TypeError, match="Microbatches takes a list of batches, got Tensor"):
        ff.Microbatches(torch.ones(3))
    with pytest.raises(ValueError, match="at least one batch, got none"):
        ff.Microbatches([])
    three(state, batch(12))  # nothing of it spent the state
