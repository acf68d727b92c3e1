"""What is declared as a target, shown, refused, taken over, evaluated and written back."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import funcfreeze as ff
from teacher import batches, cloned, losses, make, network, same_bits
from twins import GRAPH, averaged, descend, tensors, twin_of

SLOW = pytest.mark.slow
EAGER_AND_SLOWLY_COMPILED = [{}, pytest.param({"compile": GRAPH}, marks=SLOW)]


def lines(step):
    return [line for line in str(step.plan).splitlines() if line.startswith("targets")]


# The declaration


def test_it_is_a_frozen_value():
    average = ff.ema("online", 0.99, every=2)
    assert average == ff.ema("online", 0.99, every=2)
    assert average != ff.ema("online", 0.99)
    assert ff.ema("online", ff.schedules.cosine(0.9, 1, 10)) == ff.ema("online", ff.schedules.cosine(0.9, 1, 10))
    assert pickle.loads(pickle.dumps(average)) == average
    assert "online" in repr(average)
    assert "0.99" in repr(average)
    with pytest.raises(AttributeError):
        average.decay = 0.5


def test_the_plan_shows_it():
    assert lines(make()) == ["targets  teacher of online: ema 0.8, own buffers"]
    step = make(average=ff.ema("online", 0.8, buffers="averaged", mode="eval", every=10, start=5))
    (shown,) = lines(step)
    assert "teacher of online: ema 0.8" in shown
    for part in ("from 5 every 10", "averaged buffers", "eval"):
        assert part in shown
    (shown,) = lines(make(average=ff.ema("online", ff.schedules.cosine(0.996, 1.0, 100))))
    assert "cosine(" in shown
    assert "0.996" in shown
    sgd = ff.optim.sgd(0.1)
    own_names = {"online": ff.ema("online", 0.5), "head": ff.ema("head", 0.5)}
    step = ff.Step(
        network(), lambda m, x: {"fit": m["online"](x).sum()}, {"fit": "*"}, optimizer=sgd, targets=own_names
    )
    assert lines(step) == ["targets  online, head: ema 0.5, own buffers"]
    assert not [line for line in str(ff.plan(network(), {"fit": "*"})).splitlines() if "targets" in line]
    assert type(step.plan).from_dict(step.plan.to_dict()) == step.plan
    assert step.plan != make().plan


def test_what_is_no_ema_is_told():
    for wrong in (-0.1, 1.5, float("nan"), True, "0.9", None):
        text = rf"(?s)ema of 'online'.*decay is .*from 0 to 1.*got.*{re.escape(repr(wrong))}"
        with pytest.raises(ValueError, match=text):
            ff.ema("online", wrong)
    with pytest.raises(ValueError, match=r"a decay that is a tensor is 0-d and floating, got shape \(2,\)"):
        ff.ema("online", torch.ones(2))
    with pytest.raises(ValueError, match=r"0-d and floating, got shape \(\) and torch.int64"):
        ff.ema("online", torch.tensor(1))
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every is an int of at least 1, got"):
            ff.ema("online", 0.9, every=wrong)
    with pytest.raises(ValueError, match="start is an int of at least 0, got -1"):
        ff.ema("online", 0.9, start=-1)
    with pytest.raises(ValueError, match="stop is an int above start, got stop=2 and start=2"):
        ff.ema("online", 0.9, start=2, stop=2)
    with pytest.raises(ValueError, match=r"buffers.*'own'.*'copied'.*'averaged'.*got 'copy'"):
        ff.ema("online", 0.9, buffers="copy")
    with pytest.raises(ValueError, match=r"mode.*'train'.*'eval'.*got 'evaluate'"):
        ff.ema("online", 0.9, mode="evaluate")
    with pytest.raises(TypeError, match=r"(?s)path.*got.*Linear"):
        ff.ema(nn.Linear(2, 2), 0.9)


def test_what_is_no_target_of_the_model_is_told_at_once():
    def step(targets, model=None):
        return ff.Step(model or network(), losses, {"fit": "*"}, optimizer=ff.optim.sgd(0.1), targets=targets)

    with pytest.raises((TypeError, ValueError), match=r"(?s)'onlin'.*did you mean 'online'"):
        step({"teacher": ff.ema("onlin", 0.9)})
    with pytest.raises(
        (TypeError, ValueError), match="online.0.weight is a parameter, and a twin is of a module; give the path of"
    ):
        step({"teacher": ff.ema("online.0.weight", 0.9)})
    with pytest.raises((TypeError, ValueError), match=r"(?s)target 'one'.*'onlin'.*target 'two'.*online.0.weight"):
        step({"one": ff.ema("onlin", 0.9), "two": ff.ema("online.0.weight", 0.9)})
    with pytest.raises(ValueError, match=r"target 'teacher' is what funcfreeze.ema\(.*\) gives, got 'online'"):
        step({"teacher": "online"})
    with pytest.raises(TypeError, match=r"targets is a mapping such as .*, got \[Ema\("):
        step([ff.ema("online", 0.9)])
    with pytest.raises((TypeError, ValueError), match=r"(?s)name.*got 3"):
        step({3: ff.ema("online", 0.9)})
    with pytest.raises(ValueError, match="a target is named by a non-empty string without dots, got 'head.bias'"):
        step({"head.bias": ff.ema("online", 0.9)})
    bare = {"online": nn.Linear(4, 2), "scale": nn.Parameter(torch.ones(()))}
    with pytest.raises((TypeError, ValueError), match=r"(?s)'scale'.*parameter"):
        step({"scale": ff.ema("online", 0.9)}, bare)
    with pytest.raises((TypeError, ValueError), match="scale is a parameter, and a twin is of a module"):
        step({"teacher": ff.ema("scale", 0.9)}, bare)


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_what_a_decay_gives_is_checked_at_its_call(run):
    for gives in (lambda count: count < 3, lambda count: True, lambda count: None, lambda count: torch.ones(2)):
        step = make(average=ff.ema("online", gives), **run)
        state = step.init()
        with pytest.raises((TypeError, ValueError), match=r"(?s)decay.*got"):
            step(state, batches(1)[0])
    for gives in (1.5, -0.5):
        step = make(average=ff.ema("online", lambda count, gives=gives: gives))
        with pytest.raises(ValueError, match=r"(?s)decay.*0.*1.*got"):
            step(step.init(), batches(1)[0])


def test_targets_that_nobody_declares():
    step = ff.Step(network(), losses, {"fit": "*"}, optimizer=ff.optim.sgd(0.1))
    with pytest.raises((TypeError, ValueError), match=r"(?s)losses.*targets.*Step\(.*targets="):
        step(step.init(), batches(1)[0])

    def mistyped(model, x, *, targets):
        return {"fit": targets["techer"](model["online"](x)).sum()}

    step = make(losses=mistyped)
    with pytest.raises(KeyError, match="techer"):
        step(step.init(), batches(1)[0])


# States


def test_a_state_that_does_not_fit_is_told():
    model = network()
    step, lone = (
        make(model),
        ff.Step(
            model, lambda m, x: {"fit": m["online"](x).sum()}, {"fit": "*"}, optimizer=ff.optim.sgd(0.1, momentum=0.9)
        ),
    )
    with pytest.raises(ValueError, match=r"(?s)targets.*teacher.*step\.adopt\(state\)"):
        step(lone.init(), batches(1)[0])
    with pytest.raises(ValueError, match=r"targets\['teacher'\]: the State has it, the Step does not declare it"):
        lone(step.init(), batches(1)[0])
    state = step.init()
    twin = dict(state.targets["teacher"])
    for wrong, text in (
        ({path: t for path, t in twin.items() if path != "0.weight"}, r"(?s)teacher.*0\.weight.*the State does not"),
        ({**twin, "4.bias": torch.ones(7)}, r"(?s)teacher.*4\.bias.*\(5,\).*\(7,\)"),
        ({**twin, "4.bias": torch.ones(5, dtype=torch.float32)}, r"(?s)teacher.*4\.bias.*float64.*float32"),
    ):
        with pytest.raises(ValueError, match=text):
            step(state.replace(targets={"teacher": wrong}), batches(1)[0])
    with pytest.raises(ValueError, match=r"(?s)targets.*student"):
        step(state.replace(targets={"teacher": twin, "student": twin}), batches(1)[0])
    step(state, batches(1)[0])


def test_states_that_were_made_before_it_was_declared_are_adopted():
    """The average starts from the parameters that were trained, not from the module's."""
    model, given = network(), batches(3)
    lone = ff.Step(
        model,
        lambda m, x: {"fit": m["online"](x).square().sum()},
        {"fit": "*"},
        optimizer=ff.optim.sgd(0.1, momentum=0.9),
    )
    state = lone.init()
    for x in given:
        state, _ = lone(state, x)
    trained = {**state.params, **state.buffers}
    taken, adoption = make(model).adopt(state)
    for path, tensor in taken.targets["teacher"].items():
        assert torch.equal(tensor, trained[f"online.{path}"])
        assert tensor.data_ptr() != trained[f"online.{path}"].data_ptr()
    assert any("targets.teacher" in line for line in adoption.afresh)
    assert int(taken.step) == 3
    kept = cloned(dict(taken.targets["teacher"]))
    step = make(model)
    taken, _ = step(taken, given[0])
    assert not torch.equal(kept["0.weight"], taken.targets["teacher"]["0.weight"])
    again, adoption = make(model, average=ff.ema("online", 0.1, every=3)).adopt(taken)
    assert same_bits(cloned(dict(taken.targets["teacher"])), again.targets["teacher"])
    assert any("targets.teacher" in line for line in adoption.kept)
    assert not adoption.afresh
    back, adoption = lone.adopt(again)
    assert any("targets.teacher" in line for line in adoption.left)
    lone(back, given[0])


def test_adoption_with_another_head():
    state = make(network()).init()
    model = network()
    model["online"][4] = nn.Linear(6, 5, bias=False)
    taken, adoption = make(model).adopt(state)
    assert torch.equal(taken.targets["teacher"]["0.weight"], state.targets["teacher"]["0.weight"])
    assert "4.bias" not in taken.targets["teacher"]
    assert any("4.bias" in line and "targets" in line for line in adoption.left)


# Evaluation and export


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_call_and_export(run):
    model, given = network(), batches(4)
    begun = tensors(model)
    step = make(model, **run)
    state = step.init()
    for x in given:
        state, _ = step(state, x)
    plain = copy.deepcopy(model)
    plain.load_state_dict({**state.params, **state.buffers})
    average = copy.deepcopy(plain)
    average["online"].load_state_dict(dict(state.targets["teacher"]))
    x, kept = torch.randn(7, 4), cloned(state)

    def predicted(model, x):
        model.eval()
        return model["head"](model["online"](x))

    with torch.no_grad():
        torch.testing.assert_close(step.call(state, predicted, x), predicted(plain, x))
        torch.testing.assert_close(step.call(state, predicted, x, targets="teacher"), predicted(average, x))
    assert model.training
    assert model["online"].training
    step.call(state, lambda model, x: model["online"](x), x, targets="teacher")  # moves statistics of copies
    for one, other in ((kept.targets["teacher"], state.targets["teacher"]), (kept.params, state.params)):
        assert same_bits(dict(one), dict(other))
    assert same_bits(dict(kept.buffers), dict(state.buffers))
    torch.testing.assert_close(tensors(model), begun, rtol=0, atol=0)
    with pytest.raises((KeyError, ValueError), match=r"(?s)'techer'.*teacher"):
        step.call(state, predicted, x, targets="techer")
    with pytest.raises((KeyError, ValueError), match=r"(?s)'techer'.*teacher"):
        step.export(state, targets="techer")
    torch.testing.assert_close(tensors(model), begun, rtol=0, atol=0)
    assert step.export(state, targets="teacher") is model
    torch.testing.assert_close(tensors(model), tensors(average), rtol=0, atol=0)
    step.export(state)
    torch.testing.assert_close(tensors(model), tensors(plain), rtol=0, atol=0)
    step(state, given[0])
    torch.testing.assert_close(tensors(model), tensors(plain), rtol=0, atol=0)


def test_the_whole_models_average_is_exported_as_a_whole():
    model = network()
    step = make(
        model, average=ff.ema("*", 0.5, buffers="copied"), losses=lambda m, x: {"fit": m["head"](m["online"](x)).sum()}
    )
    state = step.init()
    for x in batches(3):
        state, _ = step(state, x)
    step.export(state, targets="teacher")
    assert same_bits(tensors(model), dict(state.targets["teacher"]))


# Tied and parametrized modules


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.embed(tokens)))


def distilled(model, tokens, *, targets):
    return {
        "fit": (model["net"](tokens) - targets["twin"](tokens)).square().mean() + model["head"](tokens.double()).mean()
    }


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
def test_ties_inside_stay(run):
    model = nn.ModuleDict({"net": Tied(), "head": nn.Linear(3, 1)})

    def looking(model, tokens, *, targets):
        assert targets["twin"].out.weight is targets["twin"].embed.weight
        return distilled(model, tokens, targets=targets)

    step = ff.Step(
        model, looking, {"fit": "*"}, optimizer=ff.optim.sgd(0.5), targets={"twin": ff.ema("net", 0.7)}, **run
    )
    state, plain = step.init(), copy.deepcopy(model)
    given = [torch.randint(6, (5, 3)) for _ in range(4)]
    for tokens in given:
        state, _ = step(state, tokens)
    twin, optimizer = twin_of(plain["net"]), torch.optim.SGD(plain.parameters(), 0.5)
    for tokens in given:
        descend(optimizer, distilled(plain, tokens, targets={"twin": twin})["fit"])
        averaged(twin, plain["net"], 0.7)
    assert [*state.targets["twin"]] == ["embed.weight"]
    torch.testing.assert_close(state.targets["twin"]["embed.weight"], twin.embed.weight.detach())
    torch.testing.assert_close(state.params["net.embed.weight"], plain["net"].embed.weight.detach())
    assert torch.equal(state.targets["twin"]["out.weight"], state.targets["twin"]["embed.weight"])


def test_a_tie_across_its_border_is_cut_and_shown():
    body, head = nn.Linear(4, 4), nn.Linear(4, 4)
    head.weight = body.weight
    nets = {"body": body, "head": head}

    def loss(nets, x, *, targets):
        return {"fit": (nets["head"](nets["body"](x)) - targets["body"](x)).square().mean()}

    step = ff.Step(nets, loss, {"fit": "*"}, optimizer=ff.optim.sgd(0.1), targets={"body": ff.ema("body", 0.5)})
    assert any("head.weight" in line and ("tie" in line or "tied" in line) for line in lines(step))
    state, x = step.init(), torch.randn(6, 4)
    begun = body.weight.detach().clone()
    state, _ = step(state, x)
    torch.testing.assert_close(state.targets["body"]["weight"], 0.5 * begun + 0.5 * state.params["body.weight"])
    step = ff.Step(nets, loss, {"fit": "*"}, optimizer=ff.optim.sgd(0.1), targets={"body": ff.ema("head", 0.5)})
    state, _ = step(step.init(), x)
    assert state.targets["body"].keys() == {"weight", "bias"}
    torch.testing.assert_close(state.targets["body"]["weight"], 0.5 * begun + 0.5 * state.params["body.weight"])


@pytest.mark.parametrize("run", EAGER_AND_SLOWLY_COMPILED, ids=["eager", "compiled"])
@pytest.mark.parametrize("parametrized", [weight_norm, spectral_norm, orthogonal])
def test_parametrizations_average_their_originals(parametrized, run):
    model = nn.ModuleDict({"net": nn.Sequential(parametrized(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2))})

    def loss(model, x, *, targets):
        return {"fit": (model["net"](x) - targets["net"](x) + 1).square().mean()}

    step = ff.Step(model, loss, {"fit": "*"}, optimizer=ff.optim.sgd(0.1), targets={"net": ff.ema("net", 0.7)}, **run)
    plain, given = copy.deepcopy(model), batches(4)
    state = step.init()
    torch.manual_seed(0)
    for x in given:
        state, _ = step(state, x)
    torch.manual_seed(0)
    twin, optimizer = twin_of(plain["net"]), torch.optim.SGD(plain.parameters(), 0.1)
    for x in given:
        descend(optimizer, loss(plain, x, targets={"net": twin})["fit"])
        averaged(twin, plain["net"], 0.7)
    torch.testing.assert_close(dict(state.params), {path: p.detach() for path, p in plain.named_parameters()})
    torch.testing.assert_close(dict(state.targets["net"]), tensors(twin), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex128])
def test_other_dtypes_keep_theirs(dtype):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3).to(dtype))

        def forward(self, x):
            return x @ self.weight

    model = nn.ModuleDict({"net": Product()})

    def loss(model, x, *, targets):
        return {"fit": (model["net"](x) - targets["net"](x) + 1).abs().square().mean()}

    step = ff.Step(model, loss, {"fit": "*"}, optimizer=ff.optim.sgd(0.1), targets={"net": ff.ema("net", 0.75)})
    state = step.init()
    twin = twin_of(model["net"])
    for x in (torch.randn(5, 3).to(dtype) for _ in range(3)):
        state, _ = step(state, x)
        now = Product()
        now.load_state_dict({"weight": state.params["net.weight"]})
        averaged(twin, now, 0.75)
    for path, tensor in state.targets["net"].items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, dict(twin.named_parameters())[path].detach(), rtol=0.02, atol=0.02)


def test_a_frozen_part_of_the_original_stays_as_it_is():
    """Averaging equal numbers should not make others of them."""
    model = network()
    model["online"][0].requires_grad_(False)
    step = make(model, average=ff.ema("online", 0.7))
    state = step.init()
    for x in batches(4):
        state, _ = step(state, x)
    torch.testing.assert_close(state.targets["teacher"]["0.weight"], model["online"][0].weight, rtol=0, atol=1e-15)
    assert not torch.equal(state.targets["teacher"]["4.weight"], model["online"][4].weight)
