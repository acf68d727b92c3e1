"""Out to torch.distributed.checkpoint and back."""

from __future__ import annotations

import optree
import pytest
import torch
import torch.distributed.checkpoint as dcp
from full_runs import by_turns, lone, network, train

import funcfreeze as ff
from funcfreeze.checkpoint import from_dcp, to_dcp


@pytest.mark.filterwarnings("ignore")  # torch's own, about a process alone
@pytest.mark.parametrize("kind", [lone, by_turns], ids=["lone", "by turns"])
def test_there_and_back(kind, tmp_path):
    step = kind(network())
    state = train(step, step.init(), 3)
    dcp.save(to_dcp(step, state), checkpoint_id=tmp_path / "saved", no_dist=True)
    other = kind(network())
    flat = to_dcp(other, other.init())
    dcp.load(flat, checkpoint_id=tmp_path / "saved", no_dist=True)
    found = from_dcp(other, flat)
    assert all(map(torch.equal, optree.tree_leaves(found), optree.tree_leaves(state)))
    torch.manual_seed(0)
    train(other, found, 2)


def test_of_another_step():
    step = lone(network())
    flat = to_dcp(step, step.init())
    flat["params/a.weight"] = torch.zeros(1)
    flat["params/c.weight"] = flat.pop("params/b.weight")
    with pytest.raises(ValueError, match="these tensors are of another step") as error:
        from_dcp(step, flat)
    assert str(error.value).splitlines()[1:] == [
        "  - params/b.weight: the Step has it, it is not given",
        "  - params/c.weight: it is given, the Step does not have it",
        "  - params/a.weight: the Step has shape (2, 8) and torch.float64, given is (1,) and torch.float64",
    ]


def test_numbers_that_are_no_tensors_are_refused():
    def update(grads, state, params, *, step=None):
        return {path: -0.1 * grad for path, grad in grads.items()}, {**state, "count": state["count"] + 1}

    optimizer = ff.optim.Transform(lambda params: {"count": 0, "kept": {"names": ("a", None)}}, update)
    step = ff.Step(torch.nn.Linear(2, 1), lambda m, x: {"l": m(x).sum()}, {"l": "*"}, optimizer=optimizer)
    state, _ = step(step.init(), torch.ones(1, 2))
    with pytest.raises(
        TypeError, match=r"not optimizer.count \(1\), optimizer.kept.names.0 \('a'\); ff.checkpoint.save"
    ):
        to_dcp(step, state)
