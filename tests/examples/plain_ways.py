"""What people write by hand, without the library: the oracle of the examples; and how the two are compared."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from vision import make_importable

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "examples"


def example(name: str) -> ModuleType:
    """An example as a module, whose framework is there."""
    specification = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where transformers looks for the module of a class
    specification.loader.exec_module(module)
    return module


def framework(name: str) -> ModuleType:
    """A framework, also beside a torchvision of another build."""
    make_importable()
    return importlib.import_module(name)


def skip_if_by_hand(name: str) -> None:
    """Skip what needs DeepSpeed, which no extra installs, where it is not there; the others are in `test`."""
    if name == "deepspeed" and importlib.util.find_spec(name) is None:
        pytest.skip("deepspeed is in no extra, since it compiles a kernel when it first starts: tried by hand")


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


def scaled(x: Tensor, factor: float) -> Tensor:
    """The same, with its gradient multiplied: a gradient reversal layer where the factor is negative."""
    return _Scaled.apply(x, factor)


def recipe(
    model: nn.Module, entries: Iterable[tuple[Tensor, float, tuple[str, ...]]], backward: Callable[..., object]
) -> None:
    """Toggle `requires_grad` between backward passes, one for each loss, weight and the parts that it may move."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for loss, weight, allowed in entries:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name] and name.startswith(allowed))
        backward(weight * loss, retain_graph=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])


def dann(step: int, steps: int) -> float:
    """The schedule of domain-adversarial training (Ganin et al. 2016, section 5.2.2): 2 / (1 + exp(-10 p)) - 1."""
    return float(torch.tanh(torch.tensor(5.0 * step / steps, dtype=torch.float64)))


def displacement(model: nn.Module, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far every parameter has moved."""
    return {name: parameter.detach() - start[name] for name, parameter in model.named_parameters()}


def relative_distance(ours: nn.Module, theirs: nn.Module, start: Mapping[str, Tensor]) -> float:
    """The same for half precision, where single numbers say little: of the whole displacements, relative to theirs."""
    one, other = (torch.cat([*map(torch.ravel, displacement(model, start).values())]) for model in (ours, theirs))
    return float((one - other).norm() / other.norm())


def distance(ours: nn.Module, theirs: nn.Module, start: Mapping[str, Tensor]) -> float:
    """The largest difference of displacements. Trained parameters must have moved, all of them, and frozen ones not."""
    one, other = displacement(ours, start), displacement(theirs, start)
    assert one.keys() == other.keys()
    for name, parameter in ours.named_parameters():
        assert bool(one[name].abs().max() > 1e-4) == parameter.requires_grad, name
    return max(float((one[name] - other[name]).abs().max()) for name in one)
