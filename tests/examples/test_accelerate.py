"""accelerate's loop against the recipe in the same loop."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_ways import distance, example, framework, recipe, relative_distance
from torch.utils.data import DataLoader

import funcfreeze as ff

pytestmark = pytest.mark.slow
PARTS = [
    ("drawing", 1.0, ("encoder", "decoder")),
    ("critic", 1.0, ("critic",)),
    ("fooling", 0.02, ("encoder",)),
]


@pytest.fixture(scope="module")
def program():
    framework("sklearn")
    framework("accelerate")
    return example("accelerate_loop")


@pytest.fixture
def accelerator(program):
    """One that accumulates in float64; accelerate has one state a process."""
    from accelerate.state import AcceleratorState

    yield lambda precision: program.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)


def by_hand(program, model, batches, accelerator, differentiate):
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, betas=(0.5, 0.999))
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    norms = []
    for pixels in batches:
        with accelerator.accumulate(model):
            found = model(pixels, torch.randn(len(pixels), program.SIZE).to(pixels))
            differentiate(model, found)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    assert max(norms) > 0.5, "clipping bites"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_as_the_recipe(precision, program, accelerator, seed):
    one = accelerator(precision)
    dtype = torch.float64 if precision == "no" else torch.float32
    batches = DataLoader(program.all_digits().pixels[:768].to(dtype), batch_size=32)

    def by_recipe(model, found):
        recipe(model, [(found[name], weight, parts) for name, weight, parts in PARTS], one.backward)

    def by_backward(model, found):
        ff.backward({name: loss / 2 for name, loss in found.items()}, program.ROUTES, model)

    def by_sum(model, found):
        one.backward(sum(found.values()))

    ours = program.Autoencoder().to(dtype)
    start = copy.deepcopy(ours.state_dict())
    torch.manual_seed(seed)
    program.train(ours, batches, one, epochs=1)
    apart, roughly = {}, {}
    for way in by_recipe, by_backward, by_sum:
        theirs = program.Autoencoder().to(dtype)
        theirs.load_state_dict(start)
        torch.manual_seed(seed)
        by_hand(program, theirs, batches, one, way)
        apart[way.__name__] = distance(ours, theirs, start)
        roughly[way.__name__] = relative_distance(ours, theirs, start)

    if precision == "no":
        assert apart["by_recipe"] < 1e-10
        assert apart["by_backward"] < 1e-10
    else:
        assert roughly["by_recipe"] < 0.1
        assert roughly["by_backward"] < 0.1
    assert roughly["by_sum"] > 0.2
