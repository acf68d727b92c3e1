"""What is no scheduler to make a schedule of: errors that show the line that is meant."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

Arguments = Mapping[str, Any]


def refuse(scheduler: Any, lr: Any, misplaced: tuple[Any, ...], arguments: Arguments) -> None:
    """Everything that is no class of a scheduler and its arguments, with the line that is meant."""
    kind = scheduler if isinstance(scheduler, type) else type(scheduler)
    if issubclass(kind, Optimizer):
        _refuse_optimizer(scheduler)
    if not issubclass(kind, LRScheduler):
        raise TypeError(
            "from_torch(...) takes the class of a scheduler of torch.optim.lr_scheduler, got "
            f"{type(scheduler).__name__}: {scheduler!r}; the numbers of any other go into ff.schedules.table([...])"
        )
    _refuse_kind(kind)
    if not isinstance(scheduler, type):
        rates = vars(scheduler).get("base_lrs") or [...]
        raise TypeError(
            f"from_torch(...) takes the class of a scheduler, got an instance of {kind.__name__}; write "
            f"{right_line(kind, rates[0], vars(scheduler))}"
        )
    names = [name for name in _parameters(kind) if name not in ("optimizer", "last_epoch")]
    if isinstance(lr, Optimizer) or misplaced or "optimizer" in arguments:
        optimizer = next((given for given in (lr, arguments.get("optimizer")) if isinstance(given, Optimizer)), None)
        rate = lr if optimizer is None else optimizer.param_groups[0]["lr"]
        known = {**dict(zip(names, misplaced, strict=False)), **arguments}
        raise TypeError(
            f"from_torch({kind.__name__}) takes the rate and no optimizer, and the rest by keyword; write "
            f"{right_line(kind, rate, known)}"
        )
    if "last_epoch" in arguments:
        raise TypeError(
            f"from_torch({kind.__name__}) takes no last_epoch: a schedule reads the step, which a State keeps"
        )


def _refuse_optimizer(optimizer: Any) -> NoReturn:
    if isinstance(optimizer, type):
        raise TypeError(
            f"from_torch(...) of schedules takes the class of a scheduler, got the optimizer {optimizer.__name__}; "
            f"for that there is ff.optim.from_torch({optimizer.__name__}, lr=...)"
        )
    rate = _shown(optimizer.param_groups[0]["lr"])
    raise TypeError(
        f"from_torch(...) takes the class of a scheduler and a rate, got an instance of {type(optimizer).__name__}; "
        f"write from_torch(StepLR, lr={rate}, step_size=...)"
    )


def _refuse_kind(kind: type[LRScheduler]) -> None:
    """Those that are no functions of the step, or made of others."""
    name = f"from_torch({kind.__name__})"
    if issubclass(kind, SequentialLR):
        raise ValueError(
            f"{name}: it is made of other schedulers; join them: "
            "ff.schedules.join([from_torch(LinearLR, lr=0.1, ...), from_torch(StepLR, lr=0.1, ...)], milestones)"
        )
    if issubclass(kind, ChainedScheduler):
        raise ValueError(
            f"{name}: it is made of other schedulers; multiply them, all but one with a rate of 1: "
            "from_torch(ExponentialLR, lr=0.1, ...) * from_torch(ConstantLR, lr=1.0, ...)"
        )
    wanted = [
        parameter.name
        for parameter in [*inspect.signature(kind.step).parameters.values()][1:]
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if wanted:
        metric = "a metric" if wanted == ["metrics"] else ", ".join(wanted)
        raise ValueError(
            f"{name}: its step() takes {metric}, and a schedule is a function of the step alone; keep the rate in a "
            "tensor, rate = torch.tensor(0.1), which optimizers here read at every step (ff.optim.adam(rate)), and let "
            f"the scheduler write to it: {kind.__name__}(torch.optim.SGD([torch.zeros(1)], lr=rate))"
        )


def _parameters(kind: type[LRScheduler]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters


def right_line(kind: type[LRScheduler], lr: Any, known: Arguments, *more: str) -> str:
    """The call that is right, as far as it is known."""
    own = {
        name: _shown(known[name]) if name in known else "..."
        for name, parameter in _parameters(kind).items()
        if name not in ("optimizer", "last_epoch") and (name in known or parameter.default is parameter.empty)
    }
    given = {"lr": _shown(lr), **own}
    return f"from_torch({', '.join([kind.__name__, *(f'{key}={value}' for key, value in given.items()), *more])})"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        return repr(value.item())
    plain = value is None or isinstance(value, bool | int | float | str | list | tuple)
    return repr(value) if plain else "..."
