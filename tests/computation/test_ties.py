"""Tied parameters and buffers answer to every name that the plan shows, and are there once."""

from __future__ import annotations

import copy
import io
import pickle

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff
from funcfreeze.model.ties import Tied, by_first_names, tied

ENGINES = ["routed", "toggle", "reference"]


class ActorCritic(nn.Module):
    """A body under two names, and a buffer under three."""

    def __init__(self):
        super().__init__()
        self.actor, self.head = nn.Linear(3, 3), nn.Linear(3, 1)
        self.critic = nn.Linear(3, 3)
        self.critic.weight = self.actor.weight
        self.whole = self.actor
        self.norm = nn.BatchNorm1d(3)
        self.again = self.norm
        self.head.register_buffer("mean", self.norm.running_mean)


FIRST = {
    "critic.weight": "actor.weight",
    "whole.weight": "actor.weight",
    "whole.bias": "actor.bias",
    "again.weight": "norm.weight",
    "again.bias": "norm.bias",
}
BUFFERS = {
    "norm.running_mean": "head.mean",
    "again.running_mean": "head.mean",
    "again.running_var": "norm.running_var",
    "again.num_batches_tracked": "norm.num_batches_tracked",
}


def losses(m, x):
    h = torch.tanh(m.norm(m.actor(x)))
    return {"pi": m.head(h).square().mean(), "v": m.critic(h).square().mean()}


def make(m=None, **options):
    routes = {"pi": ["whole", "norm", "head"], "v": {"critic": 0.5}}
    options = {"optimizer": ff.optim.adam(0.05), **options}
    return ff.Step(m or ActorCritic(), losses, routes, **options)


def plain(m=None, **options):
    model = m or nn.ModuleDict({"actor": nn.Linear(3, 3), "critic": nn.Linear(3, 3)})
    f = lambda m, x: {"pi": m["actor"](x).sum(), "v": m["critic"](x).sum()}  # noqa: E731
    return ff.Step(model, f, {"pi": "*", "v": "critic"}, optimizer=ff.optim.adam(0.05), **options)


def everywhere(step, state):
    """That state, and all that is made of it by other means than a step."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return {
        "itself": state,
        "replaced": state.replace(step=state.step + 1),
        "copied": copy.copy(state),
        "deep copied": copy.deepcopy(state),
        "pickled": pickle.loads(pickle.dumps(state)),
        "saved": torch.load(file, weights_only=False),
        "mapped": optree.tree_map(torch.clone, state),
        "rebuilt": ff.State(state.params, state.buffers, state.optimizer, state.step),
    }


@pytest.mark.parametrize(
    "options", [*[{"engine": engine} for engine in ENGINES], {"compile": {"backend": "aot_eager"}}]
)
@pytest.mark.parametrize("donate", [True, False])
def test_every_name_is_a_key_in_every_state(options, donate):
    step = make(**options, donate=donate)
    state = step.init()
    for _ in range(3):
        for how, other in everywhere(step, state).items():
            for tensors, names in ((other.params, FIRST), (other.buffers, BUFFERS)):
                for name, first in names.items():
                    assert tensors[name] is tensors[first] is tensors.get(name), how
                    assert name in tensors
                    assert name not in list(tensors)
                assert "unknown" not in tensors
                assert tensors.get("unknown") is None
                assert tensors.get("unknown", 3) == 3
                with pytest.raises(KeyError, match="unknown"):
                    tensors["unknown"]
        state, _ = step(state, torch.randn(5, 3))


def test_every_name_the_plan_shows_is_a_key():
    step = make()
    shown = str(step.plan)
    for row in step.plan.rows:
        for name in row.names:
            assert name in shown
            assert step.init().params[name].shape == row.shape


@pytest.mark.parametrize("donate", [True, False])
def test_each_is_there_once_by_its_first_name(donate):
    m = ActorCritic()
    step = make(m, donate=donate)
    state, _ = step(step.init(), torch.randn(5, 3))
    for tensors, wanted in ((state.params, m.named_parameters()), (state.buffers, m.named_buffers())):
        first = [name for name, _ in wanted]
        assert list(tensors) == [*tensors.keys()] == first
        assert len(tensors) == len([*tensors.values()]) == len(first)
        assert [name for name, _ in tensors.items()] == first
        assert dict(tensors) == {name: tensors[name] for name in first}
        assert tensors == dict(tensors)
        assert tensors.keys() == set(first)


def test_a_run_does_not_change_by_it():
    m, batches = ActorCritic(), [torch.randn(5, 3) for _ in range(4)]
    theirs = copy.deepcopy(m)
    optimizer = torch.optim.Adam(theirs.parameters(), 0.05)
    step = make(m)
    state = step.init()
    for x in batches:
        state, _ = step(state, x)
        found = losses(theirs, x)
        optimizer.zero_grad()
        inputs = [theirs.actor.weight, theirs.actor.bias, *theirs.norm.parameters(), *theirs.head.parameters()]
        found["pi"].backward(inputs=inputs, retain_graph=True)
        (0.5 * found["v"]).backward(inputs=[theirs.critic.weight, theirs.critic.bias])
        optimizer.step()
    for name, p in theirs.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(state.params[name], p.detach())
    for name, buffer in theirs.named_buffers(remove_duplicate=False):
        torch.testing.assert_close(state.buffers[name], buffer)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_too(engine):
    step = make(engine=engine)
    state, x = step.init(), torch.randn(5, 3)
    merged, apart = step.gradients(state, x), step.per_loss_gradients(state, x)
    assert merged["critic.weight"] is merged["actor.weight"]
    assert "whole.bias" in merged
    assert "whole.bias" not in apart["v"]
    assert "whole.weight" in apart["v"]
    assert list(apart["v"]) == ["actor.weight", "critic.bias"]


@pytest.mark.parametrize("name", ["critic.weight", "whole.weight", "actor.weight"])
@pytest.mark.parametrize("how", ["|", "**", "only"])
def test_replacing_by_any_name(name, how):
    step = make()
    state, _ = step(step.init(), torch.randn(5, 3))
    new = torch.randn(3, 3)
    if how == "|":
        given = state.params | {name: new}
    elif how == "**":
        given = {**state.params, name: new}
    else:
        given = {name if path == "actor.weight" else path: tensor for path, tensor in state.params.items()}
        given[name] = new
    replaced = state.replace(params=given)
    assert sorted(replaced.params) == sorted(state.params)
    assert all(replaced.params[alias] is new for alias in ("critic.weight", "whole.weight", "actor.weight"))
    after, _ = step(replaced, torch.randn(5, 3))
    assert not torch.equal(after.params[name], new), "the new one was taken, copied and updated"
    mean = torch.randn(3)
    assert after.replace(buffers={**after.buffers, "norm.running_mean": mean}).buffers["head.mean"] is mean


def test_replacing_by_two_names_at_once():
    state = make().init()
    new, other = torch.randn(3, 3), torch.randn(3, 3)
    same = state.replace(params={**state.params, "critic.weight": new, "whole.weight": new})
    assert same.params["actor.weight"] is new
    changed = {**state.params, "critic.weight": new, "whole.weight": other, "whole.bias": new, "actor.bias": other}
    with pytest.raises(ValueError, match="are names of one tensor, and two different ones were given") as caught:
        state.replace(params=changed)
    assert "actor.weight and critic.weight and whole.weight are names" in str(caught.value)
    assert "actor.bias and whole.bias are names" in str(caught.value)


def test_a_state_that_cannot_know_of_ties_is_told_the_name():
    step = make()
    state = step.init()
    given = dict(state.params)
    given["critic.weight"] = given.pop("actor.weight")
    with pytest.raises(
        ValueError, match="parameter critic.weight: the State has it, .* tied, and known as actor.weight"
    ):
        step(ff.State(given, state.buffers, state.optimizer, state.step), torch.randn(5, 3))
    bare = ff.State(dict(state.params), dict(state.buffers), state.optimizer, state.step)
    after, _ = step(bare, torch.randn(5, 3))
    assert "critic.weight" in after.params


def test_without_ties_there_are_plain_dicts():
    step = plain()
    state, _ = step(step.init(), torch.randn(5, 3))
    found = [state.params, state.buffers, step.gradients(state, torch.randn(5, 3))]
    assert {type(tensors) for tensors in found} == {dict}
    assert type(pickle.loads(pickle.dumps(state)).params) is dict


def test_in_pytrees_of_optree_and_of_torch():
    step = make()
    params = step.init().params
    for tree_map in (optree.tree_map, torch.utils._pytree.tree_map):
        doubled = tree_map(lambda tensor: tensor * 2, params)
        assert torch.equal(doubled["whole.weight"], params["actor.weight"] * 2)
        assert list(doubled) == list(params)
    backwards = tied(dict(reversed(params.items())), params.aliases)
    total = optree.tree_map(torch.add, params, backwards)
    assert torch.equal(total["critic.weight"], params["actor.weight"] * 2)
    assert list(total) == list(params)
    assert optree.tree_structure(params) == optree.tree_structure(backwards)
    assert optree.tree_paths(params) == [(path,) for path in sorted(params)]
    assert optree.tree_accessors(make().init())[0].codify("state") == "state.params['actor.bias']"


def test_in_transforms_of_torch_func():
    x, m = torch.randn(4, 3), ActorCritic()
    step = make(m)
    state = step.init()

    def loss(params, row):
        return torch.func.functional_call(
            m.actor, {"weight": params["critic.weight"], "bias": params["whole.bias"]}, row
        ).sum()

    every = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state.params, x)
    assert isinstance(every, Tied)
    torch.testing.assert_close(every["whole.weight"][:, 0], x)


def test_in_functional_loops():
    step = make()
    state, x = step.init(), torch.randn(5, 3)
    tx = ff.optim.adam(0.05)
    updates, kept = tx.update(step.gradients(state, x), tx.init(state.params), state.params)
    moved = ff.apply_updates(state.params, updates)
    after, _ = step(state.replace(), x)
    for path, p in after.params.items():
        torch.testing.assert_close(moved[path], p)
    assert set(kept) == set(moved) == set(after.params)


def test_files_hold_them_without_code_of_this_library():
    params = make().init().params
    file = io.BytesIO()
    torch.save({"params": params}, file)
    file.seek(0)
    loaded = torch.load(file)["params"]
    assert list(loaded) == list(params)
    assert all(torch.equal(loaded[path], tensor) for path, tensor in params.items())


def test_export_call_and_verify():
    step = make()
    state, _ = step(step.init(), torch.randn(5, 3))
    assert ff.verify(step, state, torch.randn(5, 3), steps=2).ok
    out = step.call(state, lambda m, x: m.critic(x), torch.ones(1, 3))
    torch.testing.assert_close(
        out, F.linear(torch.ones(1, 3), state.params["critic.weight"], state.params["critic.bias"])
    )
    m = step.export(state)
    assert torch.equal(m.critic.weight, state.params["critic.weight"])


def test_a_tie_by_hand():
    before = tied({"a": torch.zeros(1), "c": torch.ones(1)}, {"b": "a"})
    assert tied({"a": torch.zeros(1)}, {}) is not before
    assert by_first_names({"b": before["c"]}, before) == {"a": before["c"]}
    assert copy.copy(before)["b"] is before["a"]
    assert before.copy()["b"] is before["a"]
    deep = copy.deepcopy([before, before["a"]])
    assert deep[0]["b"] is deep[1]
    assert deep[1] is not before["a"]
