"""The law as named assertions, for any engine and any computation."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import funcfreeze as ff
from funcfreeze.declare.plan import resolve_plan
from funcfreeze.declare.selectors import Leaf
from funcfreeze.gradients import ENGINES, Routing
from funcfreeze.loops.differentiate import grad_and_value
from oracle import Table, oracle, summed


def assert_gradients_equal(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-12, terms: Sequence[Any] = ()
) -> None:
    """Equal touched sets, and equal gradients relative to the size of what they are the sum of."""
    assert set(got) == set(wanted), f"touched sets differ in {sorted(set(got) ^ set(wanted))}"
    for path, gradient in wanted.items():
        scale = 1 + sum(_size(term[path]) for term in (*terms, wanted) if path in term)
        torch.testing.assert_close(
            _dense(got[path]), _dense(gradient), rtol=tolerance, atol=tolerance * scale, equal_nan=True
        )


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _size(tensor: Tensor) -> float:
    return float(_dense(tensor).detach().abs().nan_to_num().max()) if tensor.numel() else 0.0


def assert_law(engine: str, losses: Any, params: Mapping[str, Tensor], table: Table, tolerance: float = 1e-12) -> None:
    """An engine's merged and separate gradients, and its losses, are the oracle's."""
    apart = oracle(losses, params, table)
    grads, values = grad_and_value(losses, table, engine=engine)(dict(params))
    assert_gradients_equal(without_none(grads), summed(apart), tolerance, list(apart.values()))
    expected = losses({path: tensor.detach().clone().requires_grad_() for path, tensor in params.items()})
    for name, value in expected.items():
        if value is not None:
            torch.testing.assert_close(values[name], value.detach())
    for name, row in separate(engine, losses, params, table).items():
        assert_gradients_equal(row, apart[name], tolerance)


def separate(engine: str, losses: Any, params: Mapping[str, Tensor], table: Table) -> dict[str, dict[str, Tensor]]:
    """An engine's gradients of each loss apart."""
    routing = Routing.of(resolve_plan(table, [Leaf((path,), tensor) for path, tensor in params.items()]))
    outcome = ENGINES[engine].separate(
        lambda leaves: (losses(dict(zip(params, leaves, strict=True))), None), list(params.values()), routing, None
    )
    rows = (without_none(dict(zip(params, row, strict=True))) for row in outcome.gradients)
    return dict(zip(routing.losses, rows, strict=True))


def without_none(gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Only the touched parameters."""
    return {path: gradient for path, gradient in gradients.items() if gradient is not None}


def assert_step_law(
    model: torch.nn.Module, losses: Any, routes: Any, batch: Any, *, engine: str = "routed", tolerance: float = 1e-12
) -> dict[str, Tensor]:
    """A Step's gradients, merged and apart, are those of `torch.autograd.grad` on a copy of the real module.

    Buffers come out of a step as out of one eager forward. Returns the gradients.
    """
    step = ff.Step(model, losses, routes, optimizer=ff.optim.sgd(0.1), engine=engine)
    state = step.init()
    eager = copy.deepcopy(step.module)
    torch.manual_seed(1)
    returned = losses(eager, batch)
    values = returned[0] if isinstance(returned, tuple) else returned
    named = dict(eager.named_parameters())
    table = {
        name: {row.path: sum(row.weights[name]) for row in step.plan.rows if name in row.weights}
        for name in step.plan.losses
    }
    apart = {}
    for name, row in table.items():
        apart[name] = {}
        if values[name] is not None and values[name].requires_grad:
            found = torch.autograd.grad(
                values[name], [named[path] for path in row], retain_graph=True, allow_unused=True
            )
            pairs = zip(row.items(), found, strict=True)
            apart[name] = {path: weight * gradient for (path, weight), gradient in pairs if gradient is not None}
    torch.manual_seed(1)
    gradients = step.gradients(state, batch)
    assert_gradients_equal(gradients, summed(apart), tolerance)
    torch.manual_seed(1)
    for name, row in step.per_loss_gradients(state, batch).items():
        assert_gradients_equal(row, apart[name], tolerance)
    torch.manual_seed(1)
    after, metrics = step(state, batch)
    for name, value in values.items():
        if value is not None:
            torch.testing.assert_close(metrics[name], value.detach())
    for path, buffer in eager.named_buffers():
        torch.testing.assert_close(after.buffers[path], buffer)
    return gradients
