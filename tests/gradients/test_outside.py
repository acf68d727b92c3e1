"""What a forward's tensors depend on outside of it."""

from __future__ import annotations

import pytest
import torch

from funcfreeze.gradients.graph import gradient_edge, read_graph
from funcfreeze.gradients.outside import Outside, ends_outside


@pytest.fixture
def leaves():
    """A leaf copy, and a stand-in that is a view of something that requires grad."""
    return [torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True).view(3)]


def test_own_leaves_are_inside_and_what_they_stand_in_for_is_not(leaves):
    own, connected = leaves
    reached = Outside(leaves).reached_from
    assert not reached(torch.randn(3))
    assert not reached(own)
    assert not reached((own * torch.randn(3)).sum())
    assert reached(connected)
    assert reached((own * connected).sin().sum())


def test_a_closure_is_outside_at_whatever_depth(leaves):
    own, _ = leaves
    constant = torch.randn(3, requires_grad=True)
    h = own * 2
    for _ in range(20_000):
        h = h * 1.0001
    reached = Outside(leaves).reached_from
    assert not reached(h)
    assert reached(h + constant)
    assert reached(constant)
    assert not reached(h.sum()), "what was found before holds"


def test_known_nodes_are_not_walked_again(leaves):
    own, connected = leaves
    h = own * connected
    assert Outside(leaves).reached_from(h)
    assert not Outside(leaves, [h.grad_fn]).reached_from(h.sum()), "it believes what it is told"


def test_losses_end_outside_in_closures_and_in_connected_leaves(leaves):
    def ends(loss):
        return ends_outside(read_graph([gradient_edge(loss)], leaves, ())[0], frozenset({1}))

    own, connected = leaves
    assert not ends(own.sum())
    assert ends((own * connected).sum())
    assert ends((own * torch.randn(3, requires_grad=True)).sum())


def test_the_walk_ends_where_a_stand_in_does(leaves):
    """The graph above a parameter that was computed is not the forward's."""
    long = torch.randn(3, requires_grad=True)
    for _ in range(50):
        long = long.sin()
    stand_in = long.view(3)
    graph, nodes = read_graph([gradient_edge((stand_in * 2).sum())], [stand_in], ())
    assert len(nodes) == 3
    assert graph.leaves == (2, 0)
