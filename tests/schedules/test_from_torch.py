"""Schedules made of torch's schedulers, against the schedulers themselves on a real optimizer, step by step."""

from __future__ import annotations

import json
import random
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torchs

import funcfreeze as ff
from funcfreeze.schedules import Schedule, from_torch, join

STEPS = 120


def rates_of(make, lr, steps):
    """What torch sets, in the training loop of its documentation."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    rates = []
    for step in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        if step + 1 < steps:
            parameter.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return rates


def assert_rates(schedule, expected, tolerance=1e-12):
    seen = [float(schedule(torch.tensor(step))) for step in range(len(expected))]
    largest = max(map(abs, expected))
    assert seen == pytest.approx(expected, rel=tolerance, abs=tolerance * largest)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert eval(repr(schedule), vars(ff.schedules)) == schedule


def cyclic(draw, mode):
    return {
        "base_lr": draw.uniform(0.001, 0.1),
        "max_lr": draw.uniform(0.1, 1),
        "step_size_up": draw.randint(1, 20),
        "step_size_down": draw.choice([None, draw.randint(1, 20)]),
        "mode": mode,
        "gamma": draw.uniform(0.9, 1),
        "cycle_momentum": False,
    }


def one_cycle(draw, **options):
    return {
        "max_lr": draw.uniform(0.01, 1),
        "pct_start": draw.uniform(0.1, 0.45),
        "div_factor": draw.uniform(2, 30),
        "final_div_factor": draw.uniform(2, 1e4),
        "anneal_strategy": draw.choice(["cos", "linear"]),
        "cycle_momentum": False,
        **options,
    }


CLOSED = {
    "ConstantLR": lambda d: {"factor": d.uniform(0.01, 1), "total_iters": d.randint(1, 50)},
    "LinearLR": lambda d: {
        "start_factor": d.uniform(0.01, 1),
        "end_factor": d.choice([0.0, d.random()]),
        "total_iters": d.randint(1, 50),
    },
    "ExponentialLR": lambda d: {"gamma": d.uniform(0.8, 1.05)},
    "StepLR": lambda d: {"step_size": d.randint(1, 30), "gamma": d.random()},
    "MultiStepLR": lambda d: {"milestones": d.choices(range(60), k=d.randint(0, 6)), "gamma": d.uniform(0.1, 1)},
    "PolynomialLR": lambda d: {"total_iters": d.randint(1, 100), "power": d.uniform(0, 4)},
    "CosineAnnealingLR": lambda d: {"T_max": d.randint(1, 50), "eta_min": d.choice([0, d.uniform(0, 0.01)])},
    "CosineAnnealingWarmRestarts": lambda d: {
        "T_0": d.randint(1, 20),
        "T_mult": d.randint(1, 3),
        "eta_min": d.choice([0, d.uniform(0, 0.01)]),
    },
}


@pytest.mark.parametrize("trial", range(6))
@pytest.mark.parametrize("name", CLOSED)
def test_formulas(name, trial, seed):
    draw = random.Random(1000 * seed + trial)
    scheduler, options, lr = getattr(torchs, name), CLOSED[name](draw), draw.uniform(0.01, 1)
    schedule = from_torch(scheduler, lr=lr, **options)
    assert not schedule.has_table
    expected = rates_of(lambda optimizer: scheduler(optimizer, **options), lr, STEPS)
    assert_rates(schedule, expected)
    assert_rates(from_torch(scheduler, lr=lr, steps=STEPS, **options), expected, 0)


@pytest.mark.parametrize("trial", range(4))
@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_cycles(mode, trial, seed):
    options = cyclic(random.Random(1000 * seed + trial), mode)
    schedule = from_torch(torchs.CyclicLR, **options)
    assert not schedule.has_table
    expected = rates_of(lambda optimizer: torchs.CyclicLR(optimizer, **options), 0.5, STEPS)
    assert_rates(schedule, expected)
    assert from_torch(torchs.CyclicLR, lr=0.123, **options) == schedule  # torch overwrites it too
    listed = {**options, "base_lr": [options["base_lr"]], "max_lr": [options["max_lr"]]}
    assert from_torch(torchs.CyclicLR, **listed) == schedule


@pytest.mark.parametrize("trial", range(6))
@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle(three_phase, trial, seed):
    draw = random.Random(1000 * seed + trial)
    options = one_cycle(draw, total_steps=draw.randint(40, STEPS), three_phase=three_phase)
    total = options["total_steps"]
    schedule = from_torch(torchs.OneCycleLR, **options)
    assert not schedule.has_table
    expected = rates_of(lambda optimizer: torchs.OneCycleLR(optimizer, **options), 0.5, total)
    assert_rates(schedule, expected)
    assert float(schedule(total)) == float(schedule(10 * total)) == pytest.approx(expected[-1], rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"total_steps": 1},
        {"total_steps": 2},
        {"total_steps": 3},
        {"total_steps": 20, "pct_start": 0.0},
        {"total_steps": 20, "pct_start": 1.0},
        {"total_steps": 20, "pct_start": 0.8, "three_phase": True},
        {"total_steps": 20, "pct_start": 0.02},
        {"epochs": 3, "steps_per_epoch": 7},
    ],
    ids=str,
)
def test_one_cycle_with_phases_that_have_no_length(options):
    options = {"max_lr": 0.3, "cycle_momentum": False, **options}
    total = options.get("total_steps", 21)
    expected = rates_of(lambda optimizer: torchs.OneCycleLR(optimizer, **options), 0.5, total)
    schedule = from_torch(torchs.OneCycleLR, **options)
    assert_rates(schedule, expected)
    assert float(schedule(total + 5)) == pytest.approx(expected[-1], rel=1e-12)


class InverseRoot(torchs.LRScheduler):
    """Somebody's own, with a state that no formula of the step tells."""

    def __init__(self, optimizer, warm_up, last_epoch=-1):
        self.warm_up, self.calls = warm_up, 0
        super().__init__(optimizer, last_epoch)

    def get_lr(self):
        self.calls += 1
        return [rate * min(self.calls / self.warm_up, (self.warm_up / self.calls) ** 0.5) for rate in self.base_lrs]


class Steeper(torchs.StepLR):
    def get_lr(self):
        return [rate * 0.99 for rate in super().get_lr()]


class WithSteps(torchs.LRScheduler):
    def __init__(self, optimizer, steps):
        self.steps = steps
        super().__init__(optimizer)

    def get_lr(self):
        return [rate * (1 - self.last_epoch / self.steps) for rate in self.base_lrs]


OWN = [
    (torchs.LambdaLR, {"lr_lambda": lambda epoch: 0.95**epoch}),
    (torchs.LambdaLR, {"lr_lambda": [lambda epoch: 1 / (1 + epoch)]}),
    (torchs.MultiplicativeLR, {"lr_lambda": lambda epoch: 0.9 if epoch % 7 else 1.2}),
    (torchs.CyclicLR, {"base_lr": 0.1, "max_lr": 1.0, "scale_fn": lambda x: 0.5**x, "cycle_momentum": False}),
    (InverseRoot, {"warm_up": 13}),
    (Steeper, {"step_size": 5}),
    (torch.optim.swa_utils.SWALR, {"swa_lr": 0.05, "anneal_epochs": 9}),
]


@pytest.mark.parametrize(("scheduler", "options"), OWN, ids=lambda case: getattr(case, "__name__", ""))
def test_without_a_formula_they_are_written_out(scheduler, options):
    with pytest.raises(
        ValueError, match=f"from_torch\\({scheduler.__name__}\\): what it sets is no formula that is known "
    ):
        from_torch(scheduler, lr=0.3, **options)
    schedule = from_torch(scheduler, lr=0.3, steps=60, **options)
    expected = rates_of(lambda optimizer: scheduler(optimizer, **options), 0.3, 60)
    assert_rates(schedule, [*expected, expected[-1], expected[-1]], 0)
    assert schedule.has_table


def test_a_class_that_takes_steps_itself():
    schedule = from_torch(WithSteps, lr=0.3, steps=20)
    assert_rates(schedule, rates_of(lambda optimizer: WithSteps(optimizer, 20), 0.3, 20), 0)


def test_sequential_is_join_and_chained_a_product(seed):
    """As the errors of both say."""
    draw = random.Random(seed)
    warm, cut = draw.randint(2, 9), draw.randint(10, 30)
    expected = rates_of(
        lambda optimizer: torchs.SequentialLR(
            optimizer,
            [
                torchs.LinearLR(optimizer, 0.1, total_iters=warm),
                torchs.CosineAnnealingLR(optimizer, cut),
                torchs.ExponentialLR(optimizer, 0.9),
            ],
            [warm, warm + cut],
        ),
        0.3,
        60,
    )
    parts = [
        from_torch(torchs.LinearLR, lr=0.3, start_factor=0.1, total_iters=warm),
        from_torch(torchs.CosineAnnealingLR, lr=0.3, T_max=cut),
        from_torch(torchs.ExponentialLR, lr=0.3, gamma=0.9),
    ]
    assert_rates(join(parts, [warm, warm + cut]), expected)

    expected = rates_of(
        lambda optimizer: torchs.ChainedScheduler(
            [
                torchs.ConstantLR(optimizer, 0.1, warm),
                torchs.StepLR(optimizer, cut),
                torchs.ExponentialLR(optimizer, 0.9),
            ]
        ),
        0.3,
        60,
    )
    product = (
        from_torch(torchs.ExponentialLR, lr=0.3, gamma=0.9)
        * from_torch(torchs.ConstantLR, lr=1.0, factor=0.1, total_iters=warm)
        * from_torch(torchs.StepLR, lr=1.0, step_size=cut)
    )
    assert_rates(product, expected)


def test_what_can_be_no_schedule_goes_by_a_tensor():
    """As the error says: the scheduler writes to the rate that an optimizer here reads."""
    rate = torch.tensor(0.1)
    scheduler = torchs.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=rate), factor=0.5, patience=0)
    tx, params = ff.optim.sgd(rate), {"w": torch.zeros(())}
    moved = []
    for metric in (1.0, 2.0, 3.0):
        moved.append(float(tx.update({"w": torch.ones(())}, {"w": {}}, params)[0]["w"]))
        scheduler.step(metric)
    assert moved == pytest.approx([-0.1, -0.1, -0.05])


def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


KEPT = optimizer()


class OnMetrics(torchs.LRScheduler):
    def step(self, loss=None, *, metric):  # a metric that is asked for by name
        super().step()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: from_torch(torchs.StepLR(optimizer(), 30)),
            TypeError,
            "takes the class of a scheduler, got an instance of StepLR; write "
            "from_torch(StepLR, lr=0.1, step_size=30, gamma=0.1)",
        ),
        (
            lambda: from_torch(torchs.LambdaLR(optimizer(), lambda epoch: 1.0)),
            TypeError,
            "write from_torch(LambdaLR, lr=0.1, lr_lambda=...)",
        ),
        (
            lambda: from_torch(optimizer()),
            TypeError,
            "takes the class of a scheduler and a rate, got an instance of SGD; write from_torch(StepLR, lr=0.1, ",
        ),
        (
            lambda: from_torch(torch.optim.Adam, lr=0.1),
            TypeError,
            "got the optimizer Adam; for that there is ff.optim.from_torch(Adam, lr=...)",
        ),
        (
            lambda: from_torch(torchs.StepLR, optimizer(), 30),
            TypeError,
            "from_torch(StepLR) takes the rate and no optimizer, and the rest by keyword; write "
            "from_torch(StepLR, lr=0.1, step_size=30)",
        ),
        (
            lambda: from_torch(torchs.StepLR, optimizer=optimizer(), step_size=30),
            TypeError,
            "write from_torch(StepLR, lr=0.1, step_size=30)",
        ),
        (
            lambda: from_torch(torchs.StepLR, 0.2, 30, 0.5),
            TypeError,
            "write from_torch(StepLR, lr=0.2, step_size=30, gamma=0.5)",
        ),
        (
            lambda: from_torch(torchs.StepLR, step_size=30),
            TypeError,
            "(StepLR): lr is missing, the rate of the optimizer; write from_torch(StepLR, lr=..., step_size=30)",
        ),
        (
            lambda: from_torch(torchs.StepLR, lr=0.1, step_size=30, last_epoch=5),
            TypeError,
            "takes no last_epoch: a schedule reads the step, which a State keeps",
        ),
        (
            lambda: from_torch(torchs.ReduceLROnPlateau, lr=0.1),
            ValueError,
            "from_torch(ReduceLROnPlateau): its step() takes a metric, and a schedule is a function of the step alone; "
            "keep the rate in a tensor, rate = torch.tensor(0.1), which optimizers here read at every step "
            "(ff.optim.adam(rate)), and let the scheduler write to it: "
            "ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=rate))",
        ),
        (lambda: from_torch(OnMetrics, lr=0.1), ValueError, "from_torch(OnMetrics): its step() takes metric, and a"),
        (
            lambda: from_torch(torchs.SequentialLR, lr=0.1),
            ValueError,
            "from_torch(SequentialLR): it is made of other schedulers; join them: ff.schedules.join([from_torch(",
        ),
        (
            lambda: from_torch(torchs.SequentialLR(KEPT, [torchs.StepLR(KEPT, 3)], [])),
            ValueError,
            "it is made of other schedulers; join them",
        ),
        (
            lambda: from_torch(torchs.ChainedScheduler),
            ValueError,
            "from_torch(ChainedScheduler): it is made of other schedulers; multiply them, all but one with a rate of 1",
        ),
        (
            lambda: from_torch(torchs.LambdaLR, lr=0.1, lr_lambda=lambda epoch: 1.0),
            ValueError,
            "for how many steps of training to write it out: from_torch(LambdaLR, lr=0.1, lr_lambda=..., steps=...)",
        ),
        (
            lambda: from_torch(InverseRoot, lr=0.1, warm_up=5),
            ValueError,
            "from_torch(InverseRoot, lr=0.1, warm_up=5, steps=...)",
        ),
        (lambda: from_torch(abs), TypeError, "the numbers of any other go into ff.schedules.table([...])"),
        (
            lambda: from_torch(torchs.StepLR, lr=0.1, stepsize=3),
            TypeError,
            "from_torch(StepLR): StepLR.__init__() got an unexpected keyword argument 'stepsize'",
        ),
        (
            lambda: from_torch(torchs.OneCycleLR, total_steps=5),
            TypeError,
            "from_torch(OneCycleLR): OneCycleLR.__init__() missing 1 required positional argument: 'max_lr'",
        ),
        (
            lambda: from_torch(torchs.ConstantLR, lr=0.1, factor=2),
            ValueError,
            "from_torch(ConstantLR): Constant multiplicative factor expected to be between 0 and 1.",
        ),
        (
            lambda: from_torch(torchs.OneCycleLR, max_lr=0.1, total_steps=5, steps=9, cycle_momentum=False),
            ValueError,
            "from_torch(OneCycleLR): Tried to step 6 times. The specified number of total steps is 5",
        ),
        (
            lambda: from_torch(torchs.LambdaLR, lr=0.1, lr_lambda=lambda epoch: 1 / epoch, steps=3),
            ValueError,
            "from_torch(LambdaLR): ZeroDivisionError: division by zero",
        ),
        (
            lambda: from_torch(torchs.LambdaLR, lr=0.1, lr_lambda=lambda epoch: float("nan"), steps=3),
            ValueError,
            "from_torch(LambdaLR): table: values[0] must be a finite number, got nan",
        ),
        (
            lambda: from_torch(torchs.LambdaLR, lr=0.1, lr_lambda=[lambda epoch: 1.0] * 2, steps=3),
            ValueError,
            "from_torch(LambdaLR): Expected 1 lr_lambdas, but got 2",
        ),
        (
            lambda: from_torch(torchs.StepLR, lr=0.1, step_size=0),
            ValueError,
            "from_torch(StepLR): step_size must be a whole number of at least 1, got 0; or with steps= what",
        ),
        (
            lambda: from_torch(torchs.CosineAnnealingLR, lr=0.1, T_max=2.5),
            ValueError,
            "from_torch(CosineAnnealingLR): T_max must be a whole number of at least 1, got 2.5; or with steps= what",
        ),
        (lambda: from_torch(torchs.StepLR, lr=-0.1, step_size=3), ValueError, "Invalid learning rate: -0.1"),
        (
            lambda: from_torch(torchs.StepLR, lr=torch.tensor(0.1), step_size=3),
            ValueError,
            "from_torch(StepLR): lr must be a finite number, got tensor(0.1000",
        ),
        (
            lambda: from_torch(torchs.StepLR, lr=0.1, step_size=3, steps=0),
            ValueError,
            "from_torch(StepLR): steps must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_errors_show_the_line_that_is_meant(make, error, text):
    with pytest.raises(error) as raised:
        make()
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [(torchs.OneCycleLR, {"max_lr": 0.1, "total_steps": 20}), (torchs.CyclicLR, {"base_lr": 0.1, "max_lr": 0.2})],
)
def test_momentum_is_not_taken_over_and_a_warning_says_so(scheduler, options):
    text = rf"from_torch\({scheduler.__name__}\) cycles the momentum too; .*Pass cycle_momentum=False to agree"
    with pytest.warns(UserWarning, match=text) as caught:
        schedule = from_torch(scheduler, **options)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_torch(scheduler, **options, cycle_momentum=False) == schedule


def test_what_torch_makes_of_odd_lengths_is_written_out():
    for scheduler, options in [
        (torchs.CosineAnnealingLR, {"T_max": 2.5}),
        (torchs.ConstantLR, {"total_iters": 0}),
        (torchs.StepLR, {"step_size": 2.5}),
        (torchs.LinearLR, {"total_iters": 4.5}),
    ]:
        expected = rates_of(lambda optimizer, make=scheduler, given=options: make(optimizer, **given), 0.3, 30)
        assert_rates(from_torch(scheduler, lr=0.3, steps=30, **options), expected, 0)


def test_milestones_may_be_used_up_and_repeat():
    given = [3, 3, 0, 7, -2, 2.5]
    schedule = from_torch(torchs.MultiStepLR, lr=0.3, milestones=iter(given), gamma=0.5)
    assert_rates(schedule, rates_of(lambda optimizer: torchs.MultiStepLR(optimizer, given, 0.5), 0.3, 12))
