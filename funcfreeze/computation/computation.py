"""What a step computes, on plain tensors: losses and merged gradients, then the update. Eager and traced alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funcfreeze.computation.loss_scale import LossScale, scale_in, unscale
from funcfreeze.declare.plan import Plan
from funcfreeze.declare.selectors import RouteError
from funcfreeze.gradients import Engine, Evaluate, Routing
from funcfreeze.model.functional import FunctionalModule
from funcfreeze.optim import Transform
from funcfreeze.optim.transform import apart

Losses = Callable[[Any, Any], Any]
"""`losses(model, batch)` -> a mapping name -> scalar, or that and a mapping of metrics."""


@dataclass(frozen=True)
class Computed:
    """What one forward and its backward gave.

    Attributes:
        gradients: path -> merged gradient, touched parameters only.
        losses: every present loss by name, detached and unweighted.
        metrics: what `losses` returned beside them, detached.
        buffers: every buffer as the forward left it.
    """

    gradients: dict[str, Tensor]
    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Any]
    buffers: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Computation:
    """The user's losses over a model, differentiated by an engine and handed to an optimizer."""

    functional: FunctionalModule
    losses: Losses
    plan: Plan
    routing: Routing
    engine: Engine
    transform: Transform
    loss_scale: LossScale | None

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """The functions that a step calls: the user's losses, schedules of weights, and the optimizer's."""
        weights = {id(weight): weight for terms in self.routing.terms for weight in terms if callable(weight)}
        optimizer = [f for f in (self.transform.update, self.transform.in_place) if f is not None]
        return [self.losses, *weights.values(), *optimizer]

    def gradients(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: Any, step: Tensor, batch: Any
    ) -> Computed:
        """The merged gradients and all that the forward gives. Buffers are cloned for it, not written to.

        Raises:
            RouteError: a loss and a metric have one name, or what `losses` returned does not fit the declaration.
        """
        with ExitStack() as holding, torch.no_grad():  # whatever requires grad around a step, it carries no graph
            evaluate = self._evaluate(buffers, batch, holding)
            leaves = [params[path] for path in self.plan.paths]
            outcome = self.engine.merged(evaluate, leaves, self.routing, step, self._seed(optimizer))
        metrics, after = outcome.rest
        _check_names(outcome.losses, metrics)
        gradients = self._unscaled(_touched(self.plan.paths, outcome.gradients), optimizer)
        return Computed(gradients, outcome.losses, metrics, after)

    def per_loss_gradients(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: Any, step: Tensor, batch: Any
    ) -> dict[str, dict[str, Tensor]]:
        """Each loss's weighted gradients by path, touched parameters only."""
        with ExitStack() as holding, torch.no_grad():
            evaluate = self._evaluate(buffers, batch, holding)
            leaves = [params[path] for path in self.plan.paths]
            outcome = self.engine.separate(evaluate, leaves, self.routing, step, self._seed(optimizer))
        rows = zip(self.plan.losses, outcome.gradients, strict=True)
        return {loss: self._unscaled(_touched(self.plan.paths, row), optimizer) for loss, row in rows}

    def optimize(
        self, gradients: Mapping[str, Tensor], optimizer: Any, params: Mapping[str, Tensor], step: Tensor
    ) -> Any:
        """Overwrite the parameters that have a gradient, and return the optimizer's new state.

        Everything that can fail comes before the first write.

        Args:
            gradients: by path, touched parameters only.
            optimizer: the optimizer's state, which may be overwritten.
            params: path -> tensor, at least all routed parameters.
            step: the number of steps taken so far, 0-d int64.
        """
        own = {path: params[path] for path in self.plan.routed}
        if self.transform.in_place is not None:
            commit = self.transform.in_place(gradients, optimizer, own, step=step)
            return commit()
        updates, optimizer = self.transform.update(gradients, optimizer, own, step=step)
        present = {path: update for path, update in updates.items() if update is not None}
        problems = [
            f"{path}: the update has shape {tuple(update.shape)}, the parameter "
            + (f"has shape {tuple(own[path].shape)}" if path in own else "is not among those that may be updated")
            for path, update in present.items()
            if path not in own or update.shape != own[path].shape
        ]
        if problems:
            raise ValueError("\n".join(["the optimizer's updates do not fit the parameters:", *problems]))
        for path, update in apart(present, own.values()).items():
            own[path].add_(update)
        return optimizer

    def _seed(self, optimizer: Any) -> Tensor | None:
        """The cotangent that every loss starts with; None is one."""
        return None if self.loss_scale is None else scale_in(optimizer)

    def _unscaled(self, gradients: dict[str, Tensor], optimizer: Any) -> dict[str, Tensor]:
        return gradients if self.loss_scale is None else unscale(gradients, scale_in(optimizer))

    def _evaluate(self, buffers: Mapping[str, Tensor], batch: Any, holding: ExitStack) -> Evaluate:
        """The forward as engines call it: parameters -> (losses, (metrics, buffers after the forward)).

        Buffers are cloned for every forward, so that an exception leaves the given ones as they were. The module holds
        the parameters until the stack is closed, after the backward. What that runs of the module once more (activation
        checkpointing) finds the buffers as the forward left them, and updates only copies.
        """
        hooks = self.functional.parameter_hooks()

        def evaluate(leaves: list[Tensor]) -> tuple[Any, Any]:
            params = dict(zip(self.plan.paths, leaves, strict=True))
            for path, hook in hooks:
                if params[path].requires_grad:
                    params[path].register_hook(hook)  # type: ignore[no-untyped-call]
            cloned = {path: tensor.clone() for path, tensor in buffers.items()}
            versions = {path: tensor._version for path, tensor in params.items()}
            holding.enter_context(self.functional.holding(params, cloned))
            losses, metrics = _split(self.losses(self.functional.module, batch))
            after = self.functional.buffers_after(params, versions)
            self.functional.hold_copies(after)
            return losses, (metrics, after)

        return evaluate


def not_sharing(metrics: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """The metrics, with those that share memory with a parameter copied: the step is about to overwrite parameters."""
    if not metrics:
        return {}
    memories = {param.untyped_storage().data_ptr() for param in params}

    def copied(metric: Any) -> Any:
        shares = isinstance(metric, Tensor) and metric.layout == torch.strided
        return metric.clone() if shares and metric.untyped_storage().data_ptr() in memories else metric

    return {name: optree.tree_map(copied, metric, none_is_leaf=True) for name, metric in metrics.items()}


def _touched(paths: Sequence[str], gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {path: gradient for path, gradient in zip(paths, gradients, strict=True) if gradient is not None}


def _split(returned: Any) -> tuple[Any, Mapping[str, Any]]:
    """What `losses` returned as losses and metrics."""
    if not isinstance(returned, tuple):
        return returned, {}
    if len(returned) != 2 or not isinstance(returned[1], Mapping):
        shown = ", ".join(type(part).__name__ for part in returned)
        raise TypeError(
            f"`losses` returns a mapping of losses, or a pair of that and a mapping of metrics; got ({shown})"
        )
    return returned


def _check_names(losses: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> None:
    if clash := losses.keys() & metrics.keys():
        raise RouteError(
            f"{', '.join(sorted(clash))}: both a loss and a metric have this name, and the step returns both; rename "
            "the metric"
        )
