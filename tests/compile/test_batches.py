"""Batches in containers of every kind: compiled steps take what eager ones do, and compile no more than for a dict."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import funcfreeze as ff
from containers import CONTAINERS, held


def make(losses, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(3, 2), "head": nn.Linear(2, 1)})
    return ff.Step(model, losses, {"cls": "*", "adv": {"encoder": -0.5}}, optimizer=ff.optim.sgd(0.1), **options)


def of(m, x, scale):
    h = m["encoder"](x)
    return {"cls": m["head"](h).square().mean(), "adv": (h * scale).mean()}


def assert_same(losses, batches, traces):
    """An eager and a compiled run over these batches agree, and that many traces were made."""
    eager, compiled = make(losses, compile=False), make(losses, compile={"backend": "aot_eager"})
    one, other = eager.init(), compiled.init()
    for batch in batches:
        one, metrics = eager(one, batch)
        other, got = compiled(other, batch)
        torch.testing.assert_close(got, metrics)
    torch.testing.assert_close(dict(other.params), dict(one.params))
    assert compiled.traces == traces


@pytest.mark.xfail(torch.__version__ < "2.13", reason="Dynamo learned `vars(...).values()` in torch 2.13", strict=True)
def test_every_kind_of_container():
    def losses(m, batch):
        x = sum(leaf for tree in batch.values() for leaf in held(tree) if isinstance(leaf, torch.Tensor))
        return of(m, x, 2.0)

    def batch():
        return {name: build(torch.randn(4, 3), torch.randn(4, 3)) for name, build in CONTAINERS.items()}

    assert_same(losses, [batch(), batch(), batch()], traces=1)


@dataclass
class Batch:
    x: torch.Tensor
    scale: float = 1.0


def test_a_number_in_a_dataclass_is_a_constant_of_the_trace():
    batches = [Batch(torch.randn(4, 3), scale) for scale in (1.0, 3.0, 1.0, 3.0)]
    assert_same(lambda m, batch: of(m, batch.x, batch.scale), batches, traces=2)


def test_the_order_of_keys_in_a_mapping_counts():
    def losses(m, batch):
        first = next(iter(batch.values()))
        return of(m, first, 1.0)

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    assert_same(losses, [UserDict(x=x, y=y), UserDict(y=y, x=x), UserDict(x=y, y=x)], traces=2)


def test_a_tokenizers_encoding():
    encoding = pytest.importorskip("transformers").BatchEncoding

    def batch(number):
        made = encoding({"x": torch.randn(4, 3), "y": torch.randn(4, 3)})
        made._encodings = [object() for _ in range(number)]  # what a fast tokenizer keeps there
        return made

    def losses(m, batch):
        return of(m, batch["x"] + batch.y, 1.0)

    given = [batch(4), batch(4), batch(5)]
    kept = [made._encodings for made in given]
    assert_same(losses, given, traces=1)
    assert all(made._encodings is before for made, before in zip(given, kept, strict=True))
