"""The two runs differ in the adversarial weight and in nothing else."""

import pytest
import torch

from funcfreeze.demos.adversarial import WEIGHTS, Settings, make_model, make_step, train, verify_step
from funcfreeze.demos.digits import batches, two_domains
from funcfreeze.demos.probe import domain_probe
from funcfreeze.demos.threads import one_thread
from funcfreeze.demos.trials import run_trials

SHORT = Settings(steps=6, batch=8, points=2)


@pytest.fixture(autouse=True)
def as_the_command_runs():
    """The demos run in torch's default dtype, as they do from the command."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with one_thread():  # as the trainings do: other programs on the machine then cost little
        yield
    torch.set_default_dtype(before)


def silent(*_):
    pass


def weights(step):
    return {(row.path, loss): terms for row in step.plan.rows for loss, terms in row.weights.items()}


def test_the_plans_differ_in_the_adversarial_weight_only():
    baseline, adversarial = (weights(make_step(0, weight, SHORT)) for weight in WEIGHTS.values())
    assert baseline.keys() == adversarial.keys()
    differing = {key for key in baseline if baseline[key] != adversarial[key]}
    assert differing == {key for key in baseline if key[0].startswith("encoder.") and key[1] == "domain"}


def test_both_runs_start_from_the_same_values():
    first, second = (make_step(0, weight, SHORT).init() for weight in WEIGHTS.values())
    assert all(torch.equal(first.params[path], second.params[path]) for path in first.params)


def test_both_runs_agree_while_the_weight_is_zero():
    # The schedule is 0 at step 0, so the first step of both is one and the same.
    (batch,) = batches(two_domains(0), 0, 1, 8)
    states = []
    for weight in WEIGHTS.values():
        step = make_step(0, weight, SHORT)
        state, _ = step(step.init(), batch)
        states.append(state)
    first, second = states
    assert all(torch.equal(first.params[path], second.params[path]) for path in first.params)


def test_the_adversarial_weight_turns_the_sign_at_the_encoder_only():
    (batch,) = batches(two_domains(0), 0, 1, 8)
    found = []
    for weight in (-1.0, 1.0):
        step = make_step(0, weight, SHORT)
        state = step.init().replace(step=torch.tensor(SHORT.steps))
        found.append(step.per_loss_gradients(state, batch)["domain"])
    plain, turned = found
    for path, gradient in plain.items():
        sign = -1 if path.startswith("encoder.") else 1
        torch.testing.assert_close(turned[path], sign * gradient)


def test_the_step_is_verified_where_the_adversarial_weight_is_on():
    report = verify_step(0, SHORT)
    assert report.ok, str(report)


def test_training_measures_at_the_points_and_repeats_itself():
    told = []
    points = train(0, 0.3, SHORT, lambda step, losses: told.append((step, sorted(losses))))
    assert [point.step for point in points] == [3, 6]
    assert told == [(step, ["class", "domain"]) for step in range(1, 7)]
    assert train(0, 0.3, SHORT, silent) == points


def test_making_a_model_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    make_model(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_trials_keep_every_seed():
    trials = run_trials(SHORT, range(2), silent)
    assert trials.seeds == (0, 1)
    assert list(trials.curves) == ["baseline", "adversarial"]
    assert len(trials.outcome("baseline", "domain_probe")) == 2
    assert trials.best("baseline", "source_accuracy")[1] in (3, 6)


def test_the_probe_is_at_chance_where_there_is_nothing_to_tell():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(200, 4, generator=draw), torch.randn(200, 4, generator=draw)
    assert 0.35 < domain_probe(one, other, seed=0) < 0.65
