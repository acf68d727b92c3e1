"""Stochastic gradient descent, with torch.optim.SGD's options and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import SGD

from funcfreeze.optim.algorithm import Algorithm
from funcfreeze.optim.decay import decayed
from funcfreeze.optim.hyperparameters import Rate, check_number, check_state_dtype
from funcfreeze.optim.kernels import sgd_
from funcfreeze.optim.leafwise import Entry, Rule, leafwise
from funcfreeze.optim.opaque import opaque, readable
from funcfreeze.optim.paces import Pace, Paces, apart
from funcfreeze.optim.rates import Rates
from funcfreeze.optim.transform import Transform
from funcfreeze.tracing import is_traced


def sgd(
    lr: Rates = 1e-3,
    *,
    momentum: float = 0,
    dampening: float = 0,
    weight_decay: Rates = 0,
    nesterov: bool = False,
    maximize: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    """Stochastic gradient descent; the same numbers as torch.optim.SGD.

    With momentum, the state of a parameter is its `momentum_buffer`. torch makes the buffer at the first gradient, as
    a copy of it that is not dampened; here the buffer is there from the start, as zeros, which gives the same numbers.
    With dampening a count, `step`, is kept too, to tell that first gradient from the later ones.

    `lr` and `weight_decay` may be given by selector (see `adamw`).

    `state_dtype` is the precision in which the buffer is kept and all is computed (see `adam`).

    Sparse gradients are taken where torch.optim.SGD takes them: where there is no weight decay.

    >>> tx = sgd(0.5, momentum=0.9)
    >>> params = {"w": torch.ones(2)}
    >>> updates, state = tx.update({"w": torch.ones(2)}, tx.init(params), params)
    >>> updates, state
    ({'w': tensor([-0.5000, -0.5000])}, {'w': {'momentum_buffer': tensor([1., 1.])}})
    >>> sgd(0.1, nesterov=True)
    Traceback (most recent call last):
        ...
    ValueError: sgd: nesterov=True needs momentum > 0 and dampening == 0, got momentum=0, dampening=0
    """
    paces = Paces.of("sgd", lr, weight_decay)
    check_number("sgd", "momentum", momentum)
    check_number("sgd", "dampening", dampening, low=-math.inf)
    check_state_dtype("sgd", state_dtype)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(
            "sgd: nesterov=True needs momentum > 0 and dampening == 0, "
            f"got momentum={momentum!r}, dampening={dampening!r}"
        )

    def pure(param: Tensor, grad: Tensor, entry: Entry, pace: Pace) -> tuple[Tensor, Entry]:
        descent = decayed(param, grad, pace.weight_decay, maximize)
        if momentum == 0:
            return _scaled(descent, pace.lr), {}
        arriving = _dampened(descent, entry, dampening)
        # The dense operand comes first throughout: torch adds sparse to dense, not dense to sparse.
        buffer = momentum * entry["momentum_buffer"] + arriving
        moved = _scaled(momentum * buffer + descent if nesterov else buffer, pace.lr)
        counted = {"step": entry["step"] + 1} if "step" in entry else {}
        return moved, {**counted, "momentum_buffer": buffer}

    def fused(
        params: list[Tensor], grads: list[Tensor], entries: list[Entry], pace: Pace, found_inf: Tensor | None
    ) -> Callable[[], None]:
        steps = [entry["step"] for entry in entries if "step" in entry]
        if steps:
            # torch's kernel knows one first step for all parameters; here each has its own, so the dampening is done
            # before, and with it what comes before the dampening.
            grads = [
                _dampened(decayed(param, grad, pace.weight_decay, maximize), entry, dampening)
                for param, grad, entry in zip(params, grads, entries, strict=True)
            ]

        kernel = _operator if is_traced(params[0]) else _kernel

        def run() -> None:
            kernel(
                params,
                [entry["momentum_buffer"] for entry in entries if "momentum_buffer" in entry],
                steps,
                grads,
                *apart(pace.lr),
                *apart(0.0 if steps else pace.weight_decay),
                found_inf,
                momentum,
                nesterov,
                maximize and not steps,
            )

        return run

    slots = ("step",) * (momentum != 0 and dampening != 0) + ("momentum_buffer",) * (momentum != 0)
    options = {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    algorithm = Algorithm((SGD,), options, slots, is_counted="step" in slots)
    return leafwise(Rule("sgd", algorithm, slots, pure, fused, takes_sparse=True, state_dtype=state_dtype), paces)


def _kernel(
    params: list[Tensor],
    buffers: list[Tensor],
    steps: list[Tensor],
    grads: list[Tensor],
    rate: Tensor | None,
    lr: float,
    decay: Tensor | None,
    weight_decay: float,
    found_inf: Tensor | None,
    momentum: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """torch's fused kernel, with every argument as an operator's schema can have it."""
    sgd_(
        params,
        readable(grads, params),
        buffers,
        lr=lr if rate is None else rate,
        momentum=momentum,
        weight_decay=weight_decay if decay is None else decay,
        nesterov=nesterov,
        maximize=maximize,
        found_inf=found_inf,
    )
    for step in steps:
        step.add_(1 if found_inf is None else 1 - found_inf)


_operator = opaque(
    "sgd_",
    ("params", "buffers", "steps"),
    "Tensor[] grads, Tensor? rate, float lr, Tensor? decay, float weight_decay, Tensor? found_inf, "
    "float momentum, bool nesterov, bool maximize",
    _kernel,
)


def _dampened(descent: Tensor, entry: Entry, dampening: float) -> Tensor:
    """What goes into the momentum buffer: all of the first gradient, 1 - dampening of the others."""
    if dampening == 0:
        return descent
    share = 1 - dampening * (entry["step"] > 0).to(torch.float64)
    return (descent * share).to(descent.dtype)


def _scaled(descent: Tensor, rate: Rate) -> Tensor:
    # Back to the parameter's dtype: a float64 0-d rate would promote a 0-d parameter.
    return (descent * -rate).to(descent.dtype)
