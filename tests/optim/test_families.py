"""sgd, adam, adamw and rmsprop against torch.optim: every combination of options, both forms."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from trajectories import (
    assert_close,
    gradients,
    in_place_displacements,
    pure_displacements,
    start,
    torch_displacements,
)

from funcfreeze.optim import adam, adamw, from_torch, linear_schedule, rmsprop, sgd

FORMS = [pure_displacements, in_place_displacements]


def combinations(**choices: tuple[object, ...]) -> list[dict[str, object]]:
    return [dict(zip(choices, picked, strict=True)) for picked in itertools.product(*choices.values())]


SGD = [
    options
    for options in combinations(
        momentum=(0, 0.9), dampening=(0, 0.3), weight_decay=(0, 0.1), nesterov=(False, True), maximize=(False, True)
    )
    if not options["nesterov"] or (options["momentum"] and not options["dampening"])
]
ADAM = combinations(
    betas=((0.9, 0.999), (0.0, 0.5)),
    eps=(1e-8, 1e-3),
    weight_decay=(0, 0.1),
    amsgrad=(False, True),
    maximize=(False, True),
)
RMSPROP = combinations(
    alpha=(0.99, 0.5),
    eps=(1e-8, 1e-3),
    weight_decay=(0, 0.1),
    momentum=(0, 0.9),
    centered=(False, True),
    maximize=(False, True),
)
CASES = [
    *((sgd, torch.optim.SGD, options) for options in SGD),
    *((adam, torch.optim.Adam, options) for options in ADAM),
    *((adamw, torch.optim.AdamW, options) for options in ADAM),
    *((rmsprop, torch.optim.RMSprop, options) for options in RMSPROP),
]
FAMILIES = [
    (sgd, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    (rmsprop, torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (rmsprop, torch.optim.RMSprop, {}),
    *((*pair, {}) for pair in [(sgd, torch.optim.SGD), (adam, torch.optim.Adam), (adamw, torch.optim.AdamW)]),
]


def name(case: object) -> str:
    return case.__name__ if callable(case) else str(case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "oracle", "options"), CASES, ids=name)
def test_displacement_is_that_of_torch(form, family, oracle, options):
    expected = torch_displacements(partial(oracle, lr=0.05, **options), start(), gradients())
    assert_close(form(family(0.05, **options), start(), gradients()), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "oracle", "options"), FAMILIES, ids=name)
def test_rate_may_be_a_tensor_or_a_schedule(form, family, oracle, options):
    expected = torch_displacements(partial(oracle, lr=0.05, **options), start(), gradients())
    assert_close(form(family(torch.tensor(0.05, dtype=torch.float64), **options), start(), gradients()), expected)

    schedule = linear_schedule(0.05, 0.01, 4)
    falling = torch_displacements(
        partial(oracle, lr=0.05, **options), start(), gradients(), rates=[float(schedule(step)) for step in range(5)]
    )
    for rate in (schedule, lambda step: 0.05 - 0.01 * float(step)):
        assert_close(form(family(rate, **options), start(), gradients()), falling)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "oracle", "options"), FAMILIES, ids=name)
def test_complex_parameters(form, family, oracle, options):
    params, grads = start(torch.complex128), gradients(torch.complex128)
    grads = [{path: grad.conj() for path, grad in given.items()} for given in grads]
    given = options | {"weight_decay": 0.1} | ({"amsgrad": True} if family in (adam, adamw) else {})
    expected = torch_displacements(
        partial(oracle, lr=0.05, **given), params, [{p: g.resolve_conj() for p, g in step.items()} for step in grads]
    )
    assert_close(form(family(0.05, **given), params, grads), expected)


@pytest.mark.parametrize(("family", "oracle", "options"), FAMILIES, ids=name)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded gradient"])
def test_any_memory_order_in_place(family, oracle, options, layout):
    """torch's fused CPU kernels give wrong numbers where strides differ; the in-place form may not pass that on."""
    tx = family(0.05, **options)
    wide = torch.randn(6, 8, dtype=torch.float64)
    param = {"transposed": wide.t(), "strided": wide[:, ::2], "expanded gradient": wide}[layout]
    grads = [torch.randn(param.shape, dtype=torch.float64), torch.ones((), dtype=torch.float64).expand(param.shape)]
    expected = torch_displacements(
        partial(oracle, lr=0.05, foreach=False, **options), {"w": param.contiguous()}, [{"w": grad} for grad in grads]
    )
    before = param.clone()
    state = tx.init({"w": param})
    for grad in grads:
        state = tx.in_place({"w": grad}, state, {"w": param})()
    assert_close({"w": param - before}, expected)


def test_state_in_another_memory_order_than_the_parameter():
    """A checkpoint may bring contiguous state for a transposed parameter."""
    param = torch.randn(6, 4, dtype=torch.float64).t()
    grad = torch.randn(4, 6, dtype=torch.float64)
    tx = adam(0.05)
    _, state = tx.update({"w": grad}, tx.init({"w": param}), {"w": param})
    state["w"] = {slot: kept.contiguous() for slot, kept in state["w"].items()}
    expected = tx.update({"w": grad}, state, {"w": param})[0]
    before = param.clone()
    tx.in_place({"w": grad}, state, {"w": param})()
    assert_close({"w": param - before}, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "oracle", "options"), FAMILIES, ids=name)
def test_dtypes_are_kept(form, family, oracle, options, dtype):
    expected = torch_displacements(partial(oracle, lr=0.05, **options), start(dtype), gradients(dtype))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for rate in (0.05, torch.tensor(0.05, dtype=torch.float64), linear_schedule(0.05, 0.05, 1)):
        assert_close(form(family(rate, **options), start(dtype), gradients(dtype)), expected, tolerance)
    state = family(linear_schedule(0.1, 0.0, 9), **options).update(
        gradients(dtype)[0], family(0.1, **options).init(start(dtype)), start(dtype), step=1
    )[1]
    for entry in state.values():
        assert all(kept.dtype == (torch.float32 if slot == "step" else dtype) for slot, kept in entry.items())


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 1)])
@pytest.mark.parametrize(("family", "oracle", "options"), FAMILIES, ids=name)
def test_small_shapes_in_place(family, oracle, options, shape):
    params, grads = {"w": torch.ones(shape)}, {"w": torch.ones(shape)}
    tx = family(0.05, **options)
    expected = torch_displacements(partial(oracle, lr=0.05, **options), params, [grads])
    assert_close(in_place_displacements(tx, params, [grads]), expected, 1e-6)


def embedding_gradient(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 3]]),
        torch.randn(3, 2, dtype=torch.float64, generator=generator),
        (5, 2),
        check_invariants=True,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.3},
    ],
    ids=str,
)
def test_sparse_gradients_of_sgd(form, options):
    params = {"table": torch.ones(5, 2, dtype=torch.float64), "bias": torch.ones(2, dtype=torch.float64)}
    grads = [{"table": embedding_gradient(step), "bias": torch.ones(2, dtype=torch.float64)} for step in range(3)]
    expected = torch_displacements(partial(torch.optim.SGD, lr=0.05, **options), params, grads)
    assert_close(form(sgd(0.05, **options), params, grads), expected)


@pytest.mark.parametrize(
    ("tx", "owner"),
    [(adam(), "adam"), (adamw(), "adamw"), (rmsprop(), "rmsprop"), (sgd(weight_decay=0.1), "sgd")],
    ids=["adam", "adamw", "rmsprop", "sgd"],
)
def test_sparse_gradients_refused_with_paths(tx, owner):
    params = {"in.table": torch.ones(5, 2).double(), "out.table": torch.ones(5, 2).double(), "w": torch.ones(2)}
    grads = {"in.table": embedding_gradient(0), "out.table": embedding_gradient(1), "w": torch.ones(2)}
    for form in (tx.update, tx.in_place):
        with pytest.raises(ValueError, match=f"^{owner} with these options takes no such sparse gradients:") as raised:
            form(grads, tx.init(params), params)
        assert "in.table: layout torch.sparse_coo\n  out.table: layout torch.sparse_coo\n" in str(raised.value)
        assert "from_torch(torch.optim.SparseAdam)" in str(raised.value)
    assert from_torch(torch.optim.SparseAdam).update({"in.table": grads["in.table"]}, {}, params)[0]["w"] is None


@pytest.mark.parametrize(
    ("family", "options", "slots"),
    [
        (sgd, {}, []),
        (sgd, {"dampening": 0.5}, []),
        (sgd, {"momentum": 0.9}, ["momentum_buffer"]),
        (sgd, {"momentum": 0.9, "dampening": 0.5}, ["step", "momentum_buffer"]),
        (adam, {}, ["step", "exp_avg", "exp_avg_sq"]),
        (adamw, {"amsgrad": True}, ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (rmsprop, {}, ["step", "square_avg"]),
        (rmsprop, {"momentum": 0.9}, ["step", "square_avg", "momentum_buffer"]),
        (rmsprop, {"momentum": 0.9, "centered": True}, ["step", "square_avg", "momentum_buffer", "grad_avg"]),
    ],
)
def test_state_has_torchs_names_and_one_structure(family, options, slots):
    tx, params = family(0.1, **options), start()
    state = tx.init(params)
    after = tx.update(gradients()[0], state, params)[1]
    for given in (state, after):
        assert list(given) == list(params)
        assert all(list(entry) == slots for entry in given.values())
        for path, entry in given.items():
            for slot, kept in entry.items():
                expected = ((), torch.float32) if slot == "step" else (params[path].shape, torch.float64)
                assert (kept.shape, kept.dtype) == expected


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: sgd(-0.1), ValueError, "sgd: lr must be at least 0, got -0.1"),
        (lambda: adam(float("nan")), ValueError, "adam: lr must be at least 0, got nan"),
        (lambda: sgd(torch.tensor(-1.0)), ValueError, r"sgd: lr must be at least 0, got tensor\(-1.\)"),
        (lambda: sgd(torch.ones(1)), ValueError, r"sgd: a tensor lr must be 0-d, got shape \(1,\)"),
        (lambda: sgd("fast"), TypeError, "sgd: lr must be a number, got str: 'fast'"),
        (lambda: sgd(momentum=-1), ValueError, "sgd: momentum must be at least 0, got -1"),
        (lambda: sgd(dampening=float("nan")), ValueError, "sgd: dampening must be finite, got nan"),
        (lambda: sgd(weight_decay=-1), ValueError, "sgd: weight_decay must be at least 0, got -1"),
        (
            lambda: sgd(momentum=0.9, dampening=0.1, nesterov=True),
            ValueError,
            "sgd: nesterov=True needs momentum > 0 and dampening == 0, got momentum=0.9, dampening=0.1",
        ),
        (lambda: adam(betas=(1.0, 0.9)), ValueError, r"adam: betas\[0\] must be at least 0 and less than 1, got 1.0"),
        (
            lambda: adamw(betas=(0.9, -0.1)),
            ValueError,
            r"adamw: betas\[1\] must be at least 0 and less than 1, got -0.1",
        ),
        (lambda: adam(betas=0.9), ValueError, "adam: betas must be two numbers, got 0.9"),
        (lambda: adam(eps=-1), ValueError, "adam: eps must be at least 0, got -1"),
        (lambda: adamw(weight_decay=-1), ValueError, "adamw: weight_decay must be at least 0, got -1"),
        (lambda: rmsprop(-0.1), ValueError, "rmsprop: lr must be at least 0, got -0.1"),
        (lambda: rmsprop(alpha=-0.1), ValueError, "rmsprop: alpha must be at least 0, got -0.1"),
        (lambda: rmsprop(eps=float("nan")), ValueError, "rmsprop: eps must be at least 0, got nan"),
        (lambda: rmsprop(weight_decay="0.1"), TypeError, "rmsprop: weight_decay must be a number, got str: '0.1'"),
        (lambda: rmsprop(momentum=-1), ValueError, "rmsprop: momentum must be at least 0, got -1"),
        (lambda: adamw(weight_decay=torch.ones(2)), ValueError, "adamw: a tensor weight_decay must be 0-d, got shape"),
    ],
)
def test_hyperparameters_are_checked_at_construction(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("lr", "step", "error", "text"),
    [
        (linear_schedule(1, 0, 5), None, TypeError, "adam: lr is a schedule and must be told the step"),
        (lambda step: torch.ones(2), 0, ValueError, r"schedule must give a number or a 0-d tensor, got shape \(2,\)"),
        (lambda step: "fast", 0, TypeError, "schedule must give a number or a 0-d tensor, got str: 'fast'"),
    ],
)
def test_schedules_are_checked_before_anything_changes(lr, step, error, text):
    tx, params = adam(lr), start()
    for form in (tx.update, tx.in_place):
        with pytest.raises(error, match=text):
            form(gradients()[0], tx.init(params), params, step=step)
    assert_close(params, start(), 0)


def test_a_scheduler_of_torchs_is_no_rate():
    running = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for given in (torch.optim.lr_scheduler.StepLR, torch.optim.lr_scheduler.StepLR(running, 5)):
        with pytest.raises(TypeError, match=r"make a schedule of its class: funcfreeze.schedules.from_torch\(StepLR"):
            adamw(given)
