"""torch's fused optimizer kernels, for parameters of one device and one dtype; where there is none, those on lists.

They are private to torch and the same in 2.11 to 2.15; `torch.optim.adam.adam(fused=True)` and its like do no more with
them than is done here, after they have sorted every tensor by device and dtype once more: for 12 parameters that takes
a tenth of a millisecond, half of what the update itself takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funcfreeze.optim.decay import times, with_decay


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    decoupled: bool,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float | Tensor,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    found_inf: Tensor | None,
) -> None:
    """Overwrite parameters and their state by Adam, or AdamW if `decoupled`; nothing where `found_inf` is 1."""
    update = torch._fused_adamw_ if decoupled else torch._fused_adam_
    before = None
    if isinstance(weight_decay, Tensor):  # which the kernel does not take
        if decoupled:
            before = [param.clone() for param in params]
            _decay(params, lr * weight_decay, found_inf)
        else:
            grads = with_decay(grads, params, weight_decay, maximize)
        weight_decay = 0.0
    _count(steps)
    try:
        update(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=amsgrad,
            maximize=maximize,
            found_inf=found_inf,
        )
    except BaseException:
        torch._foreach_sub_(steps, 1)  # the kernel looks at all of its arguments before it writes
        if before is not None:
            torch._foreach_copy_(params, before)
        raise
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    maximize: bool,
    found_inf: Tensor | None,
) -> None:
    """Overwrite parameters and momentum buffers by SGD without dampening; nothing where `found_inf` is 1."""
    if isinstance(weight_decay, Tensor):  # which the kernel does not take
        grads, weight_decay = with_decay(grads, params, weight_decay, maximize), 0.0
    torch._fused_sgd_(
        params,
        grads,
        [*buffers],
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        dampening=0,
        nesterov=nesterov,
        maximize=maximize,
        is_first_step=False,
        found_inf=found_inf,
    )


def rmsprop_(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    grad_avgs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    alpha: float,
    eps: float,
    weight_decay: float | Tensor,
    momentum: float,
    maximize: bool,
    found_inf: Tensor | None,
) -> None:
    """Overwrite parameters and their state by RMSprop; nothing where `found_inf` is 1.

    torch has no fused kernel for it; these are the operations on lists that `torch.optim.RMSprop(foreach=True)` does.
    """
    overwritten = [*params, *square_avgs, *momentum_buffers, *grad_avgs, *steps]
    before = [] if found_inf is None else [tensor.clone() for tensor in overwritten]
    if isinstance(weight_decay, Tensor):
        grads, weight_decay = with_decay(grads, params, weight_decay, maximize), 0.0
    if maximize:
        grads = [*torch._foreach_neg(grads)]
    if weight_decay != 0:
        grads = [*torch._foreach_add(grads, params, alpha=weight_decay)]
    _count(steps)
    torch._foreach_mul_(square_avgs, alpha)
    torch._foreach_addcmul_(square_avgs, grads, grads, value=1 - alpha)
    variances = square_avgs
    if grad_avgs:
        torch._foreach_lerp_(grad_avgs, grads, 1 - alpha)
        variances = [*torch._foreach_addcmul(square_avgs, grad_avgs, grad_avgs, value=-1)]
    roots = torch._foreach_sqrt(variances)
    torch._foreach_add_(roots, eps)
    if momentum_buffers:
        torch._foreach_mul_(momentum_buffers, momentum)
        torch._foreach_addcdiv_(momentum_buffers, grads, roots)
        _move(params, momentum_buffers, lr)
    elif isinstance(lr, Tensor):
        _move(params, [*torch._foreach_div(grads, roots)], lr)
    else:
        torch._foreach_addcdiv_(params, grads, roots, value=-lr)
    if found_inf is not None:  # which none of these takes: where it is 1, everything is put back
        is_skipped = found_inf > 0
        for tensor, kept in zip(overwritten, before, strict=True):
            torch.where(is_skipped, kept, tensor, out=tensor)


def _decay(params: list[Tensor], part: Tensor, found_inf: Tensor | None) -> None:
    """Take a part of each parameter away from it; nothing where `found_inf` is 1."""
    left = torch._foreach_sub(params, times(params, part))
    if found_inf is not None:
        left = tuple(torch.where(found_inf > 0, *pair) for pair in zip(params, left, strict=True))
    torch._foreach_copy_(params, left)


def _move(params: list[Tensor], directions: list[Tensor], lr: float | Tensor) -> None:
    """Against the directions."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, times(directions, lr))
    else:
        torch._foreach_add_(params, directions, alpha=-lr)


def _count(steps: list[Tensor]) -> None:
    """Add 1. On the CPU torch does that for one after another, and would make a tensor of the number each time."""
    torch._foreach_add_(steps, [torch.ones_like(steps[0])] * len(steps) if steps[0].is_cpu else 1)
