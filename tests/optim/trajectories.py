"""Trajectories of parameters under a transform and under torch.optim, from the same start and the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from funcfreeze.optim import Transform, apply_updates

STEPS = 5
Gradients = Sequence[Mapping[str, Tensor]]

# Which steps touch which parameter: all, some from the first on, some but not the first, none.
TOUCHED = {"a.weight": range(STEPS), "a.bias": (0, 1, 4), "late": (2, 3, 4), "scale": (0, 3), "never": ()}
SHAPES = {"a.weight": (4, 3), "a.bias": (3,), "late": (2, 1, 2), "scale": (), "never": (3,)}


def start(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {path: torch.randn(shape, dtype=dtype, generator=generator) for path, shape in SHAPES.items()}


def gradients(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {path: torch.randn(SHAPES[path], dtype=dtype, generator=generator) for path in SHAPES if step in TOUCHED[path]}
        for step in range(STEPS)
    ]


def torch_displacements(
    optimizer: Callable[..., torch.optim.Optimizer],
    params: Mapping[str, Tensor],
    grads: Gradients,
    rates: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """How far torch.optim itself moves the parameters."""
    moving = {path: nn.Parameter(param.clone()) for path, param in params.items()}
    built = optimizer([*moving.values()])
    for step, given in enumerate(grads):
        if rates is not None:
            built.param_groups[0]["lr"] = rates[step]
        built.zero_grad(set_to_none=True)
        for path, grad in given.items():
            moving[path].grad = grad.clone()
        built.step()
    return {path: param.detach() - params[path] for path, param in moving.items()}


def pure_displacements(tx: Transform, params: Mapping[str, Tensor], grads: Gradients) -> dict[str, Tensor]:
    """How far the pure form moves them; a gradient that is not there is None at odd steps, left out at even ones."""
    now, state = dict(params), tx.init(params)
    for step, given in enumerate(grads):
        full = {path: given.get(path) for path in params} if step % 2 else given
        updates, state = tx.update(full, state, now, step=step)
        now = apply_updates(now, updates)
    return {path: now[path] - params[path] for path in params}


def in_place_displacements(tx: Transform, params: Mapping[str, Tensor], grads: Gradients) -> dict[str, Tensor]:
    """How far the in-place form moves them."""
    assert tx.in_place is not None
    now = {path: param.clone() for path, param in params.items()}
    state = tx.init(now)
    for step, given in enumerate(grads):
        state = tx.in_place(given, state, now, step=torch.tensor(step))()
    return {path: now[path] - params[path] for path in params}


def assert_close(seen: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    assert seen.keys() == expected.keys()
    for path in expected:
        torch.testing.assert_close(
            seen[path], expected[path], rtol=tolerance, atol=tolerance, msg=lambda text, path=path: f"{path}: {text}"
        )
        assert torch.isfinite(torch.view_as_real(seen[path]) if seen[path].is_complex() else seen[path]).all()
