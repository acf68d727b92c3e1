"""Models as people have them: mappings with bare parameters, dictionaries of parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import funcfreeze as ff

GRAPH = {"backend": "aot_eager"}


def agent():
    return {
        "actor": nn.Linear(3, 2),
        "log_alpha": nn.Parameter(torch.zeros(())),
        "q": nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)),
        "scales": nn.ParameterDict({"one": torch.ones(2), "two": torch.ones(1)}),
    }


def losses(model, x):
    assert "log_alpha" in model
    action = model["actor"](x) * model["scales"]["one"]
    value = model["q"](torch.cat([x, action], dim=1)) * model["scales"]["two"]
    alpha = model["log_alpha"].exp()
    entropy = action.square().mean()
    return {
        "critic": (value - 1).square().mean(),
        "actor": (alpha.detach() * entropy - value).mean(),
        "alpha": -model["log_alpha"] * (entropy.detach() - 1.0),
    }


ROUTES = {"critic": ["q", "scales.two"], "actor": ["actor", "scales.one"], "alpha": "log_alpha"}


def recipe(model, x, optimizer):
    optimizer.zero_grad()
    for name, allowed in ROUTES.items():
        for path, parameter in parameters(model).items():
            chosen = [allowed] if isinstance(allowed, str) else allowed
            parameter.requires_grad_(any(path == one or path.startswith(one + ".") for one in chosen))
        loss = losses(model, x)[name]
        loss.backward()
    for parameter in parameters(model).values():
        parameter.requires_grad_(True)
    optimizer.step()


def parameters(model):
    found = {}
    for name, part in model.items():
        if isinstance(part, nn.Parameter):
            found[name] = part
        else:
            found |= {f"{name}.{path}": p for path, p in part.named_parameters()}
    return found


@pytest.mark.parametrize("compiled", [False, GRAPH], ids=["eager", "compiled"])
def test_a_bare_parameter_and_a_dictionary_of_parameters(compiled):
    model = agent()
    plain, start = copy.deepcopy(model), {path: p.detach().clone() for path, p in parameters(model).items()}
    step = ff.Step(model, losses, ROUTES, optimizer=ff.optim.adam(1e-2), compile=compiled)
    assert set(step.plan.paths) == set(start)
    state = step.init()
    optimizer = torch.optim.Adam(parameters(plain).values(), lr=1e-2)
    for _ in range(4):
        x = torch.randn(6, 3)
        state, _ = step(state, x)
        recipe(plain, x, optimizer)
    exported = step.export(state)
    assert exported is model
    assert isinstance(exported["log_alpha"], nn.Parameter)
    for path, p in parameters(plain).items():
        torch.testing.assert_close(parameters(exported)[path] - start[path], p - start[path], rtol=1e-9, atol=1e-12)
    assert ff.verify(step, step.init(), torch.randn(6, 3)).ok
    alpha = step.call(state, lambda model: model["log_alpha"].exp())
    torch.testing.assert_close(alpha, parameters(plain)["log_alpha"].exp().detach())


@pytest.mark.parametrize("door", ["backward", "combine"])
def test_in_a_loop_of_ones_own(door):
    model = agent()
    plain = copy.deepcopy(model)
    x = torch.randn(6, 3)
    if door == "backward":
        ff.backward(losses(model, x), ROUTES, model)
    else:
        ff.combine(losses(model, x), ff.plan(model, ROUTES), model).backward()
    recipe(plain, x, torch.optim.SGD(parameters(plain).values(), lr=0.0))
    for path, p in parameters(model).items():
        torch.testing.assert_close(p.grad, parameters(plain)[path].grad)


def test_a_parameter_that_is_tied_into_a_module():
    net = nn.Linear(3, 3)
    model = {"net": net, "weight": net.weight}
    assert [row.names for row in ff.plan(model, {"l": "*"}).rows] == [("weight", "net.weight"), ("net.bias",)]


def test_a_mapping_like_a_module_dict():
    model = ff.Step(agent(), losses, ROUTES, optimizer=ff.optim.sgd(0.1)).module
    assert list(model) == list(model.keys()) == ["actor", "log_alpha", "q", "scales"]
    assert len(model) == 4
    assert dict(model.items())["log_alpha"] is model["log_alpha"]
    assert model.log_alpha is model["log_alpha"]
    with pytest.raises(KeyError):
        model["critic"]


def test_a_tensor_is_not_a_parameter():
    text = "a mapping of modules holds nn.Modules and nn.Parameters only, got 'log_alpha': Tensor; make a parameter"
    with pytest.raises(TypeError, match=text):
        ff.plan({**agent(), "log_alpha": torch.zeros(())}, ROUTES)
    with pytest.raises(ValueError, match="the module name 'items' is taken"):
        ff.plan({**agent(), "items": nn.Parameter(torch.zeros(()))}, ROUTES)


def test_a_dictionary_of_parameters_as_the_model():
    model = nn.ParameterDict({"scale": torch.ones(2), "shift": torch.zeros(2)})

    def fit(model, x):
        return {"fit": (model["scale"] * x + model["shift"]).square().mean()}

    step = ff.Step(model, fit, {"fit": "scale"}, optimizer=ff.optim.sgd(0.1))
    state, _ = step(step.init(), x := torch.randn(5, 2))
    torch.testing.assert_close(state.params["scale"], 1 - 0.1 * x.square().mean(0) * 1.0)
    assert torch.equal(state.params["shift"], torch.zeros(2))


def test_a_replica_of_data_parallel_is_refused():
    net = nn.Linear(2, 1)
    replica = net._replicate_for_data_parallel()
    replica.weight, replica.bias = net.weight * 1.0, net.bias * 1.0
    loss = replica(torch.randn(3, 2)).mean()
    for door in (ff.backward, ff.combine):
        with pytest.raises(TypeError, match=r"a replica that nn.DataParallel made for one device.*outside of it"):
            door({"l": loss}, {"l": "*"}, replica)


def test_data_parallel_around_the_model_does_not_matter():
    net = nn.Linear(2, 1)
    wrapped = nn.DataParallel(net)
    ff.combine({"l": wrapped(x := torch.randn(3, 2)).mean()}, {"l": "weight"}, wrapped).backward()
    torch.testing.assert_close(net.weight.grad, x.mean(0, keepdim=True))
    assert net.bias.grad is None
