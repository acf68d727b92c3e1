"""States that torch.optim or an old file kept in another form: cast where they mean the same, refused where not."""

from __future__ import annotations

import copy

import numpy as np
import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff

FAMILIES = {
    "adam": (ff.optim.adam, torch.optim.Adam, {"weight_decay": 0.1}),
    "adam, amsgrad": (ff.optim.adam, torch.optim.Adam, {"amsgrad": True}),
    "adamw": (ff.optim.adamw, torch.optim.AdamW, {}),
    "rmsprop": (ff.optim.rmsprop, torch.optim.RMSprop, {"weight_decay": 0.1}),
    "rmsprop, centered": (ff.optim.rmsprop, torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "sgd, momentum": (ff.optim.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd": (ff.optim.sgd, torch.optim.SGD, {}),
}
EVERY = pytest.mark.parametrize(("ours", "theirs", "options"), FAMILIES.values(), ids=FAMILIES)
COUNTS = {
    "as torch keeps it": lambda step: step,
    "float64": lambda step: step.double(),
    "float32": lambda step: step.float(),
    "bfloat16": lambda step: step.bfloat16(),
    "int64": lambda step: step.long(),
    "int32, one element": lambda step: step.int().reshape(1),
    "int": int,
    "float": float,
    "numpy": lambda step: np.float64(step),
    "numpy int": lambda step: np.int32(step),
    "requires grad": lambda step: step.double().requires_grad_(),
    "parameter": lambda step: nn.Parameter(step.double()),
}
EVERY_COUNT = pytest.mark.parametrize("form", COUNTS.values(), ids=COUNTS)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def losses(m, x):
    h = m[0](x)
    return {"a": m[2](m[1](h)).square().mean(), "b": h.mean()}


ROUTES = {"a": "*", "b": "0"}


def train(m, optimizer, batches):
    """The recipe, in which both losses may update all that they reach."""
    for x in batches:
        optimizer.zero_grad()
        sum(losses(m, x).values()).backward()
        optimizer.step()


def kept_by(optimizer, m):
    """Copies: torch goes on to write to its own."""
    return {path: copy.deepcopy(dict(optimizer.state[p])) for path, p in m.named_parameters()}


def with_counts(state, form):
    return {
        path: {slot: form(kept) if slot == "step" else kept for slot, kept in entry.items()}
        for path, entry in state.items()
    }


def moved_over(step, m, optimizer):
    """A state of the step's in the middle of torch's run."""
    params = {path: p.detach().clone() for path, p in m.named_parameters()}
    return step.init().replace(params=params, optimizer=optimizer)


@EVERY
@pytest.mark.parametrize("donate", [True, False])
@EVERY_COUNT
def test_a_run_goes_on_as_torchs(ours, theirs, options, donate, form):
    m = network()
    optimizer = theirs(m.parameters(), 0.05, **options)
    train(m, optimizer, [torch.randn(5, 3) for _ in range(3)])
    step = ff.Step(m, losses, ROUTES, optimizer=ours(0.05, **options), donate=donate)
    given = with_counts(kept_by(optimizer, m), form)
    before = copy.deepcopy(given)
    state = moved_over(step, m, given)
    after = [torch.randn(5, 3) for _ in range(3)]
    for x in after:
        state, _ = step(state, x)
    train(m, optimizer, after)
    for path, p in m.named_parameters():
        torch.testing.assert_close(state.params[path], p.detach(), rtol=1e-9, atol=1e-12)
        for slot, kept in kept_by(optimizer, m)[path].items():
            torch.testing.assert_close(state.optimizer[path][slot], kept, rtol=1e-9, atol=1e-12, check_dtype=False)
    assert_same_objects(given, before)


def assert_same_objects(given, before):
    """What the user has was not written to."""
    for one, other in zip(optree.tree_leaves(given), optree.tree_leaves(before), strict=True):
        assert type(one) is type(other)
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("form", [COUNTS["as torch keeps it"], int, COUNTS["int32, one element"]])
def test_a_compiled_step_goes_on_too_and_is_compiled_once(form):
    m = network()
    optimizer = torch.optim.Adam(m.parameters(), 0.05)
    train(m, optimizer, [torch.randn(5, 3) for _ in range(3)])
    step = ff.Step(m, losses, ROUTES, optimizer=ff.optim.adam(0.05), compile={"backend": "aot_eager"})
    state, _ = step(step.init(), torch.randn(5, 3))
    state = moved_over(step, m, with_counts(kept_by(optimizer, m), form))
    after = [torch.randn(5, 3) for _ in range(3)]
    for x in after:
        state, _ = step(state, x)
    train(m, optimizer, after)
    for path, p in m.named_parameters():
        torch.testing.assert_close(state.params[path], p.detach(), rtol=1e-9, atol=1e-12)
    assert step.traces == 1


@EVERY
@EVERY_COUNT
def test_in_a_functional_loop(ours, theirs, options, form):
    m = network()
    optimizer = theirs(m.parameters(), 0.05, **options)
    train(m, optimizer, [torch.randn(5, 3) for _ in range(2)])
    tx, state = ours(0.05, **options), with_counts(kept_by(optimizer, m), form)
    x = torch.randn(5, 3)
    params = {path: p.detach().clone() for path, p in m.named_parameters()}
    written = {path: p.clone() for path, p in params.items()}
    train(m, optimizer, [x])
    grads = {path: p.grad for path, p in m.named_parameters()}
    updates, after = tx.update(grads, state, params)
    moved = ff.apply_updates(params, updates)
    placed = tx.in_place(grads, state, written)()
    for path, p in m.named_parameters():
        torch.testing.assert_close(moved[path], p.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(written[path], p.detach(), rtol=1e-9, atol=1e-12)
    for tree in (after, placed):
        for entry in tree.values():
            assert all(
                kept.dtype == torch.float32 and kept.shape == () for slot, kept in entry.items() if slot == "step"
            )


@pytest.mark.parametrize("wrap", ["chain", "partition", "loss scale", "nested"])
def test_wherever_the_entries_are(wrap):
    m = network()
    optimizer = torch.optim.Adam(m.parameters(), 0.05)
    train(m, optimizer, [torch.randn(5, 3) for _ in range(2)])
    kept = with_counts(kept_by(optimizer, m), int)
    adam, clip, scale = ff.optim.adam(0.05), ff.optim.clip_by_global_norm(1e9), None
    parts = {part: {path: entry for path, entry in kept.items() if path.startswith(part)} for part in "02"}
    if wrap == "chain":
        tx, state = ff.optim.chain(clip, adam), ((), kept)
    elif wrap == "partition":
        tx, state = ff.optim.partition({"0": adam, "2": ff.optim.adam(0.05)}), parts
    elif wrap == "nested":
        tx, state = (
            ff.optim.chain(clip, ff.optim.partition({"0": ff.optim.chain(adam), "2": adam})),
            ((), {**parts, "0": (parts["0"],)}),
        )
    else:
        tx, scale = adam, ff.LossScale()
        state = {"loss_scale": {"scale": 1024.0, "growth_tracker": 3}, "optimizer": kept}
    step = ff.Step(m, losses, ROUTES, optimizer=tx, loss_scale=scale)
    state = moved_over(step, m, state)
    gradients = step.gradients(state, torch.ones(5, 3))
    after, _ = step(state, torch.ones(5, 3))
    train(m, optimizer, [torch.ones(5, 3)])
    for path, p in m.named_parameters():
        torch.testing.assert_close(gradients[path], p.grad)
        torch.testing.assert_close(after.params[path], p.detach(), rtol=1e-6, atol=1e-6)
    if scale:
        assert after.optimizer["loss_scale"]["growth_tracker"].dtype == torch.int32
        assert int(after.optimizer["loss_scale"]["growth_tracker"]) == 4
        assert float(after.optimizer["loss_scale"]["scale"]) == 1024.0


def test_verify_goes_on_from_torchs_state():
    m = network()
    optimizer = torch.optim.AdamW(m.parameters(), 0.01)
    train(m, optimizer, [torch.randn(5, 3) for _ in range(2)])
    step = ff.Step(m, losses, ROUTES, optimizer=ff.optim.adamw(0.01))
    for form in COUNTS.values():
        state = moved_over(step, m, with_counts(kept_by(optimizer, m), form))
        report = ff.verify(step, state, torch.randn(5, 3), steps=2)
        assert report.ok, report


def test_a_state_and_what_is_cast_of_it_are_spent_together():
    m = network()
    optimizer = torch.optim.Adam(m.parameters(), 0.05)
    train(m, optimizer, [torch.randn(5, 3)])
    step = ff.Step(m, losses, ROUTES, optimizer=ff.optim.adam(0.05))
    state = moved_over(step, m, kept_by(optimizer, m))
    step(state, torch.randn(5, 3))
    assert repr(state) == "State(spent)"


def test_a_momentum_that_has_not_begun():
    """torch's SGD says None, or nothing, until the first gradient."""
    params, grad = {"w": torch.randn(3)}, torch.randn(3)
    tx = ff.optim.sgd(0.1, momentum=0.9)
    wanted = tx.update({"w": grad}, tx.init(params), params)
    for state in ({"w": {"momentum_buffer": None}}, {}):
        updates, after = tx.update({"w": grad}, state, params)
        assert torch.equal(updates["w"], wanted[0]["w"])
        assert torch.equal(after["w"]["momentum_buffer"], grad)
    m = nn.Linear(2, 1)
    step = ff.Step(m, lambda m, x: {"a": m(x).sum()}, {"a": "*"}, optimizer=tx)
    none = {path: {"momentum_buffer": None} for path in ("weight", "bias")}
    after, _ = step(step.init().replace(optimizer=none), torch.ones(1, 2))
    assert torch.equal(after.optimizer["weight"]["momentum_buffer"], torch.ones(1, 2))


@pytest.mark.parametrize(("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_moments_in_a_narrower_precision_lose_nothing(narrow, wide):
    params = {"w": torch.randn(3, dtype=narrow)}
    grads = {"w": torch.randn(3, dtype=narrow)}
    before = ff.optim.adam(0.1)
    _, state = before.update(grads, before.init(params), params)
    tx = ff.optim.adam(0.1, state_dtype=wide)
    same = {"w": {slot: kept if slot == "step" else kept.to(wide) for slot, kept in state["w"].items()}}
    for form in (lambda s: tx.update(grads, s, params)[0]["w"], lambda s: placed(tx, grads, copy.deepcopy(s), params)):
        assert torch.equal(form(state), form(same))


def placed(tx, grads, state, params):
    written = {path: p.clone() for path, p in params.items()}
    tx.in_place(grads, state, written)()
    return written["w"]


ENTRY = {"step": torch.tensor(2.0, dtype=torch.float32), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
ANOTHER = "was it made by another transform? Steps that share a State need optimizers of one structure"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"step": True}, "w: step is bool: True, expected a tensor of shape () and dtype torch.float32"),
        ({"step": "3"}, "w: step is str: '3', expected a tensor of shape () and dtype torch.float32"),
        ({"step": None}, "w: step is NoneType: None, expected a tensor"),
        ({"step": torch.tensor(True)}, "w: step has shape () and dtype torch.bool, expected () and torch.float32"),
        (
            {"step": torch.tensor(1j, dtype=torch.complex128)},
            "w: step has shape () and dtype torch.complex128, expected () and torch.float32",
        ),
        (
            {"step": torch.ones(2, dtype=torch.float64)},
            "w: step has shape (2,) and dtype torch.float64, expected () and torch.float32",
        ),
        ({"exp_avg": None}, "w: exp_avg is NoneType: None, expected a tensor of shape (3,) and dtype torch.float64"),
        ({"exp_avg": 3.0}, "w: exp_avg is float: 3.0, expected a tensor of shape (3,)"),
        (
            {"exp_avg": torch.ones(1, dtype=torch.float64)},
            "w: exp_avg has shape (1,) and dtype torch.float64, expected (3,) and torch.float64",
        ),
        ({"exp_avg": torch.ones(3, 1, dtype=torch.float64)}, "w: exp_avg has shape (3, 1) and dtype torch.float64"),
        ({"exp_avg": torch.ones(3).long()}, "w: exp_avg has shape (3,) and dtype torch.int64"),
        (
            {"exp_avg_sq": torch.ones(3).to(torch.complex128)},
            "torch.complex128, expected (3,) and torch.float64; if digits",
        ),
        (
            {"more": torch.ones(3)},
            "w: the state has step, exp_avg, exp_avg_sq, more; adam with these options keeps step",
        ),
    ],
)
def test_real_differences_are_errors_and_change_nothing(change, text):
    params, grads = {"w": torch.ones(3)}, {"w": torch.ones(3)}
    state = {"w": {**ENTRY, **change}}
    for form in (ff.optim.adam().update, ff.optim.adam().in_place):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            form(grads, state, params)
        assert text in str(caught.value)
        assert ANOTHER in str(caught.value)
    assert torch.equal(params["w"], torch.ones(3))
    m = nn.ParameterDict({"w": nn.Parameter(torch.ones(3))})
    step = ff.Step(m, lambda m, _: {"a": m["w"].sum()}, {"a": "*"}, optimizer=ff.optim.adam())
    given = step.init().replace(optimizer=state)
    with pytest.raises(ValueError):  # noqa: PT011
        step(given, None)
    assert torch.equal(given.params["w"], torch.ones(3))
    assert given.optimizer["w"] == state["w"]


def test_all_differences_at_once():
    params = {"v": torch.ones(3), "w": torch.ones(3)}
    state = {"v": {**ENTRY, "step": "3"}, "w": {**ENTRY, "exp_avg": None, "exp_avg_sq": torch.ones(1)}}
    with pytest.raises(ValueError, match=r"(?s)v: step is str.*w: exp_avg is NoneType.*w: exp_avg_sq has shape \(1,\)"):
        ff.optim.adam().update(params, state, params)
