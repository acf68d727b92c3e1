"""Names that torch has changed, of parametrized tensors and compiled modules, by which people still call them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import funcfreeze as ff


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.encoder(x))


def losses(m, x):
    h = m.encoder(x)
    return {"cls": m.head(h).square().mean(), "adv": h.mean()}


def plan(m, routes):
    return ff.Step(m, losses, routes, optimizer=ff.optim.sgd(0.1), compile=False).plan


def parametrized(how):
    m = Network()
    if how == "weight_norm":
        parametrizations.weight_norm(m.head)
    elif how == "spectral_norm":
        parametrizations.spectral_norm(m.head)
    else:
        parametrize.register_parametrization(m.head, "weight", Half())
    return m


@pytest.mark.parametrize(
    ("how", "originals"),
    [("weight_norm", ["original0", "original1"]), ("spectral_norm", ["original"]), ("by hand", ["original"])],
)
@pytest.mark.parametrize("selector", ["head.weight", ff.regex(r"head\.weight"), ff.path("encoder") | "head.weight"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_parametrized_tensor_is_named_by_what_it_is_computed_from(how, originals, selector, compiled):
    m = parametrized(how)
    with pytest.raises(ff.RouteError, match="a parametrization computes it; name what it is computed from") as caught:
        plan(torch.compile(m) if compiled else m, {"cls": selector, "adv": "encoder"})
    names = [f"head.parametrizations.weight.{original}" for original in originals]
    assert str(caught.value).endswith(" and ".join(map(repr, names)))
    assert set(plan(m, {"cls": names, "adv": "encoder"}).routed) >= set(names)
    assert set(plan(m, {"cls": "head.parametrizations.weight", "adv": "encoder"}).routed) >= set(names)


def test_other_names_that_are_not_found_are_pointed_to_as_before():
    with pytest.raises(ff.RouteError, match="path\\('head.wieght'\\) matches no parameter; did you mean 'head.weight'"):
        plan(Network(), {"cls": "head.wieght", "adv": "*"})
    with pytest.raises(ff.RouteError, match="path\\('head.bia'\\) matches no parameter; did you mean 'head.bias'"):
        plan(parametrized("by hand"), {"cls": "head.bia", "adv": "*"})


def wrapped(where):
    m = Network()
    if where == "whole":
        return torch.compile(m, backend="eager")
    if where == "part":
        m.encoder = torch.compile(m.encoder, backend="eager")
    else:
        m.encoder[0] = torch.compile(m.encoder[0], backend="eager")
        return torch.compile(m, backend="eager")
    return m


SELECTORS = [
    "encoder",
    "encoder.0",
    "encoder.0.weight",
    "enc*.weight",
    ff.regex(r"encoder\.0\..*"),
    ff.path("*") - "head",
    ~ff.path("head"),
    ff.kind(nn.Sequential),
]


@pytest.mark.parametrize("where", ["whole", "part", "both"])
@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_compiled_modules_are_found_by_the_names_they_had(where, selector):
    m = wrapped(where)
    plain = [row.path for row in plan(Network(), {"cls": "*", "adv": selector}).rows if "adv" in row.weights]
    found = [row.path for row in plan(m, {"cls": "*", "adv": selector}).rows if "adv" in row.weights]
    assert found == plain
    as_torch_writes = [path for path, _ in m.named_parameters() if path.replace("_orig_mod.", "") in plain]
    assert all("_orig_mod" in path for path in as_torch_writes)
    full = [row.path for row in plan(m, {"cls": "*", "adv": as_torch_writes}).rows if "adv" in row.weights]
    assert full == found


def test_plans_and_states_do_not_tell_a_compiled_module():
    m, plain = wrapped("both"), Network()
    routes = {"cls": "*", "adv": "encoder"}
    assert plan(m, routes) == plan(plain, routes)
    one, other = (ff.Step(net, losses, routes, optimizer=ff.optim.adam(1e-2), compile=False) for net in (m, plain))
    state, _ = other(one.init(), x := torch.randn(4, 3))
    state, _ = one(state, x)
    assert set(state.params) == {path for path, _ in plain.named_parameters()}
    assert all(path in state.params for path, _ in m.named_parameters())  # as torch writes them
    half = one.compute(state, x)
    state, _ = one.apply_gradients(
        state, half.replace(gradients={path: torch.zeros_like(p) for path, p in m.named_parameters()})
    )
    assert ff.verify(one, state, x, steps=2).ok


def test_a_compiled_part_beside_the_module_that_it_was_made_from():
    m = Network()
    m.quick = torch.compile(m.encoder, backend="eager")
    (row,) = [row for row in plan(m, {"cls": "encoder", "adv": "head"}).rows if row.path == "encoder.0.weight"]
    assert row.names == ("encoder.0.weight", "quick.0.weight")


def test_names_that_would_be_ambiguous_stay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self._orig_mod = nn.ParameterDict({"weight": torch.ones(2), "bias": torch.ones(2)})

    found = ff.plan(Odd(), {"l": "*"})
    assert found.paths == ("weight", "bias", "_orig_mod.weight")
    assert ff.plan(Odd(), {"l": "_orig_mod"}).routed == ("bias", "_orig_mod.weight")


def test_tied_buffers_of_a_compiled_module():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.b.running_mean = self.a.running_mean

    def loss(m, x):
        return {"l": m.a(m.b(x)).square().mean()}

    m = Two()
    step = ff.Step(torch.compile(m, backend="eager"), loss, {"l": "*"}, optimizer=ff.optim.sgd(0.1), compile=False)
    state, _ = step(step.init(), torch.randn(4, 3))
    assert state.buffers["b.running_mean"] is state.buffers["a.running_mean"]


@pytest.mark.parametrize("where", ["whole", "part", "both"])
def test_a_step_and_backward_on_compiled_modules(where):
    m = wrapped(where)
    plain = Network()
    plain.load_state_dict({path.replace("_orig_mod.", ""): tensor for path, tensor in m.state_dict().items()})
    routes = {"cls": ["encoder", "head"], "adv": {"encoder.0": -0.5}}
    tx = ff.optim.partition({"encoder": ff.optim.adam(1e-2), "head": ff.optim.sgd(0.1)})
    x = torch.randn(4, 3)
    wanted = ff.Step(plain, losses, routes, optimizer=tx)
    step = ff.Step(m, losses, routes, optimizer=tx, compile=False)
    gradients = wanted.gradients(wanted.init(), x)
    got = step.gradients(step.init(), x)
    assert {path.replace("_orig_mod.", "") for path in got} == set(gradients)
    for path, gradient in got.items():
        torch.testing.assert_close(gradient, gradients[path.replace("_orig_mod.", "")])
    after, _ = step(step.init(), x)
    reached, _ = wanted(wanted.init(), x)
    for path, p in after.params.items():
        torch.testing.assert_close(p, reached.params[path.replace("_orig_mod.", "")])
    ff.backward(losses(m, x), routes, m)
    for path, p in m.named_parameters():
        torch.testing.assert_close(p.grad, gradients[path.replace("_orig_mod.", "")])


@pytest.mark.parametrize("where", ["whole", "part", "both"])
def test_names_that_are_not_found_are_pointed_to_without_it(where):
    with pytest.raises(ff.RouteError, match=r"path\('encodr'\) matches no parameter; did you mean 'encoder'"):
        plan(wrapped(where), {"cls": "*", "adv": "encodr"})
    with pytest.raises(
        ff.RouteError, match=r"path\('decider'\) matches no parameter; (did you mean|there are) .*'encoder'"
    ):
        plan(wrapped(where), {"cls": "*", "adv": "decider"})
