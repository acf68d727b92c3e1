"""RMSprop, with torch.optim.RMSprop's options and numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import RMSprop

from funcfreeze.optim.algorithm import Algorithm
from funcfreeze.optim.decay import decayed
from funcfreeze.optim.hyperparameters import check_number, check_state_dtype
from funcfreeze.optim.kernels import rmsprop_
from funcfreeze.optim.leafwise import Entry, Rule, leafwise
from funcfreeze.optim.opaque import opaque, readable
from funcfreeze.optim.paces import Pace, Paces, apart
from funcfreeze.optim.rates import Rates
from funcfreeze.optim.reals import as_real, back_to
from funcfreeze.optim.transform import Transform
from funcfreeze.tracing import is_traced


def rmsprop(
    lr: Rates = 1e-2,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: Rates = 0,
    momentum: float = 0,
    centered: bool = False,
    maximize: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    """RMSprop; the same numbers as torch.optim.RMSprop.

    The gradient is divided by the root of a running mean of its square, with `eps` added to the root; `centered`
    subtracts the square of the running mean first. From Tieleman and Hinton, lecture 6.5, COURSERA, 2012, and Graves,
    "Generating Sequences With Recurrent Neural Networks", 2013 (https://arxiv.org/abs/1308.0850).

    The state of a parameter is `step`, `square_avg`, with momentum `momentum_buffer` and, centered, `grad_avg`.
    Nothing reads `step`; torch keeps it.

    `lr` and `weight_decay` may be given by selector (see `adamw`).

    `state_dtype` is the precision in which they are kept and all is computed (see `adam`).

    >>> tx = rmsprop(0.1, alpha=0.75)
    >>> params = {"w": torch.ones(2)}
    >>> updates, state = tx.update({"w": torch.tensor([3.0, -7.0])}, tx.init(params), params)
    >>> updates, state["w"]["square_avg"]
    ({'w': tensor([-0.2000,  0.2000])}, tensor([ 2.2500, 12.2500]))
    >>> rmsprop(alpha=-1)
    Traceback (most recent call last):
        ...
    ValueError: rmsprop: alpha must be at least 0, got -1
    """
    paces = Paces.of("rmsprop", lr, weight_decay)
    for option, value in (("alpha", alpha), ("eps", eps), ("momentum", momentum)):
        check_number("rmsprop", option, value)
    check_state_dtype("rmsprop", state_dtype)

    def pure(param: Tensor, grad: Tensor, entry: Entry, pace: Pace) -> tuple[Tensor, Entry]:
        direction = as_real(decayed(param, grad, pace.weight_decay, maximize))
        square = torch.addcmul(alpha * as_real(entry["square_avg"]), direction, direction, value=1 - alpha)
        kept = {"square_avg": square}
        variance = square
        if centered:
            kept["grad_avg"] = mean = as_real(entry["grad_avg"]).lerp(direction, 1 - alpha)
            variance = torch.addcmul(square, mean, mean, value=-1)
        moved = direction / (variance.sqrt() + eps)
        if momentum > 0:
            kept["momentum_buffer"] = moved = momentum * as_real(entry["momentum_buffer"]) + moved
        after = {slot: entry["step"] + 1 if slot == "step" else back_to(kept[slot], param) for slot in slots}
        return back_to(-pace.lr * moved, param), after

    def fused(
        params: list[Tensor], grads: list[Tensor], entries: list[Entry], pace: Pace, found_inf: Tensor | None
    ) -> Callable[[], None]:
        kernel = _operator if is_traced(params[0]) else _kernel

        def run() -> None:
            kernel(
                params,
                [entry["square_avg"] for entry in entries],
                [entry["momentum_buffer"] for entry in entries] if momentum > 0 else [],
                [entry["grad_avg"] for entry in entries] if centered else [],
                [entry["step"] for entry in entries],
                grads,
                *apart(pace.lr),
                *apart(pace.weight_decay),
                found_inf,
                alpha,
                eps,
                momentum,
                maximize,
            )

        return run

    slots = ("step", "square_avg", *["momentum_buffer"] * (momentum > 0), *["grad_avg"] * centered)
    options = {
        "alpha": alpha,
        "eps": eps,
        "momentum": momentum,
        "centered": centered,
        "maximize": maximize,
    }
    algorithm = Algorithm((RMSprop,), options, slots)
    return leafwise(Rule("rmsprop", algorithm, slots, pure, fused, takes_sparse=False, state_dtype=state_dtype), paces)


def _kernel(
    params: list[Tensor],
    square_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    grad_avgs: list[Tensor],
    steps: list[Tensor],
    grads: list[Tensor],
    rate: Tensor | None,
    lr: float,
    decay: Tensor | None,
    weight_decay: float,
    found_inf: Tensor | None,
    alpha: float,
    eps: float,
    momentum: float,
    maximize: bool,
) -> None:
    """The kernels, with every argument as an operator's schema can have it."""
    rmsprop_(
        params,
        readable(grads, params),
        square_avgs,
        momentum_buffers,
        grad_avgs,
        steps,
        lr=lr if rate is None else rate,
        alpha=alpha,
        eps=eps,
        weight_decay=weight_decay if decay is None else decay,
        momentum=momentum,
        maximize=maximize,
        found_inf=found_inf,
    )


_operator = opaque(
    "rmsprop_",
    ("params", "square_avgs", "momentum_buffers", "grad_avgs", "steps"),
    "Tensor[] grads, Tensor? rate, float lr, Tensor? decay, float weight_decay, Tensor? found_inf, "
    "float alpha, float eps, float momentum, bool maximize",
    _kernel,
)
