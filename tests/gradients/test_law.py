"""All engines against an oracle that shares no code with them, on random computations with random routes."""

from __future__ import annotations

import pytest

from graphs import random_graph
from laws import assert_law

GRAPHS = 300


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_random_graphs(engine, seed):
    for offset in range(GRAPHS):
        graph = random_graph(seed + offset)
        assert_law(engine, graph.losses, graph.params, graph.table)


@pytest.mark.parametrize("engine", ["routed", "toggle"])
@pytest.mark.parametrize(("foreign", "hooks"), [(True, False), (False, True), (True, True)])
def test_random_graphs_with_foreign_code_and_hooks(engine, foreign, hooks, seed):
    for offset in range(GRAPHS):
        graph = random_graph(seed + offset, foreign=foreign, hooks=hooks)
        assert_law(engine, graph.losses, graph.params, graph.table)
