"""chain, clip_by_global_norm and partition."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from trajectories import assert_close, gradients, in_place_displacements, pure_displacements, start, torch_displacements

from funcfreeze.declare.selectors import Leaf, RouteError, kind, path, where
from funcfreeze.optim import (
    adam,
    adamw,
    chain,
    clip_by_global_norm,
    clip_by_norm,
    from_torch,
    linear_schedule,
    partition,
    sgd,
)

FORMS = [pure_displacements, in_place_displacements]


def clipped(max_norm: float):
    grads = gradients()
    for given in grads:
        leaves = [nn.Parameter(grad) for grad in given.values()]
        for leaf in leaves:
            leaf.grad = leaf.detach().clone()
        torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        given.update(zip(given, [leaf.grad for leaf in leaves], strict=True))
    return grads


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e3])
def test_chain_of_clip_and_adamw(form, max_norm):
    expected = torch_displacements(torch.optim.AdamW, start(), clipped(max_norm))
    assert_close(form(chain(clip_by_global_norm(max_norm), adamw()), start(), gradients()), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e3])
def test_clip_by_norm_is_torchs_for_each_parameter_alone(form, max_norm):
    grads = gradients()
    for given in grads:
        for name, grad in given.items():
            alone = nn.Parameter(grad)
            alone.grad = grad.clone()
            torch.nn.utils.clip_grad_norm_(alone, max_norm)
            given[name] = alone.grad
    expected = torch_displacements(torch.optim.AdamW, start(), grads)
    assert_close(form(chain(clip_by_norm(max_norm), adamw()), start(), gradients()), expected)


def test_clip_by_norm_of_nothing_of_one_and_of_several_dtypes():
    tx = clip_by_norm(1.0)
    params = {"a": torch.tensor(1.0, dtype=torch.float32), "b": torch.ones(2), "c": torch.ones(1)}
    assert tx.init(params) == ()
    assert tx.update({}, (), params) == ({"a": None, "b": None, "c": None}, ())
    updates, _ = tx.update({"a": torch.tensor(3.0, dtype=torch.float32), "b": torch.tensor([0.3, 0.4])}, (), params)
    assert [None if u is None else u.dtype for u in updates.values()] == [torch.float32, torch.float64, None]
    assert_close(
        {"a": updates["a"].double(), "b": updates["b"]}, {"a": torch.tensor(1.0), "b": torch.tensor([0.3, 0.4])}, 1e-6
    )
    with pytest.raises(ValueError, match="clip_by_norm: max_norm must be at least 0, got -1"):
        clip_by_norm(-1)


def test_clip_keeps_dtype_structure_and_nothing_else():
    tx = clip_by_global_norm(1.0)
    params = {"a": torch.tensor(1.0, dtype=torch.float32), "b": torch.ones(2), "c": torch.ones(1, dtype=torch.float32)}
    assert tx.init(params) == ()
    assert tx.in_place is None
    updates, state = tx.update({"a": torch.tensor(3.0, dtype=torch.float32), "b": torch.full((2,), 4.0)}, (), params)
    assert state == ()
    assert [None if u is None else u.dtype for u in updates.values()] == [torch.float32, torch.float64, None]
    assert tx.update({}, (), params) == ({"a": None, "b": None, "c": None}, ())


def test_clip_counts_sparse_gradients_coalesced():
    values = torch.tensor([[3.0], [4.0], [1.0]])
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1, 2]]), values, (4, 1), check_invariants=True)
    params = {"table": torch.zeros(4, 1), "b": torch.zeros(1)}
    tx = clip_by_global_norm(1.0)
    seen = tx.update({"table": sparse, "b": torch.ones(1)}, (), params)[0]
    dense = tx.update({"table": sparse.to_dense(), "b": torch.ones(1)}, (), params)[0]
    assert_close({"t": seen["table"].to_dense(), "b": seen["b"]}, {"t": dense["table"], "b": dense["b"]}, 1e-6)


LAYOUTS = {
    "coo": lambda dense: dense.to_sparse(),
    "csr": lambda dense: dense.to_sparse_csr(),
    "csc": lambda dense: dense.to_sparse_csc(),
    "bsr": lambda dense: dense.to_sparse_bsr((2, 2)),
    "bsc": lambda dense: dense.to_sparse_bsc((2, 2)),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")  # torch says so once
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clip_takes_every_sparse_layout_beside_dense_gradients(layout, dtype, max_norm):
    dense = {"w": torch.randn(4, 4, dtype=dtype).relu() if not dtype.is_complex else torch.randn(4, 4, dtype=dtype)}
    dense["b"] = torch.randn(3)
    params = {name: torch.zeros_like(grad) for name, grad in dense.items()}
    given = {"w": layout(dense["w"]), "b": dense["b"]}
    before = given["w"].to_dense()
    updates, _ = clip_by_global_norm(max_norm).update(given, (), params)
    assert updates["w"].layout == given["w"].layout
    assert updates["w"].dtype == dtype
    size = sum(float(grad.abs().double().square().sum()) for grad in dense.values()) ** 0.5
    alone, _ = clip_by_norm(max_norm).update(given, (), params)
    assert alone["w"].layout == given["w"].layout
    for name, grad in dense.items():
        wanted = grad * min(1.0, max_norm / (size + 1e-6))
        torch.testing.assert_close(updates[name].to_dense(), wanted, check_dtype=False, rtol=1e-5, atol=1e-6)
        own = grad * min(1.0, max_norm / (float(grad.abs().double().square().sum()) ** 0.5 + 1e-6))
        torch.testing.assert_close(alone[name].to_dense(), own, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert torch.equal(given["w"].to_dense(), before), "what was given is not written to"


@pytest.mark.parametrize("finish", [sgd(1.0), sgd(1.0, momentum=0.9), from_torch(torch.optim.SGD, lr=1.0)])
def test_clipped_sparse_gradients_move_a_parameter_as_dense_ones(finish):
    params = {"table": torch.randn(6, 2), "w": torch.randn(2)}
    rows = torch.tensor([1, 4, 4])
    values = torch.randn(3, 2)
    sparse = torch.sparse_coo_tensor(rows[None], values, (6, 2), check_invariants=True)
    tx = chain(clip_by_global_norm(0.1), finish)
    moved = []
    for grad in (sparse, sparse.to_dense()):
        written = {path: p.clone() for path, p in params.items()}
        tx.in_place({"table": grad, "w": params["w"]}, tx.init(params), written)()
        moved.append(written)
    assert_close(*moved)


def test_chain_passes_updates_on():
    tx = chain(sgd(0.5), sgd(linear_schedule(0.0, 1.0, 2)))
    params = {"w": torch.zeros(1)}
    updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params, step=1)
    assert torch.equal(updates["w"], torch.tensor([0.25]))
    assert state == ({"w": {}}, {"w": {}})
    assert chain(sgd(0.5), clip_by_global_norm(1.0)).in_place is None
    assert chain(sgd(), adam()).bind is None


def test_chain_errors():
    with pytest.raises(ValueError, match="at least one Transform, got none"):
        chain()
    with pytest.raises(TypeError, match=r"takes Transforms, .* got type: <class 'torch.optim.adam.Adam'>"):
        chain(torch.optim.Adam)


PARTS = {"a": adamw(0.01), path("*") - "a": from_torch(torch.optim.RMSprop, lr=0.01)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: chain(tx), lambda tx: partition({"*": tx})])
def test_partition_is_two_optimizers(form, wrap):
    def of(prefix: bool, trees):
        return [{p: t for p, t in tree.items() if p.startswith("a.") == prefix} for tree in trees]

    expected = {
        **torch_displacements(lambda ps: torch.optim.AdamW(ps, lr=0.01), *of(True, [start()]), of(True, gradients())),
        **torch_displacements(
            lambda ps: torch.optim.RMSprop(ps, lr=0.01), *of(False, [start()]), of(False, gradients())
        ),
    }
    assert_close(form(wrap(partition(PARTS)), start(), gradients()), expected)


def test_partition_state_is_by_selector():
    state = partition(PARTS).init(start())
    assert {label: list(part) for label, part in state.items()} == {
        "a": ["a.weight", "a.bias"],
        "(path('*') - path('a'))": ["late", "scale", "never"],
    }


def test_partition_reads_selectors_once():
    calls = []

    def biased(path, tensor):
        calls.append(path)
        return path.endswith("bias")

    tx = partition({where(biased): sgd(0.1), ~where(biased): adam(0.1)})
    params = start()
    state = tx.init(params)
    seen = len(calls)
    assert seen
    for given in gradients():
        state = tx.in_place(given, state, params)()
    assert len(calls) == seen


def test_partition_tells_all_overlaps_and_gaps_at_once():
    params = {name: torch.ones(1) for name in ("enc.w", "enc.b", "head.w", "other")}
    with pytest.raises(RouteError) as raised:
        partition({"enc": sgd(), "*.w": adam(), "enc.w": adam(), "*.b": sgd()}).init(params)
    assert str(raised.value) == (
        "partition: every parameter belongs to exactly one part:\n"
        "  enc.w: claimed by enc and *.w and enc.w\n"
        "  enc.b: claimed by enc and *.b\n"
        "  other: claimed by none of enc, *.w, enc.w, *.b"
    )


def test_partition_selectors_that_match_nothing():
    with pytest.raises(RouteError) as raised:
        partition({"encodr": sgd(), kind(nn.Linear): adam()}).init({"encoder.w": torch.ones(1)})
    assert str(raised.value) == (
        "partition: the selectors do not fit the parameters:\n"
        "  path('encodr') matches no parameter; did you mean 'encoder' or 'encoder.w'?\n"
        "  kind(Linear) matches no parameter; a bare pytree has no modules"
    )


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "a mapping selector -> Transform with at least one entry, got {}"),
        ([sgd()], "a mapping selector -> Transform with at least one entry, got [Transform"),
        ({"a": sgd(), path("a"): adam()}, "a: written twice"),
        ({"a": torch.optim.SGD, "b": 3}, "a: not a Transform but type: <class 'torch.optim.sgd.SGD'>\n  b: not a"),
        ({3: sgd()}, "a selector is a string, or made by path, regex, kind or where; got int: 3"),
    ],
)
def test_partition_declarations(parts, text):
    with pytest.raises(RouteError) as raised:
        partition(parts)
    assert text in str(raised.value)


LEAVES = [
    Leaf(("enc.w", "dec.w"), torch.ones(2, dtype=torch.float64), (nn.Sequential, nn.Linear)),
    Leaf(("enc.b",), torch.ones(2, dtype=torch.float64), (nn.Sequential, nn.Linear)),
    Leaf(("norm.w",), torch.ones(2, dtype=torch.float64), (nn.LayerNorm,)),
    Leaf(("other",), torch.ones(2, dtype=torch.float64)),
]


def params_of(*paths: str):
    return {leaf.path: leaf.tensor.clone() for leaf in LEAVES if leaf.path in paths}


def test_bound_partition_knows_ties_and_modules():
    tx = partition({kind(nn.Linear) - "dec": sgd(0.1), "dec": sgd(0.2), kind(nn.LayerNorm): sgd(0.3)})
    params = params_of("enc.w", "enc.b", "norm.w", "other")
    routed = params_of("enc.w", "enc.b", "norm.w")
    for outer in (tx, chain(tx), partition({path("*") - "other": tx, "other": sgd(0.4)})):
        bound = outer.bind(LEAVES)
        grads = {path: torch.ones(2) for path in routed}
        updates, _ = bound.update(grads, bound.init(routed), params)
        assert [None if u is None else round(-float(u[0]), 6) for u in updates.values()] == [0.2, 0.1, 0.3, None]
        moving = {path: param.clone() for path, param in params.items()}
        bound.in_place(grads, bound.init(routed), moving)()
        assert_close({p: moving[p] - params[p] for p in grads}, {p: updates[p] for p in grads}, 1e-6)
        again = bound.bind(LEAVES)
        assert again.update(grads, again.init(routed), params)[0].keys() == updates.keys()


def test_bound_partition_errors():
    tx = partition({"enc": sgd(0.1), kind(nn.LayerNorm): sgd(0.3)})
    bound = tx.bind(LEAVES)
    params = params_of("enc.w", "enc.b", "norm.w", "other")
    routed = params_of("enc.w", "norm.w")
    state = bound.init(routed)  # `other` is claimed by nobody, which matters only when it shows up
    bound.update({"enc.w": torch.ones(2)}, state, params)
    for raising in (lambda: bound.init(params), lambda: bound.update({"other": torch.ones(2)}, state, params)):
        with pytest.raises(RouteError, match=r"other: claimed by none of enc, kind\(LayerNorm\)"):
            raising()
    with pytest.raises(ValueError, match="bound to other parameters; these are unknown:\n  stranger"):
        bound.init({"stranger": torch.ones(2)})
    with pytest.raises(RouteError, match=r"path\('encoder'\) matches no parameter"):
        partition({"encoder": sgd()}).bind(LEAVES)


def test_partition_in_place_checks_all_parts_before_it_changes_any():
    def bad(step):
        raise RuntimeError("no rate today")

    tx = partition({"a": sgd(0.1), path("*") - "a": adam(bad)})
    params = start()
    with pytest.raises(RuntimeError, match="no rate today"):
        tx.in_place(gradients()[0], tx.init(params), params, step=0)
    assert_close(params, start(), 0)
    assert partition({"*": clip_by_global_norm(1.0)}).in_place is None
