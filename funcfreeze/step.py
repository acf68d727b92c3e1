"""One training step as a pure function: losses, routed gradients, optimizer, new state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcfreeze.functional import FunctionalModule, as_module, module_leaves, refuse_unusable
from funcfreeze.gradients import Engine, Evaluate, Routing, find_engine
from funcfreeze.loss_scale import LossScale, scale_in, unscale
from funcfreeze.optim import Transform
from funcfreeze.plan import Plan, resolve_plan
from funcfreeze.selectors import RouteError
from funcfreeze.specification import Specification, check_fits
from funcfreeze.state import Lease, State, lease_of, make_state

Losses = Callable[[Any, Any], Any]
"""`losses(model, batch)` -> a mapping name -> scalar, or that and a mapping of metrics."""


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Step:
    """A training step: `state, metrics = step(state, batch)`.

    Args:
        model: an `nn.Module`, or a mapping name -> `nn.Module` (in `losses` then `model["name"]`). It keeps its own
            tensors; the step computes with the state's.
        losses: `losses(model, batch)`, called once per step, returns a mapping loss name -> 0-d floating tensor (None:
            absent this step), or a pair of that and a mapping of metrics.
        routes: loss name -> which parameters it may update (see `Route`), or a `Plan`.
        optimizer: a `Transform` such as `optim.adamw(1e-3)`.
        engine: "routed" (the fast one), "reference" (`torch.func`) or "toggle" (the eager recipe).
        donate: whether a step reuses the storage of the state it is given, which is spent then.
        loss_scale: for float16, the factor that keeps small gradients alive (see `LossScale`). Metrics, and gradients
            as they are returned, are free of it; hooks see it.

    Attributes:
        plan: the resolved, frozen loss × parameter table; printable and comparable.
        functional: the model as a pure function.
        routing: the plan in the engines' terms.
        transform: the optimizer, bound to the model's parameters.
        specification: what a state must look like.

    Raises:
        RouteError: everything that is wrong with the routes, at once.
        TypeError, ValueError: a model whose parameters cannot be exchanged, and why.

    >>> import torch
    >>> from torch import nn
    >>> import funcfreeze as ff
    >>> _ = torch.manual_seed(0)
    >>> def losses(model, batch):
    ...     features = model["encoder"](batch)
    ...     return {"task": model["head"](features).square().mean(), "small": features.square().mean()}
    >>> model = {"encoder": nn.Linear(3, 2), "head": nn.Linear(2, 1)}
    >>> step = ff.Step(model, losses, {"task": "*", "small": {"encoder": 0.1}}, optimizer=ff.optim.sgd(0.1))
    >>> state = step.init()
    >>> state, metrics = step(state, torch.ones(4, 3))
    >>> sorted(metrics), state.step
    (['small', 'task'], tensor(1))
    >>> model = step.export(state)
    """

    model: nn.Module | Mapping[str, nn.Module]
    losses: Losses
    optimizer: Transform
    engine: str
    donate: bool
    loss_scale: LossScale | None
    plan: Plan
    functional: FunctionalModule
    routing: Routing
    transform: Transform
    specification: Specification

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        losses: Losses,
        routes: object,
        *,
        optimizer: Transform,
        engine: str = "routed",
        donate: bool = True,
        loss_scale: LossScale | None = None,
    ) -> None:
        find_engine(engine)
        if not callable(losses):
            raise TypeError(f"losses is a function losses(model, batch), got {type(losses).__name__}")
        if not isinstance(optimizer, Transform):
            raise TypeError(
                f"optimizer is a Transform such as funcfreeze.optim.adamw(1e-3), got {type(optimizer).__name__}; a "
                "torch optimizer class goes through funcfreeze.optim.from_torch"
            )
        if loss_scale is not None and not isinstance(loss_scale, LossScale):
            raise TypeError(
                f"loss_scale is a funcfreeze.LossScale, or None; got {type(loss_scale).__name__}: {loss_scale!r}"
            )
        module = as_module(model)
        refuse_unusable(module)
        leaves = module_leaves(module)
        plan = resolve_plan(routes, leaves)
        transform = optimizer if optimizer.bind is None else optimizer.bind(leaves)
        if loss_scale is not None:
            transform = loss_scale.around(transform)
        functional = FunctionalModule.of(module)
        functional.refuse_accumulation_hooks()
        values = {
            "model": model,
            "losses": losses,
            "optimizer": optimizer,
            "engine": engine,
            "donate": donate,
            "loss_scale": loss_scale,
            "plan": plan,
            "functional": functional,
            "routing": Routing.of(plan),
            "transform": transform,
            "specification": Specification.of(functional, plan, transform),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Step({', '.join(self.plan.losses)}; engine={self.engine!r}, donate={self.donate})"

    def init(self, copy: bool = True) -> State:
        """A fresh state from the module's present values, with a new optimizer state and step 0.

        Parameters that no loss may update are shared with the module, never copied, and never written to.

        Args:
            copy: False adopts the module's storage for all the rest too, which steps then overwrite.
        """
        with torch.inference_mode(False):
            params = {path: tensor.detach() for path, tensor in self.functional.present_parameters().items()}
            buffers = {path: tensor.detach() for path, tensor in self.functional.present_buffers().items()}
            routed = self.plan.routed
            if copy:
                params |= {path: params[path].clone() for path in routed}
                buffers = {path: tensor.clone() for path, tensor in buffers.items()}
            borrowed = params.keys() - set(routed) if copy else set()
            optimizer = self.transform.init({path: params[path] for path in routed})
            step = torch.zeros((), dtype=torch.int64, device=params[routed[0]].device)
            return make_state((params, buffers, optimizer, step), Lease(borrowed=borrowed), self.specification)

    def __call__(self, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        """Take one step.

        Returns:
            The new state, and the metrics: every present loss by name (detached, 0-d, unweighted), and what `losses`
            returned beside them (detached).

        Raises:
            RuntimeError: the state is spent, or the forward changed a parameter.
            ValueError: the state is of another model.
            RouteError: what `losses` returned does not fit the declaration.

            Whatever is raised, module and state are as they were.
        """
        check_fits(state, self.specification)
        lease_of(state).gradients = {}
        outcome = self._engine.merged(
            self._evaluate(state, batch), self._params(state), self.routing, state.step, self._seed(state)
        )
        metrics, buffers = outcome.rest
        gradients = self._unscaled(state, _touched(self.plan.paths, outcome.gradients))
        _check_names(outcome.losses, metrics)
        with torch.inference_mode(False), torch.no_grad():
            kept = {**outcome.losses, **_not_sharing(metrics, self._params(state))}
            return self._update(state, gradients, buffers), kept

    def gradients(self, state: State, batch: Any) -> dict[str, Tensor]:
        """The merged gradients by path, holding only touched parameters. Updates nothing, buffers included.

        They are free of a loss scale; those of float16 parameters are in float32 then, or small ones would be lost.
        """
        check_fits(state, self.specification)
        outcome = self._engine.merged(
            self._evaluate(state, batch), self._params(state), self.routing, state.step, self._seed(state)
        )
        return self._unscaled(state, _touched(self.plan.paths, outcome.gradients))

    def per_loss_gradients(self, state: State, batch: Any) -> dict[str, dict[str, Tensor]]:
        """Each loss's gradients by path, weights applied; summed over the losses they are `gradients`."""
        check_fits(state, self.specification)
        outcome = self._engine.separate(
            self._evaluate(state, batch), self._params(state), self.routing, state.step, self._seed(state)
        )
        return {
            loss: self._unscaled(state, _touched(self.plan.paths, row))
            for loss, row in zip(self.plan.losses, outcome.gradients, strict=True)
        }

    def call(self, state: State, f: Callable[..., Any], *args: Any) -> Any:
        """`f(model, *args)` with the state's tensors in the model: evaluation, acting, sampling.

        No gradients are recorded. Nothing changes: buffers and train/eval flags are as before afterwards. What `f`
        returns may share memory with the state, which a later donating step overwrites: clone what must last.
        """
        check_fits(state, self.specification)
        buffers = {path: tensor.clone() for path, tensor in state.buffers.items()}
        with torch.no_grad(), _flags_kept(self.functional.module):
            result, _ = self.functional.call(lambda model: f(model, *args), state.params, buffers)
        return result

    def export(self, state: State) -> nn.Module | Mapping[str, nn.Module]:
        """Write the state's parameters and buffers into the model, and return it. The state stays usable."""
        check_fits(state, self.specification)
        self.functional.write(state.params, state.buffers)
        return self.model

    @property
    def module(self) -> nn.Module:
        """The model as one module; a mapping of modules is held by an `nn.ModuleDict`."""
        return self.functional.module

    @property
    def _engine(self) -> Engine:
        return find_engine(self.engine)

    def _seed(self, state: State) -> Tensor | None:
        """The cotangent that every loss starts with; None is one."""
        return None if self.loss_scale is None else scale_in(state.optimizer)

    def _unscaled(self, state: State, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return gradients if self.loss_scale is None else unscale(gradients, scale_in(state.optimizer))

    def _params(self, state: State) -> list[Tensor]:
        return [state.params[path] for path in self.plan.paths]

    def _evaluate(self, state: State, batch: Any) -> Evaluate:
        """The forward as engines call it: parameters -> (losses, (metrics, buffers after the forward)).

        Buffers are cloned for every forward, so that an exception leaves the state's as they were.
        """
        hooks = self.functional.parameter_hooks()

        def evaluate(leaves: list[Tensor]) -> tuple[Any, Any]:
            params = dict(zip(self.plan.paths, leaves, strict=True))
            for path, hook in hooks:
                if params[path].requires_grad:
                    params[path].register_hook(hook)  # type: ignore[no-untyped-call]
            buffers = {path: tensor.clone() for path, tensor in state.buffers.items()}
            returned, after = self.functional.call(lambda model: self.losses(model, batch), params, buffers)
            losses, metrics = _split(returned)
            return losses, (metrics, after)

        return evaluate

    def _update(self, state: State, gradients: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> State:
        """The new state. Everything that can fail comes before the first write."""
        lease, routed = lease_of(state), set(self.plan.routed)
        copied = lease.borrowed & gradients.keys() if self.donate else routed
        params = {path: p.clone() if path in copied else p.detach() for path, p in state.params.items()}
        owned = self.donate and not lease.borrowed_optimizer
        optimizer = state.optimizer if owned else optree.tree_map(_copy, state.optimizer)
        step = state.step + 1
        own = {path: params[path] for path in self.plan.routed}
        optimizer = _optimize(self.transform, gradients, optimizer, own, state.step)
        if self.donate:
            lease.spent = True
        else:
            lease.borrowed |= params.keys() - routed  # both states hold these now: neither may write to them
        kept = {path: gradient for path, gradient in gradients.items() if gradient.device.type == "cpu"}
        renewed = Lease(borrowed=lease.borrowed - copied, gradients=kept)
        return make_state((params, buffers, optimizer, step), renewed, self.specification)


def _optimize(
    transform: Transform, gradients: Mapping[str, Tensor], state: Any, params: Mapping[str, Tensor], step: Tensor
) -> Any:
    """Overwrite the parameters, and return the optimizer's new state."""
    if transform.in_place is not None:
        commit = transform.in_place(gradients, state, params, step=step)
        return commit()
    updates, state = transform.update(gradients, state, params, step=step)
    present = {path: update for path, update in updates.items() if update is not None}
    problems = [
        f"{path}: the update has shape {tuple(update.shape)}, the parameter "
        + (f"has shape {tuple(params[path].shape)}" if path in params else "is not among those that may be updated")
        for path, update in present.items()
        if path not in params or update.shape != params[path].shape
    ]
    if problems:
        raise ValueError("\n".join(["the optimizer's updates do not fit the parameters:", *problems]))
    for path, update in present.items():
        params[path].add_(update)
    return state


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


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


def _not_sharing(metrics: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """The metrics, with those that share memory with a parameter copied: the step is about to overwrite parameters."""
    if not metrics:
        return {}
    memories = {param.untyped_storage().data_ptr() for param in params}

    def copied(metric: Any) -> Any:
        shares = isinstance(metric, Tensor) and metric.layout == torch.strided
        return metric.clone() if shares and metric.untyped_storage().data_ptr() in memories else metric

    return {name: optree.tree_map(copied, metric, none_is_leaf=True) for name, metric in metrics.items()}


def _check_names(losses: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> None:
    if clash := losses.keys() & metrics.keys():
        raise RouteError(
            f"{', '.join(sorted(clash))}: both a loss and a metric have this name, and the step returns both; rename "
            "the metric"
        )


@contextmanager
def _flags_kept(module: nn.Module) -> Iterator[None]:
    """Leave every module in train or eval mode as it was."""
    flags = [(inner, inner.training) for inner in module.modules()]
    try:
        yield
    finally:
        for inner, training in flags:
            inner.training = training
