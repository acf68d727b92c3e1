"""The contenders of the timing compute the same thing. What they take is not tested: it depends on the machine."""

import pytest
import torch

from funcfreeze.demos import speed

TINY = speed.Size(layers=2, width=8, heads=2, batch=4)


@pytest.fixture(autouse=True)
def single_precision():
    """The demos run in torch's default dtype, as they do from the command."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def test_recipe_reversal_layer_and_declaration_have_the_same_gradients():
    assert speed.disagreement(TINY) < 1e-6


def test_contenders_move_alike():
    contenders = [
        speed.make_model(TINY),
        speed.make_model(TINY),
    ]
    batch = speed.make_batch(TINY, torch.Generator().manual_seed(0))
    for model, backward in zip(contenders, (speed.recipe_backward, speed.reversal_backward), strict=True):
        backward(model, batch)
        assert all(param.requires_grad for param in model.parameters())
    first, second = contenders
    for (path, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=path)


def test_every_contender_is_timed_and_the_progress_told():
    told = []
    timings = speed.measure(0.0, TINY, told.append)
    assert timings.rounds == 1
    assert told == [1.0]
    assert {"recipe", "reversal", "routed"} <= timings.milliseconds.keys()
    assert all(milliseconds > 0 for milliseconds in timings.milliseconds.values())
    assert timings.threads == torch.get_num_threads()


def test_batches_differ_from_step_to_step():
    draw = torch.Generator().manual_seed(0)
    first, second = (speed.make_batch(TINY, draw) for _ in range(2))
    assert not torch.equal(first[0], second[0])
