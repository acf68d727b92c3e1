"""One training step as a pure function: losses, routed gradients, optimizer, new state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcfreeze.compile import CompiledStep, resolve
from funcfreeze.compile.layout import Listed
from funcfreeze.computation.back_door import refuse_late_writes, refuse_writes
from funcfreeze.computation.computation import Computation, Computed, not_sharing
from funcfreeze.computation.evaluation import Evaluation, Losses
from funcfreeze.computation.loss_scale import LossScale
from funcfreeze.computation.specification import Specification, check_fits
from funcfreeze.computation.state import Lease, State, lease_of, listing_of, make_state
from funcfreeze.declare.plan import Plan, chosen, resolve_plan
from funcfreeze.declare.routes import Selection
from funcfreeze.gradients import Routing, find_engine
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.model.acceptance import as_module, refuse_unusable
from funcfreeze.model.attributes import attributes_kept, flags_kept
from funcfreeze.model.functional import FunctionalModule, marks_of
from funcfreeze.model.memory import memory_of
from funcfreeze.model.sites import module_leaves
from funcfreeze.model.ties import tied
from funcfreeze.optim import Transform


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Step:
    """A training step: `state, metrics = step(state, batch)`.

    Args:
        model: an `nn.Module`, or a mapping name -> `nn.Module` (in `losses` then `model["name"]`). It keeps its own
            tensors; the step computes with the state's.
        losses: `losses(model, batch)`, called once per step, returns a mapping loss name -> 0-d floating tensor (None:
            absent this step; a number, or a tensor that does not require grad, is an error), or a pair of that and a
            mapping of metrics.
        routes: loss name -> which parameters it may update (see `Route`), or a `Plan`.
        optimizer: a `Transform` such as `optim.adamw(1e-3)`.
        differentiable: a selector, or a list of them: parameters that no loss may update and that `losses` itself
            differentiates at, as with `torch.autograd.grad` for an adaptive weight. Others without a route are
            constants in the forward, for which nothing is kept.
        engine: "routed" (the fast one), "reference" (`torch.func`) or "toggle" (the eager recipe).
        compile: whether the whole step is one compiled graph: None (compiled on CUDA, eager elsewhere), True, False, or
            a mapping of `torch.compile`'s `backend`, `mode`, `options` and `dynamic`. The routed engine only.
        donate: whether a step reuses the storage of the state it is given, which is spent then.
        loss_scale: for float16, the factor that keeps small gradients alive (see `LossScale`). Metrics, and gradients
            as they are returned, are free of it; hooks see it.

    Attributes:
        plan: the resolved, frozen loss × parameter table; printable and comparable.
        computation: what a step computes, on plain tensors.
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
    compile: object
    donate: bool
    loss_scale: LossScale | None
    differentiable: Selection | None
    plan: Plan
    computation: Computation
    specification: Specification
    compiled: CompiledStep | None

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        losses: Losses,
        routes: object,
        *,
        optimizer: Transform,
        engine: str = "routed",
        compile: bool | Mapping[str, Any] | None = None,
        donate: bool = True,
        loss_scale: LossScale | None = None,
        differentiable: Selection | None = None,
    ) -> None:
        computing = find_engine(engine)
        if not callable(losses):
            raise TypeError(f"losses is a function losses(model, batch), got {type(losses).__name__}")
        if not isinstance(optimizer, Transform):
            raise TypeError(
                f"optimizer is a Transform such as funcfreeze.optim.adamw(1e-3) (called), got "
                f"{type(optimizer).__name__}; a torch optimizer class goes through funcfreeze.optim.from_torch, as in "
                "from_torch(torch.optim.RMSprop, lr=1e-3)"
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
        routing = Routing.of(plan, chosen(differentiable, leaves, "differentiable"))
        functional = FunctionalModule.of(module)
        functional.refuse_accumulation_hooks()
        options = resolve(compile if engine == "routed" or compile is not None else False, module.parameters())
        if options is not None and engine != "routed":
            raise ValueError(f"only the routed engine is compiled; use compile=False with engine={engine!r}")
        computation = Computation(Evaluation(functional, losses, plan), routing, computing, transform, loss_scale)
        values = {
            "model": model,
            "losses": losses,
            "optimizer": optimizer,
            "engine": engine,
            "compile": compile,
            "donate": donate,
            "loss_scale": loss_scale,
            "differentiable": differentiable,
            "plan": plan,
            "computation": computation,
            "specification": Specification.of(functional, plan, transform),
            "compiled": None if options is None else CompiledStep(computation, options, donate),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Step({', '.join(self.plan.losses)}; engine={self.engine!r}, donate={self.donate})"

    def init(self, copy: bool = True) -> State:
        """A fresh state from the module's present values, with a new optimizer state and step 0.

        Parameters that no loss may update are shared with the module, not copied. A step writes to them only if
        `losses` does: to copies, unless that begins after the step's first call (see `__call__`).

        Args:
            copy: False adopts the module's storage for all the rest too, which steps then overwrite.
        """
        if not isinstance(copy, bool):
            raise TypeError(
                f"init(copy=...) is True or False, got {type(copy).__name__}; a batch is for the step itself"
            )
        with torch.inference_mode(False):
            params = {path: tensor.detach() for path, tensor in self.functional.present_parameters().items()}
            buffers = {path: tensor.detach() for path, tensor in self.functional.present_buffers().items()}
            routed = self.plan.routed
            if copy:
                params |= {path: params[path].clone() for path in routed}
                buffers = {path: tensor.clone() for path, tensor in buffers.items()}
            borrowed = params.keys() - set(routed) if copy else set()
            optimizer = _apart(self.transform.init({path: params[path] for path in routed}), params)
            step = torch.zeros((), dtype=torch.int64, device=params[routed[0]].device)
            fields = self.specification.named((params, buffers, optimizer, step))
            return make_state(fields, Lease(borrowed=borrowed), self.specification)

    def __call__(self, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        """Take one step.

        Returns:
            The new state, and the metrics: every present loss by name (detached, 0-d, unweighted), and what `losses`
            returned beside them: detached and apart from the state, in containers of the same types (dicts, lists,
            tuples, dataclasses, mappings of any kind). An object that is no container is returned as it is.

        Raises:
            RuntimeError: the state is spent, or the forward changed a parameter.
            ValueError: the state is of another model or optimizer. Several Steps may share a State if their optimizers
                are of one structure; rates and other numbers may differ.
            RouteError: what `losses` returned does not fit the declaration.
            TypeError: a metric is an object that is no container and holds a tensor of the graph, or a parameter's
                memory.

            Whatever is raised, the tensors of module and state are as they were, but for two cases. What `losses`
            writes to a parameter for the first time after the step's first call is in the memory of the state already,
            which frozen parameters share with the module and other states. And compiled code that fails when it runs,
            at an index out of bounds, may have moved some parameters where torch's fused kernels do not make the
            update: under transforms that are not of `funcfreeze.optim`, or that keep their state in another dtype.
        """
        state = check_fits(state, self.specification)
        lease_of(state).gradients = ()
        if self.compiled is not None:
            return self._compiled_step(self.compiled, state, batch)
        return self._eager_step(state, self.computation.gradients(*state.fields, batch))

    def gradients(self, state: State, batch: Any) -> dict[str, Tensor]:
        """The merged gradients by path, holding only touched parameters.

        Updates nothing: buffers and the modules' Python attributes are as before afterwards, too. Any name of a tied
        parameter is a key. They are free of a loss scale; those of float16 parameters are in float32 then, or small
        ones would be lost. Always computed eagerly, also by a compiled step.
        """
        state = check_fits(state, self.specification)
        with self.functional.alone, attributes_kept(self.module):
            gradients = self.computation.gradients(*state.fields, batch).gradients
        return tied(gradients, self.specification.tied_params)

    def per_loss_gradients(self, state: State, batch: Any) -> dict[str, dict[str, Tensor]]:
        """Each loss's gradients by path, weights applied; summed over the losses they are `gradients`."""
        state = check_fits(state, self.specification)
        with self.functional.alone, attributes_kept(self.module):
            apart = self.computation.per_loss_gradients(*state.fields, batch)
        return {loss: tied(row, self.specification.tied_params) for loss, row in apart.items()}

    def call(self, state: State, f: Callable[..., Any], *args: Any) -> Any:
        """`f(model, *args)` with the state's tensors in the model: evaluation, acting, sampling.

        No gradients are recorded. Nothing changes: buffers and train/eval flags are as before afterwards, and `f` may
        only read parameters (an error, where torch counts the write; one through `.data` goes unseen). What `f` returns
        may share memory with the state, which a later donating step overwrites: clone what must last.
        """
        check_fits(state, self.specification)
        buffers = {path: tensor.clone() for path, tensor in state.buffers.items()}
        leaves = self.computation.evaluation.leaves(state.params)
        params = {path: leaf.detach() for path, leaf in zip(self.plan.paths, leaves, strict=True)}
        with torch.no_grad(), self.functional.holding(params, buffers), flags_kept(self.module):
            marks = marks_of(params)
            result = f(self.module, *args)
            refuse_writes(params, marks, self.computation.evaluation.seen.written)
            self.functional.left(params, marks, self.computation.evaluation.seen.written)
        return result

    def export(self, state: State) -> nn.Module | Mapping[str, nn.Module]:
        """Write the state's parameters and buffers into the model, and return it. The state stays usable."""
        check_fits(state, self.specification)
        self.functional.write(state.params, state.buffers)
        return self.model

    @property
    def functional(self) -> FunctionalModule:
        """The model as a pure function."""
        return self.computation.evaluation.functional

    @property
    def routing(self) -> Routing:
        """The plan in the engines' terms."""
        return self.computation.routing

    @property
    def transform(self) -> Transform:
        """The optimizer, bound to the model's parameters."""
        return self.computation.transform

    @property
    def traces(self) -> int:
        """How many times the step has been traced and compiled so far; 0 for an eager one."""
        return 0 if self.compiled is None else self.compiled.traces

    @property
    def module(self) -> nn.Module:
        """The model as one module; a mapping of modules is held by an `nn.ModuleDict`."""
        return self.functional.module

    def _compiled_step(self, compiled: CompiledStep, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        """The same in one graph, which overwrites the tensors of the state or copies of them."""
        lease = lease_of(state)
        listed = listing_of(state)
        with grad_mode(False):
            if isinstance(listed, Listed) and self.donate and self._owns(lease):
                params, buffers, optimizer, step = state.fields
            else:
                params, buffers, optimizer, step = self._owned(state)
                listed = Listed.of(params, buffers, optimizer, step)
            metrics, run = compiled(listed, batch)
            step.add_(1)
        unrouted = self.computation.evaluation.unrouted
        new = {path: value for path, value in run.params.items() if path in lease.borrowed or not self.donate}
        for path in run.params.keys() - new.keys():
            params[path].copy_(run.params[path])
        if self.donate:
            lease.spent = True
        else:
            lease.borrowed |= unrouted
        renewed = Lease(borrowed=(lease.borrowed & unrouted) - new.keys(), gradients=run.gradients)
        is_in_place = run.optimizer is None and not run.buffers and not new
        fields = (
            {**params, **new} if new else params,
            {**buffers, **run.buffers} if run.buffers else buffers,
            optimizer if run.optimizer is None else run.optimizer,
            step,
        )
        after = make_state(
            self.specification.named(fields), renewed, self.specification, listed if is_in_place else None
        )
        return after, metrics

    def _owns(self, lease: Lease) -> bool:
        """Whether all that a step overwrites may be overwritten."""
        return not lease.borrowed_optimizer and lease.borrowed <= self.computation.evaluation.unrouted

    def _owned(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, Tensor]:
        """The state's fields, copied where somebody else may hold them, or where two of them share their memory."""
        lease, routed = lease_of(state), set(self.plan.routed)
        copied = lease.borrowed & routed if self.donate else routed
        memories: set[int] = set()

        def mine(tensor: Tensor, copy: bool) -> Tensor:
            if tensor.layout is not torch.strided:
                return tensor
            memory = tensor.untyped_storage().data_ptr()
            shared = memory in memories and tensor.numel() > 0
            memories.add(memory)
            return tensor.clone() if copy or shared else tensor.detach()

        params = {path: mine(tensor, path in copied) for path, tensor in state.params.items()}
        copy = not self.donate or lease.borrowed_optimizer
        optimizer = optree.tree_map(
            lambda leaf: mine(leaf, copy) if isinstance(leaf, Tensor) else leaf, state.optimizer
        )
        buffers = {path: mine(tensor, True) for path, tensor in state.buffers.items()}
        return params, buffers, optimizer, mine(state.step, True)

    def _eager_step(self, state: State, computed: Computed) -> tuple[State, dict[str, Any]]:
        with grad_mode(False):
            held = (*state.params.values(), *computed.buffers.values(), *computed.written.values())
            metrics = {**computed.losses, **not_sharing(computed.metrics, held)}
            return self._update(state, computed), metrics

    def _update(self, state: State, computed: Computed) -> State:
        """The new state. Everything that can fail comes before the first write."""
        gradients = computed.gradients
        lease, routed = lease_of(state), set(self.plan.routed)
        if not self.donate:
            refuse_late_writes(state.params, computed.written)
        copied = lease.borrowed & gradients.keys() if self.donate else routed
        params = {
            path: p.clone() if path in copied else p.detach() if p.requires_grad else p
            for path, p in state.params.items()
        } | computed.written
        owned = self.donate and not lease.borrowed_optimizer
        optimizer = state.optimizer if owned else optree.tree_map(_copy, state.optimizer)
        step = state.step + 1
        optimizer = self.computation.optimize(gradients, optimizer, params, state.step)
        if self.donate:
            lease.spent = True
        else:
            lease.borrowed |= params.keys() - routed  # both states hold these now: neither may write to them
        kept = [gradient for gradient in gradients.values() if gradient.is_cpu]
        renewed = Lease(borrowed=lease.borrowed - copied - computed.written.keys(), gradients=kept)
        fields = self.specification.named((params, computed.buffers, optimizer, step))
        return make_state(fields, renewed, self.specification)


def take_with_gradients(step: Step, state: State, batch: Any) -> tuple[State, dict[str, Any], dict[str, Tensor]]:
    """What an eager step returns, and the gradients that it took, for those who compare; `losses` is called once."""
    state = check_fits(state, step.specification)
    computed = step.computation.gradients(*state.fields, batch)
    gradients = {path: gradient.clone() for path, gradient in computed.gradients.items()}
    return (*step._eager_step(state, computed), gradients)


def _apart(optimizer: Any, params: Mapping[str, Tensor]) -> Any:
    """The optimizer's state, with copies of what shares memory with parameters, which steps overwrite."""
    memories = {memory_of(param) for param in params.values()} - {None}

    def apart(leaf: Any) -> Any:
        shares = isinstance(leaf, Tensor) and leaf.numel() > 0 and memory_of(leaf) in memories
        return leaf.clone() if shares else leaf

    return optree.tree_map(apart, optimizer)


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
