"""Plain PyTorch training by the rules of the law, on the real module: the oracle of whole compiled steps."""

from __future__ import annotations

import copy

import torch


def recipe_run(model, losses, weights, batches, make_optimizer):
    """A copy of the model after a step on every batch, and what `losses` returned for each.

    Args:
        weights: loss -> {prefix of parameter paths: weight}.
    """
    model = copy.deepcopy(model)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    returned = []
    for turn, batch in enumerate(batches):
        torch.manual_seed(turn)
        found = losses(model, batch)
        values = found[0] if isinstance(found, tuple) else found
        optimizer.zero_grad()
        for name, loss in values.items():
            if loss is None:
                continue
            named = [
                (p, weight)
                for path, p in model.named_parameters()
                for prefix, weight in weights[name].items()
                if path.startswith(prefix)
            ]
            grads = torch.autograd.grad(loss, [p for p, _ in named], retain_graph=True, allow_unused=True)
            for (p, weight), grad in zip(named, grads, strict=True):
                if grad is not None:
                    p.grad = weight * grad if p.grad is None else p.grad + weight * grad
        optimizer.step()
        returned.append({name: loss.detach() for name, loss in values.items() if loss is not None})
    return model, returned


def step_run(step, batches, state=None):
    """The state and the metrics of a step over the same batches, with the same random numbers."""
    state = step.init() if state is None else state
    seen = []
    for turn, batch in enumerate(batches):
        torch.manual_seed(turn)
        state, metrics = step(state, batch)
        seen.append(metrics)
    return state, seen


def assert_same_displacement(state, start, model, rtol=1e-9):
    """The state moved from `start` as the model did, relative to how far that is; buffers are equal."""
    moved = 0.0
    for path, parameter in model.named_parameters():
        wanted = (parameter - start[path]).detach()
        torch.testing.assert_close(state.params[path] - start[path], wanted, rtol=rtol, atol=rtol * 1e-3, msg=path)
        moved += float(wanted.abs().sum())
    assert moved > 0
    for path, buffer in model.named_buffers():
        torch.testing.assert_close(state.buffers[path], buffer, rtol=rtol, atol=1e-12)
