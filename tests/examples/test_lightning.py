"""A Lightning module, optimized automatically and by hand, against what people write in the same `Trainer`."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from plain_ways import dann, distance, example, framework, recipe, relative_distance, scaled
from torch.utils.data import DataLoader, TensorDataset

import funcfreeze as ff

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`Trainer.fit` stopped"),
]


@pytest.fixture(scope="module")
def program():
    framework("sklearn")
    framework("lightning")
    return example("lightning_module")


@functools.cache
def kinds(program):
    """The module as people write it, by the kind of optimization; and one with neither way."""

    class Reversed(program.Reader):
        def __init__(self, weight=None):
            super().__init__()
            self.weight = weight

        def training_step(self, batch, index):
            clean, labels, noisy = batch
            code = self.encoder(torch.cat([clean, noisy]))
            is_noisy = (torch.arange(len(code)) >= len(clean)).long()
            weight = -0.3 * dann(self.global_step, 200) if self.weight is None else self.weight
            return F.cross_entropy(self.digit(code[: len(clean)]), labels) + F.cross_entropy(
                self.domain(scaled(code, weight)), is_noisy
            )

    class ByHand(program.Reader):
        def __init__(self, differentiate):
            super().__init__()
            self.automatic_optimization = False
            self.differentiate = differentiate
            self.clipped = False

        def training_step(self, batch, index):
            self.differentiate(self, self.losses(batch))
            if (index + 1) % 2 == 0:
                optimizer = self.optimizers()
                norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.parameters()])
                self.clipped |= bool(norm > 0.5)
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()

    return Reversed, ByHand


def by_recipe(module, found):
    parts = [
        (found["digit"], 1.0, ("encoder", "digit")),
        (found["domain"], 1.0, ("domain",)),
        (found["domain"], -0.3 * dann(module.global_step, 200), ("encoder",)),
    ]
    recipe(module, parts, lambda loss, **how: module.manual_backward(loss / 2, **how))


def by_backward(module, found):
    routes = {
        "digit": ["encoder", "digit"],
        "domain": {"domain": 1.0, "encoder": -0.3 * dann(module.global_step, 200)},
    }
    ff.backward({name: loss / 2 for name, loss in found.items()}, routes, module)


def fitted(program, module, start, batches, steps=12, **options):
    module.load_state_dict(start)
    program.trainer(module, steps, **options).fit(module, batches)
    return module


def some(program, seed, dtype=torch.float64):
    digits = program.two_domains(seed)
    return DataLoader(
        TensorDataset(digits.source.pixels.to(dtype), digits.source.labels, digits.target.pixels.to(dtype)),
        batch_size=24,
        drop_last=True,
    )


def test_automatic_optimization_as_with_a_gradient_reversal_layer(program, seed):
    batches, start = some(program, seed), copy.deepcopy(program.Reader().state_dict())
    plain, _ = kinds(program)
    ours = fitted(program, program.Reader(), start, batches)
    theirs = fitted(program, plain(), start, batches)
    summed = fitted(program, plain(1.0), start, batches)

    assert distance(ours, theirs, start) < 1e-10

    assert distance(ours, summed, start) > 1e-4


def test_manual_optimization_as_the_recipe(program, seed):
    batches, start = some(program, seed), copy.deepcopy(program.Reader().state_dict())
    _, by_hand = kinds(program)
    ours = fitted(program, program.ReaderByHand(), start, batches)
    theirs = fitted(program, by_hand(by_recipe), start, batches)
    assert theirs.clipped
    assert distance(ours, theirs, start) < 1e-10
    assert distance(ours, fitted(program, by_hand(by_backward), start, batches), start) < 1e-10
    assert distance(ours, fitted(program, program.Reader(), start, batches), start) < 1e-10, "as automatically"


@pytest.mark.parametrize("kind", ["Reader", "ReaderByHand"])
def test_mixed_precision_is_nearer_to_the_plain_way_than_the_sum_is(kind, program, seed):
    torch.set_default_dtype(torch.float32)
    batches, start = some(program, seed, torch.float32), copy.deepcopy(program.Reader().state_dict())
    plain, _ = kinds(program)
    ours = fitted(program, getattr(program, kind)(), start, batches, precision="bf16-mixed")
    theirs, summed = (
        fitted(program, plain(*weight), start, batches, precision="bf16-mixed") for weight in ((), (1.0,))
    )
    # how far apart they are is no measure: Adam turns rounding into steps of full size
    assert relative_distance(ours, theirs, start) < 0.5 * relative_distance(summed, theirs, start)
