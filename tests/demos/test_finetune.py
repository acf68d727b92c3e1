"""A frozen body stays bit-identical, and costs no backward."""

import pytest
import torch

from funcfreeze.demos.digits import all_digits
from funcfreeze.demos.finetune import (
    NEW,
    OLD,
    ROUTES,
    largest_change,
    make_model,
    make_step,
    new_losses,
    run,
    split,
)
from funcfreeze.demos.threads import one_thread


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


@pytest.fixture(scope="module")
def found():
    return run([0, 1], 5, silent)


def test_the_frozen_body_is_bit_identical_and_the_head_moves(found):
    for outcome in found["new head only"]:
        assert outcome.changes["body"] == outcome.changes["old_head"] == 0.0
        assert outcome.changes["new_head"] > 0
        assert outcome.old_accuracy[0] == outcome.old_accuracy[1]


def test_training_everything_moves_the_body_too(found):
    for outcome in found["everything"]:
        assert outcome.changes["body"] > 0
        assert outcome.changes["old_head"] == 0.0


def test_the_counted_work_is_that_of_the_weights_that_may_move(found):
    head, everything = found["new head only"][0], found["everything"][0]
    batch, inputs, hidden, classes = 64, 64, 256, 5
    assert head.forward == everything.forward == 2 * batch * (inputs * hidden + hidden * hidden + hidden * classes)
    assert head.backward == 2 * batch * hidden * classes
    # Every weight gradient, and the gradients that pass through the new head and the upper layer of the body.
    passing = 2 * batch * (hidden * hidden + hidden * classes)
    assert everything.backward == everything.forward + passing


def test_both_ways_start_from_the_same_network(found):
    for one, other in zip(*found.values(), strict=True):
        assert (one.old_accuracy[0], one.new_accuracy[0]) == (other.old_accuracy[0], other.new_accuracy[0])


def test_no_other_gradient_is_computed():
    digits = split(0)
    step = make_step(make_model(0), ROUTES["new head only"])
    gradients = step.gradients(step.init(), (digits.new.pixels[:8], digits.new.labels[:8]))
    assert sorted(gradients) == ["new_head.bias", "new_head.weight"]


def test_old_and_new_digits_and_held_out_ones_are_apart():
    digits = split(0)
    parts = [digits.old, digits.new, digits.old_test, digits.new_test]
    every = torch.cat([part.index for part in parts])
    assert sorted(every.tolist()) == list(range(len(all_digits())))
    assert set(digits.old.labels.tolist()) == set(OLD)
    assert set(digits.new_test.labels.tolist()) == set(NEW)


def test_a_change_of_bits_alone_is_a_change():
    assert largest_change("a", {"a.w": torch.tensor([0.0])}, {"a.w": torch.tensor([-0.0])}) > 0
    assert largest_change("a", {"a.w": torch.ones(2)}, {"a.w": torch.ones(2)}) == 0.0


def test_the_new_loss_counts_its_classes_from_zero():
    pixels = torch.rand(4, 64)
    assert new_losses(torch.nn.ModuleDict(make_model(0)), (pixels, torch.tensor([5, 6, 8, 9])))["new"].isfinite()
