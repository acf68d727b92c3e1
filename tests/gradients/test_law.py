"""All engines against an oracle that shares no code with them, on random computations with random routes."""

from __future__ import annotations

import pytest

from graphs import NanForZero, random_graph
from laws import assert_law
from oracle import oracle

GRAPHS = 100
PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))]
"""A third of the random graphs; the others differ in nothing but the seed."""


def divides_by_nothing(graph):
    """Whether a Function that divides by a cotangent's size gets one that is zero, or is but for rounding."""
    NanForZero.sizes.clear()
    oracle(graph.losses, graph.params, graph.table)
    return any(size < 1e-9 for size in NanForZero.sizes)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_random_graphs(engine, part, seed):
    for offset in range(part * GRAPHS, (part + 1) * GRAPHS):
        graph = random_graph(seed + offset)
        assert_law(engine, graph.losses, graph.params, graph.table)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("engine", ["routed", "toggle"])
@pytest.mark.parametrize(("foreign", "hooks"), [(True, False), (False, True), (True, True)])
def test_random_graphs_with_foreign_code_and_hooks(engine, foreign, hooks, part, seed):
    for offset in range(part * GRAPHS, (part + 1) * GRAPHS):
        graph = random_graph(seed + offset, foreign=foreign, hooks=hooks)
        if foreign and divides_by_nothing(graph):
            continue  # then a sum of losses may be exactly zero where each loss alone is not, or the other way round
        # Functions that multiply, hooks that clamp, normalisation of nearly equal numbers: ill-conditioned, not wrong
        assert_law(engine, graph.losses, graph.params, graph.table, tolerance=1e-7)
