"""Batches of all kinds, and sizes that change."""

from __future__ import annotations

import collections
import dataclasses
import enum
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from lockstep import World, program
from torch import nn


def world(losses, batch, **options):
    return World(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), losses, batch=batch, **options)


def by(read, batch, **options):
    """What `read` makes of model and batch, squared."""
    return world(lambda model, batch: {"loss": read(model, batch).square().mean()}, batch, **options)


@program(traces=1)
def a_tuple():
    return by(lambda m, b: m(b[0]) - b[1], lambda turn: (torch.randn(6, 4), torch.randn(6, 4)))


@program(traces=1)
def a_dict_with_a_string():
    return by(lambda m, b: m(b["x"]) * len(b["name"]), lambda turn: {"x": torch.randn(6, 4), "name": "abc"})


@program(traces=1)
def a_string_that_nobody_reads():
    return by(lambda m, b: m(b["x"]), lambda turn: {"x": torch.randn(6, 4), "id": f"sample-{turn}"})


@program
def a_dataclass():
    @dataclasses.dataclass
    class Batch:
        x: torch.Tensor
        y: torch.Tensor
        weight: float = 1.0

    return by(
        lambda m, b: (m(b.x) - b.y) * b.weight,
        lambda turn: Batch(torch.randn(6, 4), torch.randn(6, 4), 1.0 + turn // 2),
    )


@program(traces=1)
def a_frozen_dataclass_with_a_method():
    @dataclasses.dataclass(frozen=True)
    class Batch:
        x: torch.Tensor

        def both(self):
            return torch.cat([self.x, -self.x])

    return by(lambda m, b: m(b.both()), lambda turn: Batch(torch.randn(6, 4)))


@program(traces=1)
def a_named_tuple():
    class Batch(NamedTuple):
        x: torch.Tensor
        y: torch.Tensor

    return by(lambda m, b: m(b.x) - b.y, lambda turn: Batch(torch.randn(6, 4), torch.randn(6, 4)))


@program(traces=1)
def a_user_dict():
    return by(lambda m, b: m(b["x"]), lambda turn: collections.UserDict(x=torch.randn(6, 4)))


@program(traces=1)
def a_batch_encoding():
    from transformers import BatchEncoding

    return by(lambda m, b: m(b["x"]) + m(b.x), lambda turn: BatchEncoding({"x": torch.randn(6, 4)}))


@program(traces=1)
def a_batch_encoding_unpacked():
    from transformers import BatchEncoding

    def read(model, batch):
        return (lambda x, y: model(x) - y)(**batch)

    return by(read, lambda turn: BatchEncoding({"x": torch.randn(6, 4), "y": torch.randn(6, 4)}))


@program(traces=1)
def a_namespace():
    return by(lambda m, b: m(b.x), lambda turn: SimpleNamespace(x=torch.randn(6, 4)))


@program(traces=1)
def nested_lists():
    return by(
        lambda m, b: sum(m(x) * w for pair in b for x, w in [pair]),
        lambda turn: [[torch.randn(6, 4), 1.0], [torch.randn(6, 4), 2.0]],
    )


@program
def a_list_that_gets_longer():
    return by(lambda m, b: sum(m(x) for x in b), lambda turn: [torch.randn(6, 4) for _ in range(1 + turn)])


@program(traces=2)
def none_or_a_mask():
    return by(
        lambda m, b: m(b[0]) if b[1] is None else m(b[0]) * b[1],
        lambda turn: (torch.randn(6, 4), None if turn % 2 else torch.rand(6, 1)),
    )


@program(traces=2)
def a_bool():
    return by(lambda m, b: m(b[0]) * (2 if b[1] else 1), lambda turn: (torch.randn(6, 4), turn > 1))


@program
def an_int_that_counts():
    return by(lambda m, b: m(b["x"]) * b["epoch"], lambda turn: {"x": torch.randn(6, 4), "epoch": turn}, steps=6)


@program
def an_int_compared():
    return by(lambda m, b: m(b[0]) * (2.0 if b[1] >= 2 else 1.0), lambda turn: (torch.randn(6, 4), turn), steps=6)


@program
def a_float_that_decays():
    return by(lambda m, b: m(b[0]) * b[1], lambda turn: (torch.randn(6, 4), 0.5**turn), steps=6)


@program
def a_float_as_a_power():
    return by(lambda m, b: m(b[0]).abs() ** b[1], lambda turn: (torch.randn(6, 4), 1.0 + 0.5 * turn), steps=5)


@program
def a_float_as_a_bound():
    return by(lambda m, b: m(b[0]).clamp(-b[1], b[1]), lambda turn: (torch.randn(6, 4), 0.3 + 0.1 * turn), steps=5)


@program
def a_float_as_dropout_probability():
    return by(
        lambda m, b: torch.dropout(m(b[0]), b[1], True), lambda turn: (torch.randn(6, 4), 0.1 * (1 + turn)), steps=5
    )


@program(traces=2)
def a_task_name():
    return by(
        lambda m, b: m(b[0]) if b[1] == "a" else m(b[0]) - 1,
        lambda turn: (torch.randn(6, 4), "ab"[turn % 2]),
    )


@program(traces=2)
def an_enum_member():
    Task = enum.Enum("Task", ["ONE", "TWO"])
    return by(
        lambda m, b: m(b[0]) if b[1] is Task.ONE else m(b[0]) - 1,
        lambda turn: (torch.randn(6, 4), [Task.ONE, Task.TWO][turn % 2]),
    )


@program
def a_size_and_a_dtype():
    return by(
        lambda m, b: m(b["x"].to(b["dtype"]).reshape(b["size"])),
        lambda turn: {"x": torch.randn(24), "size": torch.Size([6, 4]), "dtype": torch.float64},
    )


@program
def a_numpy_float():
    return by(lambda m, b: m(b[0]) * b[1], lambda turn: (torch.randn(6, 4), np.float64(1.0 + turn)))


@program
def a_numpy_int():
    return by(lambda m, b: m(b[0]) * b[1], lambda turn: (torch.randn(6, 4), np.int64(1 + turn)))


@program
def a_numpy_array():
    return by(lambda m, b: m(torch.from_numpy(b)), lambda turn: np.random.randn(6, 4))


@program
def a_numpy_array_of_labels():
    return by(
        lambda m, b: m(b[0])[torch.arange(6), torch.as_tensor(b[1])],
        lambda turn: (torch.randn(6, 4), np.random.randint(0, 4, 6)),
    )


SIZES = [6, 5, 6, 3, 8, 2, 7, 4, 9, 1, 6, 12]


def sized(read, steps=12):
    return by(read, lambda turn: torch.randn(SIZES[turn], 4), steps=steps)


@program(traces=3)
def twelve_sizes():
    return sized(lambda m, x: m(x))


@program(traces=3)
def a_last_smaller_batch():
    return by(lambda m, x: m(x), lambda turn: torch.randn(3 if turn % 3 == 2 else 6, 4), steps=6)


@program(traces=3)
def divided_by_shape():
    return world(
        lambda model, x: {"loss": model(x).square().sum() / x.shape[0]},
        lambda turn: torch.randn(SIZES[turn], 4),
        steps=12,
    )


@program(traces=3)
def divided_by_len():
    return world(
        lambda model, x: {"loss": model(x).square().sum() / len(x)}, lambda turn: torch.randn(SIZES[turn], 4), steps=12
    )


@program(traces=3)
def an_arange_over_len():
    return sized(lambda m, x: m(x) * torch.arange(len(x))[:, None])


@program(traces=3)
def a_causal_mask_of_the_size():
    return sized(lambda m, x: m(torch.ones(len(x), len(x)).tril() @ x))


@program
def a_loop_over_the_batch():
    return by(lambda m, x: torch.stack([m(x[i]) for i in range(len(x))]), lambda turn: torch.randn(3 + turn, 4))


@program(traces=3)
def lengths_as_a_tensor():
    def read(model, batch):
        x, lengths = batch
        mask = torch.arange(x.shape[1])[None] < lengths[:, None]
        return model(x) * mask[..., None]

    return by(read, lambda turn: (torch.randn(2, SIZES[turn] + 1, 4), torch.tensor([1, SIZES[turn]])), steps=10)


@program(traces=3)
def the_size_as_a_metric():
    return world(
        lambda model, x: ({"loss": model(x).square().mean()}, {"n": len(x), "shape": x.shape}),
        lambda turn: torch.randn(SIZES[turn], 4),
        steps=6,
    )


@program(traces=3)
def the_count_as_an_int_in_the_batch():
    return world(
        lambda model, b: {"loss": model(b["x"]).square().sum() / b["n"]},
        lambda turn: {"x": torch.randn(SIZES[turn], 4), "n": SIZES[turn]},
        steps=12,
    )


@program(traces=3)
def halves_by_an_int():
    def read(model, x):
        half = len(x) // 2
        return torch.cat([model(x[:half]), 2 * model(x[half:])])

    return by(read, lambda turn: torch.randn(2 * SIZES[turn], 4), steps=10)
