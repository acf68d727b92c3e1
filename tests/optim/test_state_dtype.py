"""Moments and arithmetic in a precision of their own, against float32 torch.optim on upcast gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from trajectories import (
    assert_close,
    gradients,
    in_place_displacements,
    pure_displacements,
    start,
    torch_displacements,
)

from funcfreeze.optim import (
    adam,
    adamw,
    apply_updates,
    chain,
    clip_by_global_norm,
    linear_schedule,
    partition,
    rmsprop,
    sgd,
)

HALVES = [torch.bfloat16, torch.float16]
FORMS = [pure_displacements, in_place_displacements]
FAMILIES = [
    (sgd, torch.optim.SGD, {}),
    (sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (sgd, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    (adam, torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    (adamw, torch.optim.AdamW, {"weight_decay": 0.1}),
    (rmsprop, torch.optim.RMSprop, {"weight_decay": 0.1, "momentum": 0.9, "centered": True}),
    (rmsprop, torch.optim.RMSprop, {"maximize": True}),
]


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("family", "oracle", "options"), FAMILIES)
def test_the_state_is_that_of_a_float32_optimizer_on_upcast_gradients(family, oracle, options, dtype):
    """Parameters are set back after each step, so that only what the optimizer keeps and computes is compared."""
    params = start(dtype)
    grads = gradients(dtype)
    tx = family(0.05, state_dtype=torch.float32, **options)
    state, placed = tx.init(params), tx.init(params)
    moving = {path: torch.nn.Parameter(param.float()) for path, param in params.items()}
    built = oracle(moving.values(), lr=0.05, **options)
    for step, given in enumerate(grads):
        for path, param in moving.items():
            param.grad = given[path].float() if path in given else None
            param.data.copy_(params[path])
        built.step()
        updates, state = tx.update(given, state, params, step=step)
        written = {path: param.clone() for path, param in params.items()}
        placed = tx.in_place(given, placed, written, step=step)()
        moved = apply_updates(params, updates)
        for path in params:
            assert same_bits(moved[path], written[path]), "pure and in place agree to the bit"
            if path in given:
                assert updates[path].dtype == dtype
                wide = moving[path].detach() - params[path].float()
                # float32 loses digits where the update is taken from the parameter that it was added to
                torch.testing.assert_close(updates[path].float(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)
            else:
                assert moved[path] is params[path]
            for slot, kept in state[path].items():
                assert same_bits(kept, placed[path][slot])
                assert kept.dtype == torch.float32
                known = built.state[moving[path]].get(slot)
                if known is not None and path in given:
                    torch.testing.assert_close(kept, known.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "oracle", "options"), FAMILIES)
def test_where_it_is_the_parameters_own_dtype_nothing_changes(form, family, oracle, options):
    expected = torch_displacements(partial(oracle, lr=0.05, **options), start(), gradients())
    assert_close(form(family(0.05, state_dtype=torch.float64, **options), start(), gradients()), expected)


@pytest.mark.parametrize("form", FORMS)
def test_wrapped_scheduled_and_complex(form):
    schedule = linear_schedule(0.05, 0.01, 4)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        params, grads = start(dtype), gradients(dtype)
        wide = form(adam(schedule), start(), [{p: g.double() for p, g in given.items()} for given in grads])
        tx = chain(clip_by_global_norm(1e9), partition({"*": adam(schedule, state_dtype=torch.float64)}))
        assert_close({path: moved.double() for path, moved in form(tx, params, grads).items()}, wide, tolerance)
    params, grads = start(torch.complex64), gradients(torch.complex64)
    tx = adam(0.05, state_dtype=torch.float64)
    assert tx.init(params)["a.weight"]["exp_avg"].dtype == torch.complex128
    assert_close(form(tx, params, grads), form(adam(0.05), params, grads), 1e-4)


def test_gradients_may_come_unscaled_in_float32():
    """A loss scale hands half precision's gradients on in float32; nothing of them is lost."""
    params = {"w": torch.ones(3, dtype=torch.float16)}
    grads = {"w": torch.full((3,), 1e-9, dtype=torch.float32)}
    for tx in (
        adam(2.0**-3, eps=1e-15, state_dtype=torch.float32),
        chain(clip_by_global_norm(1.0), adam(2.0**-3, eps=1e-15, state_dtype=torch.float32)),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert same_bits(updates["w"], torch.full((3,), -(2.0**-3), dtype=torch.float16))
    for narrow in (adam(0.1), sgd(0.1)):
        updates, _ = narrow.update({"w": torch.ones(3, dtype=torch.float32)}, narrow.init(params), params)
        written = {"w": params["w"].clone()}
        narrow.in_place({"w": torch.ones(3, dtype=torch.float32)}, narrow.init(params), written)()
        torch.testing.assert_close(apply_updates(params, updates)["w"], written["w"], rtol=2e-3, atol=0)
    with pytest.raises(
        ValueError, match="w: the gradient has dtype torch.float64, the parameter has dtype torch.float16"
    ):
        sgd().update({"w": torch.ones(3)}, {}, params)


def test_a_state_in_a_wider_precision_is_refused():
    params = {"w": torch.ones(3, dtype=torch.bfloat16)}
    grads = {"w": torch.ones(3, dtype=torch.bfloat16)}
    wide, narrow = adam(state_dtype=torch.float32), adam()
    text = r"w: exp_avg has shape \(3,\) and dtype torch.float32, expected \(3,\) and torch.bfloat16; if digits may be"
    for form in (narrow.update, narrow.in_place):
        with pytest.raises(ValueError, match=text):
            form(grads, wide.init(params), params)


@pytest.mark.parametrize("family", [sgd, adam, adamw, rmsprop])
@pytest.mark.parametrize("given", [torch.int64, torch.complex64, "float32", 32])
def test_bad_dtypes(family, given):
    with pytest.raises(TypeError, match=f"^{family.__name__}: state_dtype must be a floating point dtype such as"):
        family(state_dtype=given)
