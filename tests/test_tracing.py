"""Who runs code for its result, and who to write down what it does."""

from __future__ import annotations

import torch

from funcfreeze.tracing import is_traced


def test_who_is_tracing():
    assert not is_traced(torch.ones(1))
    seen = []

    @torch._dynamo.nonstrict_trace
    def looked_into(x):
        seen.append(is_traced(x))
        return x * 2

    torch.compile(lambda x: looked_into(x) + is_traced(x), backend="aot_eager", fullgraph=True)(torch.ones(1))
    assert seen
    assert all(seen)
