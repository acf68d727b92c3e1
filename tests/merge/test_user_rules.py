"""Rules that a user writes, in a Step, in one's own loop and compiled; and what is said to those who get one wrong."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import funcfreeze as ff
from funcfreeze.merge import Rule

GRAPH = {"backend": "aot_eager"}
ROUTES = {"a": ["trunk", "a"], "b": ["trunk", "b"], "c": {"trunk": 0.5, "c": 1.0}}
TRUNK = ("trunk.weight", "trunk.bias")
HUGE = "a loss that is finite, and its gradient is not"


def network():
    return nn.ModuleDict({"trunk": nn.Linear(3, 4), **{name: nn.Linear(4, 1) for name in "abc"}})


def losses(model, batch):
    """A loss is absent where the batch says so; that of the root at zero is 0, and its gradient is infinite."""
    h = model["trunk"](batch["x"]).tanh()
    found = {name: model[name](h).sin().square().mean() * (index + 1) for index, name in enumerate("abc")}
    found["b"] = found["b"] + (batch["root"] * h.square().sum()).sqrt() if "root" in batch else found["b"]
    return {name: None if name in batch.get("absent", ()) else loss for name, loss in found.items()}


def batch(**beside):
    return {"x": torch.randn(6, 3), **beside}


def infinite():
    return batch(root=torch.zeros(()))


def step_with(rule, model=None, *, lr=0.1, **options):
    merge = {"trunk": rule} if isinstance(rule, Rule) else rule
    given = {"optimizer": ff.optim.sgd(lr, momentum=0.9), **options}
    return ff.Step(model or network(), losses, ROUTES, merge=merge, **given)


def rows_by_hand(model, data):
    """The present losses' gradients of the trunk, flat and with the routes' weights, and the losses."""
    found = {name: loss for name, loss in losses(model, data).items() if loss is not None}
    params = [*model["trunk"].parameters()]
    scale = {"a": 1.0, "b": 1.0, "c": 0.5}
    rows = []
    for name, loss in found.items():
        gradients = torch.autograd.grad(loss, params, retain_graph=True)
        rows.append(scale[name] * torch.cat([g.reshape(-1) for g in gradients]))
    return torch.stack(rows), {name: loss.detach() for name, loss in found.items()}


def flat(gradients):
    return torch.cat([gradients[path].reshape(-1) for path in TRUNK])


def close(found, wanted, tolerance=1e-11):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# rules without a state


def inverse_norms(meeting):
    return 1 / meeting.norms


def majority(meeting):
    return meeting.matrix.sign().sum(0).sign() * meeting.norms.min()


def by_value(meeting):
    return meeting.values / meeting.values.sum()


BY_HAND = {
    "weights": (Rule(inverse_norms), lambda rows, values: (rows / rows.norm(dim=1, keepdim=True)).sum(0)),
    "vector": (Rule(vector=majority), lambda rows, values: rows.sign().sum(0).sign() * rows.norm(dim=1).min()),
    "values": (
        Rule(by_value),
        lambda rows, values: torch.stack([*values.values()]) @ rows / sum(values.values()),
    ),
    "float32": (Rule(lambda meeting: inverse_norms(meeting).float()), None),
}
KNOWN = [name for name, (_, wanted) in BY_HAND.items() if wanted is not None]
ABSENT = pytest.mark.parametrize("absent", [(), ("b",)], ids=["all", "without b"])


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
@ABSENT
def test_in_a_step(name, engine, absent):
    rule, wanted = BY_HAND[name]
    model, data = network(), batch(absent=absent)
    step = step_with(rule, copy.deepcopy(model), engine=engine)
    expected = wanted(*rows_by_hand(model, data))
    close(flat(step.gradients(step.init(), data)), expected)
    state, _ = step(step.init(), data)
    moved = torch.cat([(state.params[path] - model.get_parameter(path)).reshape(-1) for path in TRUNK])
    close(moved, -0.1 * expected)


@pytest.mark.parametrize("name", KNOWN)
@ABSENT
def test_in_ones_own_loop(name, absent):
    rule, wanted = BY_HAND[name]
    model, data = network(), batch(absent=absent)
    expected = wanted(*rows_by_hand(model, data))
    for run in (
        lambda: ff.backward(losses(model, data), ROUTES, model, merge={"trunk": rule}),
        lambda: ff.combine(losses(model, data), ROUTES, model, merge={"trunk": rule}).backward(),
    ):
        model.zero_grad(set_to_none=True)
        run()
        close(flat({path: model.get_parameter(path).grad for path in TRUNK}), expected)
        assert (model["b"].weight.grad is None) == bool(absent)

    def functional(params, data):
        return torch.func.functional_call(_Called(model), {f"model.{p}": v for p, v in params.items()}, (data,))

    params = {path: p.detach() for path, p in model.named_parameters()}
    close(flat(ff.grad(functional, ROUTES, merge={"trunk": rule})(params, data)), expected)


class _Called(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, data):
        return losses(self.model, data)


def test_weights_may_be_of_any_floating_dtype():
    model, data = network(), batch()
    wide = step_with(BY_HAND["weights"][0], copy.deepcopy(model))
    narrow = step_with(BY_HAND["float32"][0], model)
    found, wanted = (flat(step.gradients(step.init(), data)) for step in (narrow, wide))
    assert found.dtype == torch.float64
    close(found, wanted, 1e-6)
    assert not torch.equal(found, wanted)


def test_what_it_sees():
    seen = []

    def looking(meeting):
        seen.append(meeting)
        return torch.ones_like(meeting.values)

    model, data = network(), batch(absent=("b",))
    step = step_with(Rule(looking), copy.deepcopy(model))
    state = step.init()
    for _ in range(3):
        state, _ = step(state, data)
    rows, values = rows_by_hand(model, data)
    first = seen[0]
    assert (first.losses, first.places, first.number, first.state) == (("a", "c"), (0, 2), 3, {})
    close(first.matrix, rows)
    close(first.gramian, rows @ rows.T)
    close(first.norms, rows.norm(dim=1))
    close(first.values, torch.stack([*values.values()]))
    assert [int(meeting.step) for meeting in seen] == [0, 1, 2]
    assert all(meeting.step.dtype == torch.int64 for meeting in seen)


def test_where_one_loss_is_left_it_is_not_asked():
    def refusing(meeting):
        raise AssertionError("there is nothing to decide")

    step = step_with(Rule(refusing))
    data = batch(absent=("a", "b"))
    rows, _ = rows_by_hand(step.model, data)
    close(flat(step.gradients(step.init(), data)), rows[0])


# rules with a state


def slow_norms(meeting):
    """Weights by a running mean of the norms; losses that are absent keep theirs, and a count goes on for all."""
    kept = meeting.state
    mean = 0.5 * meeting.taken(kept["mean"]) + 0.5 * meeting.norms
    return 1 / mean, {"mean": meeting.put(kept["mean"], mean), "count": kept["count"] + 1}


def begun(number):
    return {"mean": torch.ones(number), "count": torch.zeros((), dtype=torch.int64)}


SLOW = Rule(slow_norms, init=begun, name="slow_norms")


def kept_by(state):
    """What the rule keeps in a State."""
    return state.optimizer["merge"]["trunk"]["slow_norms: a, b, c"]


def copied(state):
    return {name: kept.clone() for name, kept in kept_by(state).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, kept in found.items():
        assert torch.equal(kept, wanted[name]), name


ABSENCES = [(), ("b",), ("a", "c"), (), ("a",)]


def trained_by_hand(model, data):
    """Momentum steps on the trunk under `slow_norms`, and the means step by step."""
    mean, velocity, means = dict.fromkeys("abc", 1.0), torch.zeros(16), []
    for one in data:
        rows, values = rows_by_hand(model, one)
        merged = rows[0]
        if len(rows) > 1:
            for name, row in zip(values, rows, strict=True):
                mean[name] = 0.5 * mean[name] + 0.5 * row.norm().item()
            merged = sum(row / mean[name] for name, row in zip(values, rows, strict=True))
        params = [*model.named_parameters()]
        found = {name: loss for name, loss in losses(model, one).items() if loss is not None}
        heads = {name: torch.autograd.grad(found[name], [*model[name].parameters()]) for name in found}
        velocity = 0.9 * velocity + merged
        with torch.no_grad():
            start = 0
            for path in TRUNK:
                p = dict(params)[path]
                p -= 0.1 * velocity[start : start + p.numel()].reshape(p.shape)
                start += p.numel()
            for name, gradients in heads.items():
                for p, g in zip(model[name].parameters(), gradients, strict=True):
                    kept = p.__dict__.setdefault("velocity", torch.zeros_like(p))
                    kept.mul_(0.9).add_(g)
                    p -= 0.1 * kept
        means.append([mean[name] for name in "abc"])
    return means


@pytest.mark.parametrize("engine", ["routed", "reference"])
def test_a_state_goes_from_step_to_step(engine):
    model, data = network(), [batch(absent=absent) for absent in ABSENCES]
    step = step_with(SLOW, copy.deepcopy(model), engine=engine)
    means = trained_by_hand(model, data)
    state, met = step.init(), 0
    for one, mean in zip(data, means, strict=True):
        state, _ = step(state, one)
        met += len(one["absent"]) < 2
        close(kept_by(state)["mean"], torch.tensor(mean))
        assert kept_by(state)["count"] == met
    for path in TRUNK:
        close(state.params[path], model.get_parameter(path).detach())


def test_looking_changes_no_state():
    step = step_with(SLOW)
    state, _ = step(step.init(), batch())
    before = copied(state)
    step.gradients(state, batch())
    step.per_loss_gradients(state, batch())
    step.conflicts(state, batch())
    step.compute(state, batch())
    assert_same(kept_by(state), before)


def test_a_rule_may_write_to_what_it_is_shown():
    """It is a copy: what it writes counts only as what it returns."""

    def writing(meeting):
        weights, after = slow_norms(meeting)
        for name, kept in meeting.state.items():
            kept.copy_(after[name])
        return weights, meeting.state

    model, data = network(), [batch() for _ in range(3)]
    steps = [
        step_with(Rule(rule, init=begun, name="slow_norms"), copy.deepcopy(model)) for rule in (slow_norms, writing)
    ]
    states = [step.init() for step in steps]
    for one in data:
        states = [step(state, one)[0] for step, state in zip(steps, states, strict=True)]
        assert_same(*map(kept_by, states))
    before = copied(states[1])
    steps[1].gradients(states[1], batch())
    assert_same(kept_by(states[1]), before)


@pytest.mark.parametrize("kind", ["weights", "vector", "state"])
def test_compiled(kind):
    rule = {"state": SLOW, **{name: made for name, (made, _) in BY_HAND.items()}}[kind]
    model = network()
    eager = step_with(rule, copy.deepcopy(model), compile=False, on_nonfinite="skip")
    compiled = step_with(rule, model, compile=GRAPH, on_nonfinite="skip")
    states = [eager.init(), compiled.init()]
    for root in (torch.ones(()), torch.zeros(()), torch.ones(())):
        one = batch(root=root)
        (states[0], seen), (states[1], told) = (step(s, one) for step, s in zip((eager, compiled), states, strict=True))
        assert bool(seen["ff/skipped"]) == bool(told["ff/skipped"]) == (root == 0)
        for path, p in states[0].params.items():
            close(states[1].params[path], p)
        if kind == "state":
            close(kept_by(states[1])["mean"], kept_by(states[0])["mean"])
            assert torch.equal(kept_by(states[1])["count"], kept_by(states[0])["count"])
    assert compiled.traces == 1


LOOPS = {
    "backward": lambda model, rule: ff.backward(losses(model, batch()), ROUTES, model, merge=rule),
    "combine": lambda model, rule: ff.combine(losses(model, batch()), ROUTES, model, merge=rule),
    "grad": lambda model, rule: ff.grad(
        lambda p: {"a": p["w"].sum(), "b": p["w"].prod()}, dict.fromkeys("ab", "*"), merge=rule
    )({"w": torch.ones(2)}),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("rule", [SLOW, ff.merge.gradnorm(), ff.merge.dwa(5)], ids=str)
def test_a_state_is_for_a_step(loop, rule):
    model = network()
    told = f"merge '*': {rule} keeps a state from step to step, and there is none here; use it in a Step, whose State"
    with pytest.raises(ff.RouteError, match=re.escape(told)):
        LOOPS[loop](model, rule)
    assert all(p.grad is None for p in model.parameters())


# what is not finite


@pytest.mark.parametrize("name", KNOWN)
def test_of_gradients_that_are_not_finite_come_none_that_are(name):
    step = step_with(BY_HAND[name][0])
    data = infinite()
    assert all(loss.isfinite() for loss in losses(step.model, data).values())
    gradients = step.gradients(step.init(), data)
    assert not flat(gradients).isfinite().any()
    assert all(gradients[f"{head}.weight"].isfinite().all() for head in "ac")


def test_a_rule_is_shown_what_is_finite():
    seen = []

    def looking(meeting):
        seen.append([bool(shown.isfinite().all()) for shown in (meeting.gramian, meeting.norms, meeting.matrix)])
        return meeting.matrix.sum(0)

    step = step_with(Rule(vector=looking))
    assert not flat(step.gradients(step.init(), infinite())).isfinite().any()
    assert flat(step.gradients(step.init(), batch())).isfinite().all()
    assert seen == [[True, True, True]] * 2


@pytest.mark.parametrize("optimizer", [ff.optim.sgd(0.1, momentum=0.9), ff.optim.adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("rule", [SLOW, Rule(inverse_norms)], ids=str)
def test_a_step_that_is_skipped_leaves_a_rules_state(rule, optimizer):
    step = step_with(rule, optimizer=optimizer, on_nonfinite="skip")
    state, _ = step(step.init(), batch())
    params = {path: p.clone() for path, p in state.params.items()}
    before = copied(state) if rule is SLOW else None
    state, metrics = step(state, infinite())
    assert metrics["ff/skipped"]
    assert state.step == 2
    assert_same(state.params, params)
    if before is not None:
        assert_same(kept_by(state), before)
        state, metrics = step(state, batch())
        assert not metrics["ff/skipped"]
        assert kept_by(state)["count"] == before["count"] + 1


def test_weights_that_are_not_finite_skip_a_step():
    def dividing(meeting):
        return 1 / (meeting.step - 1).to(torch.float64) * torch.ones_like(meeting.values)

    step = step_with(Rule(dividing), on_nonfinite="skip")
    state = step.init()
    skipped = []
    for _ in range(3):
        state, metrics = step(state, batch())
        skipped.append(bool(metrics["ff/skipped"]))
    assert skipped == [False, True, False]


def test_a_step_that_raises_leaves_the_state_it_was_given():
    step = step_with(SLOW, on_nonfinite="raise")
    state, _ = step(step.init(), batch())
    before, params = copied(state), {path: p.clone() for path, p in state.params.items()}
    with pytest.raises(FloatingPointError, match="losses: all are finite.*\n  gradients: trunk.weight, trunk.bias"):
        step(state, infinite())
    assert_same(kept_by(state), before)
    assert_same(state.params, params)
    state, _ = step(state, batch())
    assert kept_by(state)["count"] == before["count"] + 1


# rules that are wrong


def ones(meeting):
    return torch.ones_like(meeting.values)


def keeping(decide, **kept):
    given = kept or {"k": torch.zeros(3)}
    return Rule(decide, init=lambda number: given, name="keeps")


WRONG = {
    "a list": (
        Rule(lambda meeting: [1.0, 1.0, 1.0], name="mine"),
        TypeError,
        "merge 'trunk': mine() gives weights as a tensor, it gave list",
    ),
    "None": (Rule(lambda meeting: None, name="mine"), TypeError, "mine() gives weights as a tensor, it gave NoneType"),
    "a vector that is none": (
        Rule(vector=lambda meeting: meeting.matrix.numpy().sum(0), name="mine"),
        TypeError,
        "merge 'trunk': mine() gives a merged gradient as a tensor, it gave ndarray",
    ),
    "too many weights": (
        Rule(lambda meeting: torch.ones(4), name="mine"),
        ValueError,
        "merge 'trunk': mine() gives weights of shape (3,) and a floating dtype (the losses here are a, b, c), it gave "
        "shape (4,) and torch.float64",
    ),
    "one number": (
        Rule(lambda meeting: torch.ones(()), name="mine"),
        ValueError,
        "mine() gives weights of shape (3,) and a floating dtype (the losses here are a, b, c), it gave shape ()",
    ),
    "a vector as weights": (
        Rule(lambda meeting: meeting.matrix.sum(0), name="mine"),
        ValueError,
        "(the losses here are a, b, c), it gave shape (16,) and torch.float64",
    ),
    "weights as a vector": (
        Rule(vector=ones, name="mine"),
        ValueError,
        "merge 'trunk': mine() gives a merged gradient of shape (16,) and a floating dtype (meeting.matrix has so many "
        "columns), it gave shape (3,) and torch.float64",
    ),
    "whole numbers": (
        Rule(lambda meeting: torch.ones(3, dtype=torch.int64), name="mine"),
        ValueError,
        "a floating dtype (the losses here are a, b, c), it gave shape (3,) and torch.int64",
    ),
    "complex numbers": (
        Rule(lambda meeting: 1j * meeting.norms, name="mine"),
        ValueError,
        "it gave shape (3,) and torch.complex128",
    ),
    "a pair without a state": (
        Rule(lambda meeting: (ones(meeting), {}), name="mine"),
        TypeError,
        "mine() gives weights as a tensor, it gave tuple; only a rule with `init` returns a pair",
    ),
    "no pair with a state": (
        keeping(ones),
        TypeError,
        "merge 'trunk': keeps() has a state, so it returns a pair: what it decides, and the new state as a mapping; it "
        "returned Tensor",
    ),
    "three with a state": (
        keeping(lambda meeting: (ones(meeting), meeting.state, 1)),
        TypeError,
        "the new state as a mapping; it returned a tuple of 3",
    ),
    "a state that is a tensor": (
        keeping(lambda meeting: (ones(meeting), meeting.state["k"])),
        TypeError,
        "what it decides, and the new state as a mapping; it returned a tuple of 2",
    ),
    "a pair with wrong weights": (
        keeping(lambda meeting: (torch.ones(2), meeting.state)),
        ValueError,
        "keeps() gives weights of shape (3,)",
    ),
    "a state of another form": (
        keeping(
            lambda meeting: (ones(meeting), {"k": torch.zeros(2, dtype=torch.float64), "new": torch.zeros(1), "t": 3}),
            k=torch.zeros(3, dtype=torch.float32),
            old=torch.zeros(1),
            t=torch.zeros((), dtype=torch.int64),
        ),
        ValueError,
        "merge 'trunk': the state of keeps() keeps its form from step to step: old is gone; new is new; k was (3,) "
        "torch.float32 and became (2,) torch.float64; t was () torch.int64 and became a int",
    ),
    "a state of another dtype": (
        keeping(
            lambda meeting: (ones(meeting), {"k": meeting.state["k"].long()}), k=torch.zeros(3, dtype=torch.float32)
        ),
        ValueError,
        "keeps its form from step to step: k was (3,) torch.float32 and became (3,) torch.int64",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told(name):
    rule, error, told = WRONG[name]
    step = step_with(rule)
    state = step.init()
    params = {path: p.clone() for path, p in state.params.items()}
    with pytest.raises(error, match=re.escape(told)):
        step(state, batch())
    assert_same(state.params, params)
    step.gradients(state, batch(absent=("a", "b")))  # it is not spent


def test_what_is_wrong_is_told_in_ones_own_loop():
    model = network()
    for name, (rule, error, told) in WRONG.items():
        if rule.init is None:
            for loop in ("backward", "combine"):
                with pytest.raises(error, match=re.escape(told)):
                    _run(loop, model, {"trunk": rule})
            assert all(p.grad is None for p in model.parameters()), name


def _run(loop, model, rule):
    found = LOOPS[loop](model, rule)
    if isinstance(found, Tensor):
        found.backward()


def test_an_error_of_its_own_says_where():
    def failing(meeting):
        raise KeyError("nothing of that name")

    rules = {ff.path("trunk") - "trunk.bias": Rule(failing), "trunk.bias": ff.merge.mean()}
    step = step_with(rules)
    state = step.init()
    with pytest.raises(KeyError, match="nothing of that name") as caught:
        step(state, batch(absent=("b",)))
    label = str(ff.path("trunk") - "trunk.bias")
    assert caught.value.__notes__ == [f"in the merge rule failing() for {label!r}, where a, c meet"]
    step.gradients(state, batch(absent=("b", "c")))

    model = network()
    for loop in ("backward", "combine"):
        with pytest.raises(KeyError) as caught:
            _run(loop, model, {"trunk": Rule(failing, name="mine")})
        assert "in the merge rule mine() for 'trunk', where a, b, c meet" in caught.value.__notes__


# what is no rule


CALLED = "a rule is made by calling it: funcfreeze.merge"
MADE = (
    "is no rule; make one of a function with funcfreeze.merge.Rule(weights=f) or Rule(vector=f), of TorchJD's with "
    "funcfreeze.merge.from_torchjd(...)"
)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (ff.merge.pcgrad, f"merge['*']: {CALLED}.pcgrad(...)"),
        ({"trunk": ff.merge.cagrad}, f"merge['trunk']: {CALLED}.cagrad(...)"),
        ({ff.path("trunk"): ff.merge.from_torchjd}, f"merge['trunk']: {CALLED}.from_torchjd(...)"),
        (inverse_norms, f"merge['*']: inverse_norms {MADE}"),
        ({"trunk": nn.Identity()}, f"merge['trunk']: Identity {MADE}"),
        ("pcgrad", "merge['*']: a rule such as funcfreeze.merge.pcgrad(), got str: 'pcgrad'"),
        ({"trunk": "pcgrad"}, "merge['trunk']: a rule such as funcfreeze.merge.pcgrad(), got str: 'pcgrad'"),
        ({"trunk": None}, "merge['trunk']: a rule such as funcfreeze.merge.pcgrad(), got NoneType: None"),
        ([ff.merge.mean()], "merge['*']: a rule such as funcfreeze.merge.pcgrad(), got list: [mean()]"),
    ],
    ids=["uncalled", "uncalled by name", "uncalled by path", "function", "module", "name", "names", "None", "list"],
)
def test_what_is_no_rule(given, told):
    with pytest.raises(TypeError, match=re.escape(told)):
        step_with(given)
    model = network()
    for loop in ("backward", "combine"):
        with pytest.raises(TypeError, match=re.escape(told)):
            LOOPS[loop](model, given)


def test_none_is_the_sum():
    model, data = network(), batch()
    rows, _ = rows_by_hand(model, data)
    for given in (None, {}, ff.merge.sum()):
        step = step_with(given, copy.deepcopy(model))
        close(flat(step.gradients(step.init(), data)), rows.sum(0))


def test_a_rule_is_one_function():
    wanted = "a Rule is given a function as `weights`, or one as `vector`, got "
    for make, got in (
        (lambda: Rule(), "neither"),
        (lambda: Rule(ones, ones), f"{ones!r} and {ones!r}"),
        (lambda: Rule(weights="mean"), "'mean'"),
        (lambda: Rule(vector=torch.ones(2)), "tensor([1., 1.])"),
    ):
        with pytest.raises(TypeError, match=re.escape(wanted + got)):
            make()
    with pytest.raises(ValueError, match="a rule's `at` is 'parameters' or 'activations', got 'heads'"):
        Rule(ones, at="heads")
    with pytest.raises(ValueError, match="a rule that keeps a state looks at parameters, not at activations"):
        Rule(slow_norms, init=begun, at="activations")
    with pytest.raises(TypeError, match=r"from a number of losses to a state \(tensors by name\), got {'k': 1}"):
        Rule(slow_norms, init={"k": 1})


ONES = torch.ones(3)


@dataclass
class Preferring:
    """A rule with options, of which some are no plain numbers."""

    preference: object
    default: Tensor = ONES
    power: float = 1.0

    def __call__(self, meeting):
        preferred = torch.as_tensor(self.preference) * self.default
        return meeting.taken(preferred) / meeting.norms**self.power


@pytest.mark.parametrize(
    "preference", [torch.tensor([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])], ids=["torch", "numpy"]
)
def test_a_rule_that_is_a_dataclass(preference):
    model, data = network(), batch(absent=("a",))
    step = step_with(Rule(Preferring(preference)), copy.deepcopy(model))
    rows, _ = rows_by_hand(model, data)
    wanted = torch.tensor([2.0, 3.0]) @ (rows / rows.norm(dim=1, keepdim=True))
    close(flat(step.gradients(step.init(), data)), wanted)
    assert repr(Rule(Preferring(1.0, power=2.0))) == "Preferring(preference=1.0, power=2.0)"
    assert "Preferring(preference=" in str(step.plan)


def test_its_name():
    assert repr(Rule(inverse_norms)) == "inverse_norms()"
    assert repr(Rule(inverse_norms, name="mine", at="activations")) == "mine(at='activations')"
    assert repr(Rule(vector=nn.Identity())) == "Identity()"
    assert repr(ff.merge.cagrad(0.4)) == "cagrad(c=0.4)"
    assert repr(ff.merge.pcgrad(seed=3, order="declared")) == "pcgrad(order='declared', seed=3)"
    assert repr(ff.merge.mgda(at="activations")) == "mgda(at='activations')"
    assert repr(ff.merge.graddrop()) == "graddrop()"


# TorchJD's


@pytest.mark.parametrize("scale", [None, ff.LossScale(8.0)], ids=["skip", "loss scale"])
def test_torchjds_solvers_are_spared_what_is_not_finite(scale):
    """They raise at it, where a step is to be skipped."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    step = step_with(ff.merge.from_torchjd(aggregation.IMTLG()), on_nonfinite="skip", loss_scale=scale)
    state, skipped = step.init(), []
    for one in (batch(), infinite(), batch()):
        state, metrics = step(state, one)
        skipped.append(bool(metrics["ff/skipped"]))
    assert skipped == [False, True, False]


def test_torchjds_aggregators_are_rules():
    aggregation = pytest.importorskip("torchjd.aggregation")
    model, data = network(), batch(absent=("c",))
    rows, _ = rows_by_hand(model, data)
    for aggregator in (aggregation.IMTLG(), aggregation.AlignedMTL(), aggregation.Mean(), aggregation.GradDrop()):
        step = step_with(ff.merge.from_torchjd(aggregator), copy.deepcopy(model))
        torch.manual_seed(0)
        wanted = aggregator(rows)
        torch.manual_seed(0)
        close(flat(step.gradients(step.init(), data)), wanted, 1e-9)


def test_what_is_no_aggregator():
    def told(given):
        return f"from_torchjd takes an aggregator such as torchjd.aggregation.UPGrad(), got {given!r}"

    for given in (nn.Identity, 3, "UPGrad", None):
        with pytest.raises(TypeError, match=re.escape(told(given))):
            ff.merge.from_torchjd(given)
    aggregation = pytest.importorskip("torchjd.aggregation")
    with pytest.raises(TypeError, match=re.escape(told(aggregation.UPGrad))):
        ff.merge.from_torchjd(aggregation.UPGrad)


def test_torchjds_are_eager():
    aggregation = pytest.importorskip("torchjd.aggregation")
    rule = ff.merge.from_torchjd(aggregation.IMTLG())
    told = "merge 'trunk': from_torchjd(aggregator=IMTLG()): this runs eagerly only; use compile=False"
    for compile in (True, GRAPH):
        with pytest.raises(ValueError, match=re.escape(told)):
            step_with(rule, compile=compile)
    with pytest.raises(ValueError, match=re.escape("merge 'trunk': mine(): this runs eagerly only; use compile=False")):
        step_with(Rule(ones, name="mine", compiles=False), compile=True)
    for compile in (None, False):
        step = step_with(rule, compile=compile)
        step(step.init(), batch())
        assert step.traces == 0
    # where no two losses meet it has nothing to do, and is in nobody's way
    step_with({"a": rule}, compile=GRAPH)


def test_an_aggregator_of_ones_own():
    """Any function from the matrix to a vector; what it returns is checked as for every rule."""
    step = step_with(ff.merge.from_torchjd(lambda matrix: matrix.amax(0)))
    data = batch()
    rows, _ = rows_by_hand(step.model, data)
    close(flat(step.gradients(step.init(), data)), rows.amax(0))
    step = step_with(ff.merge.from_torchjd(lambda matrix: matrix))
    with pytest.raises(ValueError, match=re.escape("gives a merged gradient of shape (16,)")):
        step(step.init(), data)


def test_an_init_that_takes_nothing_and_a_weighting_of_torchjds():
    for init in (lambda: None, {"kept": torch.zeros(2)}, 3):
        with pytest.raises(TypeError, match="a Rule's `init` is a function from a number of losses to a state"):
            Rule(inverse_norms, init=init)
    aggregation = pytest.importorskip("torchjd.aggregation")
    with pytest.raises(TypeError, match=r"is a Weighting, which gives weights. Give the aggregator of that name"):
        ff.merge.from_torchjd(aggregation.MeanWeighting())
