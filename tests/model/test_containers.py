"""Containers opened and put together again: every kind, anything in them, and nothing of the user's written to."""

from __future__ import annotations

import types
from collections import UserDict, defaultdict, deque

import pytest
import torch
from torch import nn

from containers import CONTAINERS, Derived, Items, Own, Plain, held, kinds
from funcfreeze.model.containers import flatten, hidden_tensors

EVERY = pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)


@EVERY
def test_what_is_put_together_again_is_equal_and_new(make):
    one, two = object(), object()
    given = make(one, two)
    leaves, structure = flatten(given)
    assert one in leaves
    assert two in leaves
    again = structure.unflatten(leaves)
    assert kinds(again) == kinds(given)
    assert held(again) == held(given)
    assert again is not given


@EVERY
def test_other_leaves_can_be_put_in_their_places_and_the_given_is_not_written_to(make):
    given = make(1.5, 2.5)
    before = held(given)
    leaves, structure = flatten(given)
    again = structure.unflatten([leaf * 10 if isinstance(leaf, float) else leaf for leaf in leaves])
    assert held(again) == [leaf * 10 if isinstance(leaf, float) else leaf for leaf in before]
    assert held(given) == before


@EVERY
def test_structures_compare_by_what_they_say(make):
    structure = flatten(make(1, 2))[1]
    assert structure == flatten(make("x", "y"))[1]
    assert hash(structure) == hash(flatten(make(3, 4))[1])
    others = [flatten(other(1, 2))[1] for other in CONTAINERS.values() if other is not make]
    assert structure not in others
    assert structure != flatten(make(1, [2, 3]))[1]


@EVERY
def test_names_and_numbers_of_leaves(make):
    leaves, structure = flatten(make(1, 2))
    names = structure.names()
    assert len(names) == len(set(names)) == len(leaves) == structure.num_leaves


def test_names_are_as_python_would_write_them():
    tree = {"a": [Plain(UserDict(x=1), 2)], "b": types.SimpleNamespace(c=(3,)), "d": Items({"k": 4}, 5)}
    assert dict(zip(flatten(tree)[1].names(), flatten(tree)[0], strict=True)) == {
        "['a'][0].note": "kept",
        "['a'][0].one.data['x']": 1,
        "['a'][0].two": 2,
        "['b'].c[0]": 3,
        "['d']['k']": 4,
        "['d'].beside": 5,
    }


def test_the_order_of_keys_and_a_default_stay():
    leaves, structure = flatten(defaultdict(list, {"z": 1, "a": 2}))
    again = structure.unflatten(leaves)
    assert list(again) == ["z", "a"]
    assert again["new"] == []
    assert structure.unflatten([1, 2]) is not again
    leaves, structure = flatten(deque([1], maxlen=3))
    assert structure.unflatten(leaves).maxlen == 3
    moved = CONTAINERS["OrderedDict of one's own"](1, 2)
    leaves, structure = flatten(moved)
    assert list(structure.unflatten(leaves)) == list(moved) == ["a", "b"]


def test_init_does_not_run_again():
    leaves, structure = flatten(Derived(1))
    assert structure.unflatten(leaves).made == 1


def test_what_is_no_container_is_a_leaf():
    module, kind, size = nn.Linear(2, 2), Plain, torch.Size([2, 3])
    for value in (module, kind, size, object(), 3, "text", None, torch.ones(2), len, types, Ellipsis, 1j, b"", {1, 2}):
        leaves, structure = flatten(value)
        assert leaves == [value] or leaves[0] is value
        assert structure.unflatten(leaves) is value


def test_what_holds_itself():
    given = Plain(1, None)
    given.two = UserDict(back=[given])
    with pytest.raises(ValueError, match="a Plain holds itself, so what is in it cannot be listed"):
        flatten(given)
    shared = Plain(1, 2)
    leaves, structure = flatten([shared, shared])
    assert [again.one for again in structure.unflatten(leaves)] == [1, 1]


def test_containers_of_transformers():
    output = pytest.importorskip("transformers.modeling_outputs")
    tokens = pytest.importorskip("transformers").BatchEncoding({"ids": torch.ones(2)})
    given = output.CausalLMOutput(loss=torch.ones(()), logits=torch.ones(2), hidden_states=(torch.zeros(1),))
    for tree in (given, tokens, {"a": [given], "b": tokens}):
        leaves, structure = flatten(tree)
        again = structure.unflatten([leaf + 1 if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
        assert type(again) is type(tree)
        assert [float(leaf.sum()) for leaf in held(tree) if isinstance(leaf, torch.Tensor)] != [
            float(leaf.sum()) for leaf in held(again) if isinstance(leaf, torch.Tensor)
        ]
    leaves, structure = flatten(given)
    again = structure.unflatten(leaves)
    assert again.logits is again["logits"] is again[1] is given.logits
    assert list(again) == ["loss", "logits", "hidden_states"]
    assert again.attentions is None


def test_tensors_in_objects_that_are_no_containers_are_found_a_few_levels_deep():
    class Cache:
        def __init__(self, *layers):
            self.layers = list(layers)

    class Slots:
        __slots__ = ("kept", "unset")

    layer, slots = Own({"keys": torch.ones(1)}), Slots()
    slots.kept = torch.ones(1)
    found = dict(hidden_tensors(Cache(layer, Cache(torch.zeros(1)), slots)))
    assert set(found) == {".layers[0]._data['keys']", ".layers[1].layers[0]", ".layers[2].kept"}
    endless = Cache()
    endless.layers.append(endless)
    assert list(hidden_tensors(endless)) == []
    assert list(hidden_tensors(Cache(nn.Linear(2, 2)))) == []
    deep = Cache(torch.ones(1))
    for _ in range(8):
        deep = Cache(deep)
    assert list(hidden_tensors(deep)) == []
    assert len(list(hidden_tensors(Cache(*[torch.ones(1) for _ in range(5000)])))) == 1000
