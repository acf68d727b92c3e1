"""Adam and AdamW, with torch.optim's options and numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

from funcfreeze.optim.algorithm import Algorithm
from funcfreeze.optim.decay import decayed
from funcfreeze.optim.hyperparameters import check_number, check_state_dtype
from funcfreeze.optim.kernels import adam_
from funcfreeze.optim.leafwise import Entry, Rule, leafwise
from funcfreeze.optim.opaque import opaque, readable
from funcfreeze.optim.paces import Pace, Paces, apart
from funcfreeze.optim.rates import Rates
from funcfreeze.optim.reals import as_real, back_to
from funcfreeze.optim.transform import Transform
from funcfreeze.tracing import is_traced


def adam(
    lr: Rates = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Rates = 0,
    amsgrad: bool = False,
    maximize: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    """Adam; the same numbers as torch.optim.Adam, with the weight decay added to the gradient.

    The state of a parameter is `step`, `exp_avg`, `exp_avg_sq` and, with `amsgrad`, `max_exp_avg_sq`. The bias
    correction reads the parameter's own `step`, which counts the steps at which it was touched.

    `lr` and `weight_decay` are numbers, 0-d tensors or schedules, or mappings from selectors to these, where
    torch.optim has parameter groups: see `adamw`.

    With `state_dtype=torch.float32` parameters in half precision have their state in float32, and all is computed in
    it; only the update that comes out is rounded to the parameter's own dtype, in which it is added.

    >>> tx = adam(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> updates, state = tx.update({"w": torch.tensor([3.0, -7.0])}, tx.init(params), params)
    >>> updates, state["w"]["step"]
    ({'w': tensor([-0.1000,  0.1000])}, tensor(1.))
    >>> adam(betas=(0.9, 1.0))
    Traceback (most recent call last):
        ...
    ValueError: adam: betas[1] must be at least 0 and less than 1, got 1.0
    """
    return _adam("adam", lr, betas, eps, weight_decay, amsgrad, maximize, state_dtype, decoupled=False)


def adamw(
    lr: Rates = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Rates = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    """AdamW; the same numbers as torch.optim.AdamW: Adam with the weight decay apart from the gradient.

    Args:
        lr: the learning rate: a number, a 0-d tensor or a schedule of the step; or a mapping from selectors to these,
            which has to cover every parameter that is updated.
        weight_decay: the same; a parameter that no selector takes has a decay of 0.
        betas: the decay rates of the two running means.
        eps: added to the root of the second.
        amsgrad: whether the largest second mean so far is used.
        maximize: whether to go up.
        state_dtype: see `adam`.

    Raises:
        RouteError: a mapping does not fit the parameters, when these are known: two entries that claim one parameter, a
            selector that takes none that is updated, parameters without a rate. Tells all of it.
        TypeError, ValueError: an option out of its range.

    >>> tx = adamw(0.1, weight_decay=0.5)
    >>> params = {"w": torch.ones(2)}
    >>> tx.update({"w": torch.zeros(2)}, tx.init(params), params)[0]
    {'w': tensor([-0.0500, -0.0500])}

    Two rates, and no decay of biases and norms; the state knows nothing of that:

    >>> from funcfreeze import where
    >>> matrices = where(lambda path, p: p.ndim > 1)
    >>> tx = adamw({"backbone": 1e-5, "head": 1e-3}, weight_decay={matrices: 0.05})
    >>> params = {"backbone.weight": torch.ones(2, 2), "head.weight": torch.ones(1, 2), "head.bias": torch.ones(1)}
    >>> sorted(tx.init(params))
    ['backbone.weight', 'head.bias', 'head.weight']
    >>> adamw({"backbone": 1e-5}).init(params)
    Traceback (most recent call last):
        ...
    funcfreeze.declare.selectors.RouteError: adamw: the rates do not fit the parameters that are updated:
      lr: head.weight, head.bias: claimed by none of backbone
    """
    return _adam("adamw", lr, betas, eps, weight_decay, amsgrad, maximize, state_dtype, decoupled=True)


def _adam(
    name: str,
    lr: Rates,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Rates,
    amsgrad: bool,
    maximize: bool,
    state_dtype: torch.dtype | None,
    *,
    decoupled: bool,
) -> Transform:
    paces = Paces.of(name, lr, weight_decay)
    beta1, beta2 = (
        float(check_number(name, f"betas[{index}]", beta, below=1.0)) for index, beta in enumerate(_pair(name, betas))
    )
    check_number(name, "eps", eps)
    check_state_dtype(name, state_dtype)

    def pure(param: Tensor, grad: Tensor, entry: Entry, pace: Pace) -> tuple[Tensor, Entry]:
        descent = decayed(param, grad, 0.0 if decoupled else pace.weight_decay, maximize)
        # The count is float32 as torch's; its powers need more digits than that.
        step = entry["step"] + 1
        count = step.to(torch.float64)
        direction = as_real(descent)
        mean = as_real(entry["exp_avg"]).lerp(direction, 1 - beta1)
        square = torch.addcmul(beta2 * as_real(entry["exp_avg_sq"]), direction, direction, value=1 - beta2)
        largest = torch.maximum(as_real(entry["max_exp_avg_sq"]), square) if amsgrad else square
        denominator = largest.sqrt() / (1 - beta2**count).sqrt() + eps
        moved = -(pace.lr / (1 - beta1**count)) * (mean / denominator)
        if decoupled:
            moved = moved - pace.lr * pace.weight_decay * as_real(param)
        kept = {"exp_avg": mean, "exp_avg_sq": square, **({"max_exp_avg_sq": largest} if amsgrad else {})}
        return back_to(moved, param), {"step": step, **{slot: back_to(value, param) for slot, value in kept.items()}}

    def fused(
        params: list[Tensor], grads: list[Tensor], entries: list[Entry], pace: Pace, found_inf: Tensor | None
    ) -> Callable[[], None]:
        kernel = _operator if is_traced(params[0]) else _kernel

        def run() -> None:
            kernel(
                params,
                [entry["exp_avg"] for entry in entries],
                [entry["exp_avg_sq"] for entry in entries],
                [entry["max_exp_avg_sq"] for entry in entries] if amsgrad else [],
                [entry["step"] for entry in entries],
                grads,
                *apart(pace.lr),
                *apart(pace.weight_decay),
                found_inf,
                beta1,
                beta2,
                eps,
                amsgrad,
                maximize,
                decoupled,
            )

        return run

    slots = ("step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []))
    options = {
        "betas": (beta1, beta2),
        "eps": eps,
        "amsgrad": amsgrad,
        "maximize": maximize,
        "decoupled_weight_decay": decoupled,
    }
    kinds = (AdamW, Adam) if decoupled else (Adam, AdamW)
    algorithm = Algorithm(kinds, options, slots)
    return leafwise(Rule(name, algorithm, slots, pure, fused, takes_sparse=False, state_dtype=state_dtype), paces)


def _kernel(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    grads: list[Tensor],
    rate: Tensor | None,
    lr: float,
    decay: Tensor | None,
    weight_decay: float,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
) -> None:
    """torch's fused kernel, with every argument as an operator's schema can have it."""
    adam_(
        params,
        readable(grads, params),
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        decoupled=decoupled,
        lr=lr if rate is None else rate,
        betas=(beta1, beta2),
        weight_decay=weight_decay if decay is None else decay,
        eps=eps,
        amsgrad=amsgrad,
        maximize=maximize,
        found_inf=found_inf,
    )


_operator = opaque(
    "adam_",
    ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"),
    "Tensor[] grads, Tensor? rate, float lr, Tensor? decay, float weight_decay, Tensor? found_inf, "
    "float beta1, float beta2, float eps, bool amsgrad, bool maximize, bool decoupled",
    _kernel,
)


def _pair(name: str, betas: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"{name}: betas must be two numbers, got {betas!r}")
    return betas[0], betas[1]
