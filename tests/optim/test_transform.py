"""What every transform promises: purity, untouched parameters, two-phase in-place updates, errors with paths."""

from __future__ import annotations

from typing import NamedTuple

import optree
import pytest
import torch
from torch import Tensor
from trajectories import assert_close, gradients, pure_displacements, start

from funcfreeze.declare.selectors import path
from funcfreeze.optim import (
    adam,
    adamw,
    apply_updates,
    chain,
    clip_by_global_norm,
    from_torch,
    partition,
    rmsprop,
    sgd,
)

TRANSFORMS = {
    "sgd": sgd(0.1),
    "momentum": sgd(0.1, momentum=0.9, dampening=0.5, weight_decay=0.1, maximize=True),
    "adam": adam(0.1, weight_decay=0.1, amsgrad=True, maximize=True),
    "adamw": adamw(0.1),
    "rmsprop": rmsprop(0.1),
    "centered": rmsprop(0.1, momentum=0.9, centered=True, weight_decay=0.1, maximize=True),
    "from_torch": from_torch(torch.optim.NAdam, lr=0.1, weight_decay=0.1, maximize=True),
    "chain": chain(clip_by_global_norm(0.5), adamw(0.1)),
    "partition": partition({"a": adam(0.1), path("*") - "a": sgd(0.1, momentum=0.9)}),
}
every_transform = pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS.keys())


def snapshot(tree: object) -> list[object]:
    """All leaves of a pytree, tensors as clones."""
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in optree.tree_leaves(tree, none_is_leaf=True)]


def assert_same(tree: object, before: list[object]) -> None:
    for now, then in zip(optree.tree_leaves(tree, none_is_leaf=True), before, strict=True):
        assert torch.equal(now, then) if isinstance(now, Tensor) else now == then


def entries(state: object) -> dict[str, object]:
    """The entries of a state by path, wherever they are."""
    if isinstance(state, tuple):
        return {path: entry for part in state for path, entry in entries(part).items()}
    if state.keys() <= set(start()):
        return dict(state)
    return {path: entry for part in state.values() for path, entry in entries(part).items()}


@every_transform
def test_update_changes_none_of_its_inputs(tx):
    params, state = start(), tx.init(start())
    for given in gradients():
        before = snapshot([params, given, state])
        updates, after = tx.update(given, state, params, step=0)
        assert_same([params, given, state], before)
        moved = apply_updates(params, updates)
        assert_same([params, updates], snapshot([params, updates]))
        params, state = moved, after


@every_transform
def test_one_gradient_object_for_two_parameters(tx):
    params = {"a.bias": torch.ones(3).double(), "never": torch.full((3,), 2.0).double()}
    shared = torch.tensor([1.0, -2.0, 3.0]).double()
    apart = {"a.bias": shared.clone(), "never": shared.clone()}
    expected = pure_displacements(tx, params, [apart, apart])
    assert_close(pure_displacements(tx, params, [{"a.bias": shared, "never": shared}] * 2), expected, 0)
    now = {path: param.clone() for path, param in params.items()}
    state = tx.init(now)
    for _ in range(2):
        state = tx.in_place({"a.bias": shared, "never": shared}, state, now)()
    assert_close({path: now[path] - params[path] for path in now}, expected)
    assert torch.equal(shared, torch.tensor([1.0, -2.0, 3.0]).double())


@every_transform
def test_untouched_parameters_and_their_state_are_the_same_objects(tx):
    params = start()
    _, state = tx.update(gradients()[0], tx.init(params), params)
    given = {"a.weight": gradients()[1]["a.weight"], "never": None}
    updates, after = tx.update(given, state, params)
    moved = apply_updates(params, updates)
    before = snapshot({path: entries(state)[path] for path in params if path != "a.weight"})
    assert [path for path in updates if updates[path] is not None] == ["a.weight"]
    assert all((moved[path] is params[path]) == (path != "a.weight") for path in params)
    assert all((entries(after)[path] is entries(state)[path]) == (path != "a.weight") for path in params)

    committed = tx.in_place(given, state, params)()
    assert_same({path: entries(committed)[path] for path in params if path != "a.weight"}, before)
    assert all(entries(committed)[path] is entries(state)[path] for path in params if path != "a.weight")
    assert_close(
        {p: params[p] for p in params if p != "a.weight"}, {p: start()[p] for p in params if p != "a.weight"}, 0
    )
    assert not torch.equal(params["a.weight"], start()["a.weight"])


@every_transform
def test_phase_one_changes_nothing_and_commit_keeps_the_storage(tx):
    params = start()
    state = tx.in_place(gradients()[0], tx.init(params), params, step=0)()
    before, addresses = (
        snapshot([params, state]),
        [t.data_ptr() for t in (*params.values(), *optree.tree_leaves(state)) if isinstance(t, Tensor)],
    )
    given = gradients()[0]
    commit = tx.in_place(given, state, params, step=1)
    assert_same([params, state, given], [*before, *snapshot(given)])
    after = commit()
    assert_same(given, snapshot(gradients()[0]))
    assert [t.data_ptr() for t in (*params.values(), *optree.tree_leaves(after)) if isinstance(t, Tensor)] == addresses
    assert optree.tree_structure(after) == optree.tree_structure(state)


@every_transform
def test_a_parameter_the_state_does_not_know_starts_fresh(tx):
    """Steps with different routes share one state, as parameters join a torch optimizer late."""
    params = start()
    state = tx.init(params)
    known = optree.tree_map_with_accessor(lambda _, leaf: leaf, state)

    def without(tree):
        if isinstance(tree, tuple):
            return tuple(map(without, tree))
        return {key: without(value) if key not in params else value for key, value in tree.items() if key != "a.bias"}

    given = gradients()[0]
    expected = tx.update(given, known, params)
    updates, after = tx.update(given, without(state), params)
    assert_same(updates, snapshot(expected[0]))
    assert_same(entries(after)["a.bias"], snapshot(entries(expected[1])["a.bias"]))
    joined = tx.in_place(given, without(state), params)()
    assert optree.tree_structure(entries(joined)) == optree.tree_structure(entries(after))


@every_transform
def test_no_gradient_at_all(tx):
    params = start()
    state = tx.init(params)
    updates, after = tx.update({}, state, params)
    assert set(updates.values()) == {None}
    assert all(entries(after)[path] is entries(state)[path] for path in params)
    assert_same(tx.in_place({}, state, params)(), snapshot(state))
    assert tx.init({}) is not None


def test_a_gradient_that_lies_in_a_parameters_memory():
    """An old-style Function may hand out a saved parameter as another's gradient; the kernel writes to it."""
    for tx in (sgd(0.1, momentum=0.9), adam(0.1), rmsprop(0.1, momentum=0.9)):
        params = {"a": torch.ones(3).double(), "b": torch.arange(3.0).double()}
        grads = {"a": params["b"], "b": params["a"]}
        expected = apply_updates(params, tx.update(grads, tx.init(params), params)[0])
        tx.in_place(grads, tx.init(params), params)()
        assert_close(params, expected)


class Pair(NamedTuple):
    left: object
    right: object


@pytest.mark.parametrize(
    "build",
    [
        lambda w, b, s: {"enc": [w, {"bias": b}], "scale": s},
        lambda w, b, s: Pair((w, b), [s]),
        lambda w, b, s: [w, None, (b, s)],
    ],
    ids=["dict", "namedtuple", "with None"],
)
@pytest.mark.parametrize(
    "tx",
    [sgd(0.1, momentum=0.9), adamw(0.1), chain(clip_by_global_norm(1.0), adam(0.1)), from_torch(torch.optim.RMSprop)],
)
def test_nested_pytrees(tx, build):
    leaves = ("a.weight", "a.bias", "scale")
    flat = {path: start()[path] for path in leaves}
    grads = [{path: given.get(path) for path in leaves} for given in gradients()]
    tree, state = build(*flat.values()), tx.init(build(*flat.values()))
    for given in grads:
        updates, state = tx.update(build(*given.values()), state, tree)
        assert optree.tree_structure(updates, none_is_leaf=True) == optree.tree_structure(tree, none_is_leaf=True)
        tree = apply_updates(tree, updates)
    expected = pure_displacements(tx, flat, grads)
    seen = optree.tree_leaves(tree)
    wanted = optree.tree_leaves(build(*(flat[path] + expected[path] for path in leaves)))
    assert_close(dict(enumerate(seen)), dict(enumerate(wanted)))


def test_paths_are_keys_joined_by_dots():
    tensor = torch.ones(1)
    assert list(adam().init({"enc": [tensor, {"w": tensor}], "head": (tensor,)})) == ["enc.0", "enc.1.w", "head.0"]
    assert list(adam().init({"encoder.0.weight": tensor})) == ["encoder.0.weight"]
    assert list(adam().init(tensor)) == [""]
    update, _ = sgd(1.0).update(tensor, sgd().init(tensor), tensor)
    assert torch.equal(apply_updates(tensor, update), torch.zeros(1))


def test_the_pure_form_can_be_differentiated():
    rate = torch.tensor(0.1, requires_grad=True)
    updates, _ = sgd(rate).update([torch.full((2,), 3.0)], {}, [torch.ones(2)])
    assert torch.autograd.grad(updates[0].sum(), rate)[0] == -6


@pytest.mark.parametrize(
    ("params", "grads", "text"),
    [
        (
            {"w": torch.ones(2, 3)},
            {"w": torch.ones(3)},
            "w: the gradient has shape (3,), the parameter has shape (2, 3)",
        ),
        (
            {"w": torch.ones(2)},
            {"w": torch.ones(2).double()},
            "w: the gradient has dtype torch.float64, the parameter has dtype torch.float32",
        ),
        (
            {"encoder.w": torch.ones(2)},
            {"encodr.w": torch.ones(2)},
            "encodr.w: there is no such parameter; did you mean",
        ),
        ([torch.ones(2), torch.ones(2)], [torch.ones(2)], "1: the gradient is missing; where a parameter is untouched"),
        (torch.ones(2), torch.ones(3), "\n  the tensor: the gradient has shape (3,), the parameter has shape (2,)"),
        ([torch.ones(2), None], [None, torch.ones(2)], "1: there is a gradient, but the parameter is None"),
    ],
)
def test_gradients_that_do_not_fit(params, grads, text):
    for tx in (adam(), clip_by_global_norm(1.0), from_torch(torch.optim.SGD), partition({"*": sgd()})):
        with pytest.raises(ValueError, match=r"^the gradients do not fit the parameters:\n") as raised:
            tx.update(grads, tx.init(params), params)
        assert text in str(raised.value)


def test_all_misfits_are_told_at_once():
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"a: the gradient has shape (.|\n)*b: the gradient has shape") as raised:
        adam().in_place({"a": torch.ones(1), "b": torch.ones(3), "c": torch.ones(1)}, {}, params)
    assert "c: there is no such parameter" in str(raised.value)


def test_trees_that_are_not_of_tensors():
    with pytest.raises(TypeError, match=r"enc\.0 is no tensor but int: 3"):
        adam().init({"enc": [3]})
    with pytest.raises(ValueError, match=r"two leaves of one pytree have the path 'a\.b'; rename a key"):
        adam().init({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})


@pytest.mark.parametrize(
    ("tx", "state", "text"),
    [
        (
            adam(),
            (),
            "adam: the state is a dict path -> {step, exp_avg, exp_avg_sq}, got tuple; was it made by another",
        ),
        (
            adam(amsgrad=True),
            adam().init(start()),
            "a.weight: the state has step, exp_avg, exp_avg_sq; adam with these",
        ),
        (
            sgd(),
            sgd(momentum=0.9).init(start()),
            "a.weight: the state has momentum_buffer; sgd with these options keeps",
        ),
        (
            adam(),
            {
                "a.weight": {
                    "step": torch.tensor([1, 2]),
                    "exp_avg": torch.ones(4, 3),
                    "exp_avg_sq": torch.ones(3).double(),
                }
            },
            "step has shape (2,) and dtype torch.int64, expected () and torch.float32",
        ),
        (from_torch(torch.optim.SGD), (), "from_torch(SGD): the state is a dict path -> entry, got tuple"),
        (chain(adam()), {}, "chain: the state is a tuple of 1, one for each transform; got dict"),
        (chain(adam()), (), "chain: the state is a tuple of 1, one for each transform; got a tuple of 0"),
        (partition({"*": adam()}), {"a": {}}, "partition: the state is a dict with keys *; got a"),
    ],
)
def test_states_of_another_transform(tx, state, text):
    for form in (tx.update, tx.in_place):
        params = start()
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            form({"a.weight": params["a.weight"].clone()}, state, params)
        assert text in str(raised.value)
        assert_close(params, start(), 0)


def test_expanded_parameters_cannot_be_overwritten():
    params = {"w": torch.ones(1).expand(3), "v": torch.ones(3)}
    tx = sgd(0.1)
    with pytest.raises(ValueError, match=r"clone them first:\n  w: shape \(3,\), strides \(0,\)"):
        tx.in_place({"w": torch.ones(3), "v": torch.ones(3)}, tx.init(params), params)
    assert torch.equal(params["v"], torch.ones(3))
