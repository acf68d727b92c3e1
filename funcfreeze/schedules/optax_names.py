"""Schedules under optax's names, with optax's arguments, for `funcfreeze.optim`."""

from __future__ import annotations

from funcfreeze.schedules.schedule import Schedule


def constant_schedule(value: float) -> Schedule:
    """The same value at every step.

    >>> constant_schedule(0.5)(7)
    tensor(0.5000, dtype=torch.float64)
    """
    return Schedule("constant_schedule", (("value", value),))


def linear_schedule(init_value: float, end_value: float, transition_steps: float) -> Schedule:
    """In a straight line from `init_value` at step 0 to `end_value` at `transition_steps`, and constant after it.

    >>> linear_schedule(0.0, 1.0, 10)(4)
    tensor(0.4000, dtype=torch.float64)
    >>> linear_schedule(0.0, 1.0, 0)
    Traceback (most recent call last):
        ...
    ValueError: linear_schedule: transition_steps must be more than 0, got 0
    """
    return Schedule(
        "linear_schedule",
        (("init_value", init_value), ("end_value", end_value), ("transition_steps", transition_steps)),
    )


def cosine_decay_schedule(init_value: float, decay_steps: float, alpha: float = 0.0) -> Schedule:
    """Along half a cosine from `init_value` down to `alpha * init_value` at `decay_steps`, and constant after it.

    >>> cosine_decay_schedule(2.0, 10)(5)
    tensor(1., dtype=torch.float64)
    """
    return Schedule(
        "cosine_decay_schedule", (("init_value", init_value), ("decay_steps", decay_steps), ("alpha", alpha))
    )


def warmup_constant_schedule(init_value: float, peak_value: float, warmup_steps: float) -> Schedule:
    """In a straight line from `init_value` to `peak_value` at `warmup_steps`, and constant after it.

    >>> warmup_constant_schedule(0.0, 1.0, 10)(25)
    tensor(1., dtype=torch.float64)
    """
    return Schedule(
        "warmup_constant_schedule",
        (("init_value", init_value), ("peak_value", peak_value), ("warmup_steps", warmup_steps)),
    )


def warmup_cosine_decay_schedule(
    init_value: float, peak_value: float, warmup_steps: float, decay_steps: float, end_value: float = 0.0
) -> Schedule:
    """Up to `peak_value` at `warmup_steps` in a straight line, then down to `end_value` at `decay_steps` by a cosine.

    Both lengths count from step 0, as in optax.

    >>> warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=30)(20)
    tensor(0.5000, dtype=torch.float64)
    >>> warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=10)
    Traceback (most recent call last):
        ...
    ValueError: warmup_cosine_decay_schedule: decay_steps counts from step 0 and must be more than warmup_steps, ...
    """
    return Schedule(
        "warmup_cosine_decay_schedule",
        (
            ("init_value", init_value),
            ("peak_value", peak_value),
            ("warmup_steps", warmup_steps),
            ("decay_steps", decay_steps),
            ("end_value", end_value),
        ),
    )


def dann_schedule(total_steps: float, gamma: float = 10.0) -> Schedule:
    """The weight of a domain-adversarial loss: 0 at step 0, rising to almost 1 at `total_steps`, constant after it.

    It is 2 / (1 + exp(-gamma * p)) - 1 with p the fraction of training that is done, from Ganin et al.,
    "Domain-Adversarial Training of Neural Networks", JMLR 17(59), 2016 (https://arxiv.org/abs/1505.07818).

    >>> dann_schedule(800)(0), dann_schedule(800)(800)
    (tensor(0., dtype=torch.float64), tensor(0.9999, dtype=torch.float64))
    """
    return Schedule("dann_schedule", (("total_steps", total_steps), ("gamma", gamma)))
