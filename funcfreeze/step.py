"""One training step as a pure function: losses, routed gradients, optimizer, new state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funcfreeze.compile import CompiledStep, resolve
from funcfreeze.compile.halves import Halves
from funcfreeze.computation.acting import Names, call_with, shown
from funcfreeze.computation.adoption import Adoption
from funcfreeze.computation.beginning import begin, beside, take_over
from funcfreeze.computation.building import Declarations, built
from funcfreeze.computation.computation import Computation
from funcfreeze.computation.conflicts import Conflicts, conflicts_of
from funcfreeze.computation.evaluation import Losses
from funcfreeze.computation.half import Half
from funcfreeze.computation.loss_scale import LossScale
from funcfreeze.computation.microbatches import Count, Splitting
from funcfreeze.computation.specification import Specification, check_fits
from funcfreeze.computation.state import State, lease_of
from funcfreeze.computation.targets import Target
from funcfreeze.computation.updating import Updating
from funcfreeze.declare.ema import Ema
from funcfreeze.declare.overlaps import Merge, eager_rules
from funcfreeze.declare.plan import Plan
from funcfreeze.declare.routes import Selection
from funcfreeze.gradients.modes import grad_mode
from funcfreeze.model.acceptance import as_module
from funcfreeze.model.attributes import attributes_kept
from funcfreeze.model.functional import FunctionalModule
from funcfreeze.model.mapping import Model
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
            mapping of metrics. Is given `targets` by keyword, if it names that.
        routes: loss name -> which parameters it may update (see `Route`), or a `Plan`.
        optimizer: a `Transform` such as `optim.adamw(1e-3)`.
        differentiable: a selector, or a list of them: parameters that no loss may update and that `losses` itself
            differentiates at, as with `torch.autograd.grad` for an adaptive weight. Others without a route, or without
            one that is active at a count, are constants in the forward, for which nothing is kept.
        engine: "routed" (the fast one), "reference" (`torch.func`) or "toggle" (the eager recipe).
        compile: whether the whole step is one compiled graph: None (compiled on CUDA, eager elsewhere), True, False, or
            a mapping of `torch.compile`'s `backend`, `mode`, `options` and `dynamic`. The routed engine only.
        donate: whether a step reuses the storage of the state it is given, which is spent then.
        microbatches: into how many parts a batch is split, every tensor along its first dimension. They are computed
            one after another, in the memory of one part and one gradient more, for one update, which optimizer,
            schedules and clocks count once. A batch that is `Microbatches` is in parts already. Metrics beside the
            losses come as tuples then, one value for each part.
        counts: loss -> a function from a part of the batch to how much a mean over it counts, such as the number of its
            tokens: the loss is the mean weighted by these. Each part counts 1 without.
        loss_scale: for float16, the factor that keeps small gradients alive (see `LossScale`). Metrics, and gradients
            as they are returned, are free of it; hooks see it.
        frozen_statistics: a selector of modules, or a list: every norm in them that keeps running statistics is in eval
            mode while `losses` runs, whatever `train()` says (`losses` itself leaves these flags alone).
        targets: name -> `ema(...)`: averaged twins of parts of the model, which `losses(model, batch, *, targets)`
            finds by name, and which move after the step's update (see `ema`).
        on_nonfinite: "skip" leaves parameters, optimizer and buffers bit-identical where a loss or a gradient is not
            finite, without waiting for the device; "raise" does, waits, and raises (see `Finite`); "ignore" goes on.
        merge: what becomes of the losses' gradients where two or more may update a parameter: a rule of
            `funcfreeze.merge`, or selector -> rule. An entry is one joint decision about all of its parameters that two
            or more losses may update; a loss that does not reach one of them is zero there. Rules see gradients with
            the routes' weights. Everywhere else gradients add up.

    Attributes:
        plan: the resolved, frozen loss × parameter table; printable and comparable.
        computation: what a step computes, on plain tensors.
        splitting: how batches come in parts.
        specification: what a state must look like.

    Raises:
        RouteError: everything that is wrong with the routes, at once.
        TypeError, ValueError: a model whose parameters cannot be exchanged, and why; or a route with `reset` under an
            optimizer whose state is not kept by parameter.

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

    model: Model
    losses: Losses
    optimizer: Transform
    engine: str
    compile: object
    donate: bool
    loss_scale: LossScale | None
    differentiable: Selection | None
    microbatches: int | None
    counts: Mapping[str, Count] | None
    frozen_statistics: Selection | None
    targets: Mapping[str, Ema | Target] | None
    on_nonfinite: str
    merge: Merge | None
    plan: Plan
    computation: Computation
    specification: Specification
    compiled: CompiledStep | None
    splitting: Splitting
    _updating: Updating
    _halves: Halves

    def __init__(
        self,
        model: Model,
        losses: Losses,
        routes: object,
        *,
        optimizer: Transform,
        engine: str = "routed",
        compile: bool | Mapping[str, Any] | None = None,
        donate: bool = True,
        loss_scale: LossScale | None = None,
        differentiable: Selection | None = None,
        microbatches: int | None = None,
        counts: Mapping[str, Count] | None = None,
        frozen_statistics: Selection | None = None,
        targets: Mapping[str, Ema | Target] | None = None,
        on_nonfinite: str = "ignore",
        merge: Merge | None = None,
    ) -> None:
        declared = Declarations(engine, differentiable, loss_scale, frozen_statistics, targets, on_nonfinite, merge)
        computation, specification = built(model, losses, routes, optimizer, declared)
        functional = computation.evaluation.functional
        plan = computation.evaluation.plan
        updating = Updating(computation, specification, donate)
        how = resolve(compile, functional.module.parameters(), engine, eager_rules(plan.merge))
        device = functional.present_parameters()[plan.routed[0]].device
        splitting = Splitting.of(microbatches, counts, plan.losses, device)
        compiled = None if how is None else CompiledStep(updating, how)
        vars(self).update(  # frozen: no attribute can be set
            model=model,
            losses=losses,
            optimizer=optimizer,
            engine=engine,
            compile=compile,
            donate=donate,
            loss_scale=loss_scale,
            differentiable=differentiable,
            microbatches=microbatches,
            counts=counts,
            frozen_statistics=frozen_statistics,
            targets=targets,
            on_nonfinite=on_nonfinite,
            merge=merge,
            plan=plan,
            computation=computation,
            specification=specification,
            compiled=compiled,
            splitting=splitting,
            _updating=updating,
            _halves=Halves(computation, splitting, compiled),
        )

    def remade(self, **changes: Any) -> Step:
        """The same step with some of its arguments exchanged."""
        twins = self.computation.evaluation.targets
        targets = twins.over(as_module(changes["model"])) if "model" in changes else twins.by_name
        own = {name: getattr(self, name) for name in ("model", "optimizer", *_OPTIONS)}
        given = {**own, "targets": targets or None, **changes}
        return Step(losses=self.losses, routes=self.plan, **given)

    def __repr__(self) -> str:
        return f"Step({', '.join(self.plan.losses)}; engine={self.engine!r}, donate={self.donate})"

    def init(
        self, copy: bool = True, *, optimizer: torch.optim.Optimizer | None = None, step: int | None = None
    ) -> State:
        """A state from the module's present values: a fresh one, or one that goes on where a running optimizer is.

        Parameters that no loss may update are shared with the module, not copied. A step writes to them only if
        `losses` does: to copies, unless that begins after the step's first call (see `__call__`).

        Args:
            copy: False adopts the module's storage for all the rest too, which steps then overwrite.
            optimizer: a running optimizer of torch.optim over this model's parameters, whose state is taken; it stays
                as it is, unless `copy` is False. A parameter for which it keeps nothing yet starts afresh, and so does
                a loss scale.
            step: the number of steps taken so far, which schedules read; if not given the largest count that the
                optimizer keeps, 0 without one.

        Raises:
            ValueError: the running optimizer is not the Step's: tells all options that differ (a rate that is a
                schedule is compared at `step`) and all parameters that only one of the two has.
        """
        self.computation.evaluation.refuse_unmet()
        self.computation.evaluation.warn_of_still_statistics()
        return begin(self.computation, self.specification, copy, optimizer, step)

    def __call__(self, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        """Take one step.

        Returns:
            The new state, and the metrics: every present loss by name (detached, 0-d, unweighted), and what `losses`
            returned beside them: detached and apart from the state, in containers of the same types (dicts, lists,
            tuples, dataclasses, mappings of any kind). An object that is no container is returned as it is. Metrics of
            the step's own begin with `ff/`: `ff/grad_norm`, where the optimizer clips by the global norm.

        Raises:
            RuntimeError: the state is spent, or the forward changed a parameter.
            ValueError: the state is of another model or optimizer. Several Steps may share a State if their optimizers
                are of one structure; rates and other numbers may differ.
            RouteError: what `losses` returned does not fit the declaration.
            TypeError: a metric is an object that is no container and holds a tensor of the graph, or a parameter's
                memory.
            FloatingPointError: with `on_nonfinite="raise"`, naming losses and parameters; the state is not spent.

            Whatever is raised, the tensors of module and state are as they were, but for two cases. What `losses`
            writes to a parameter for the first time after the step's first call is in the memory of the state already,
            which frozen parameters share with the module and other states. And compiled code that fails when it runs,
            at an index out of bounds, may have moved some parameters where torch's fused kernels do not make the
            update: under transforms that are not of `funcfreeze.optim`, or that keep their state in another dtype.
        """
        state = check_fits(state, self.specification)
        lease_of(state).gradients = ()
        if self.compiled is not None and self._halves.make_one_graph(batch):
            return self.compiled.step(state, batch)
        return self._update(state, self._halves.half(state, batch))

    def compute(self, state: State, batch: Any, *, per_loss: bool = False) -> Half:
        """The first half of a step: one forward and its backward. The state is not spent.

        For what people do between gradients and update: clipping each loss's gradients, a second forward somewhere
        else (sharpness-aware minimisation), a rule for conflicts. The forward draws random numbers and changes the
        modules' Python attributes as in a step. No tensor of module or state is changed, but by what `losses` writes to
        a parameter for the first time after the step's first call (see `__call__`).

        Args:
            state: where gradients are taken.
            batch: what `losses` is given.
            per_loss: whether each loss's gradients are kept apart, too, in `half.per_loss`. They take as long as the
                losses one by one, and are always computed eagerly.

        >>> import funcfreeze as ff
        >>> losses = lambda model, x: {"fit": model(x).square().mean()}
        >>> step = ff.Step(nn.Linear(2, 1), losses, {"fit": "*"}, optimizer=ff.optim.sgd(0.1))
        >>> state = step.init()
        >>> half = step.compute(state, torch.ones(3, 2))
        >>> halved = {path: gradient / 2 for path, gradient in half.gradients.items()}
        >>> state, metrics = step.apply_gradients(state, half.replace(gradients=halved))
        """
        state = check_fits(state, self.specification)
        lease_of(state).gradients = ()
        half = self._halves.eager(state, batch, per_loss=True) if per_loss else self._halves.half(state, batch)
        return self._updating.apart(state, half)

    def apply_gradients(self, state: State, half: Half) -> tuple[State, dict[str, Any]]:
        """The second half of a step: the update by a half's gradients, with its buffers and metrics.

        After `half = compute(state, batch)` it gives what the step gives, bit for bit where that is eager. The half
        may have other gradients by then, `half.replace(gradients=...)`: a parameter that is missing or None is
        untouched. The loss scale's check, schedules and counts are those of a step.

        Returns:
            The new state, and the metrics, as `__call__` does.

        Raises:
            TypeError: not a `Half`.
            ValueError: the half does not fit the state; tells everything that does not.
        """
        state = check_fits(state, self.specification)
        half = self._updating.checked(state, half)
        return self._update(state, half)

    def gradients(self, state: State, batch: Any) -> dict[str, Tensor]:
        """The merged gradients by path, holding only touched parameters.

        Updates nothing: buffers and the modules' Python attributes are as before afterwards, too. Any name of a tied
        parameter is a key. They are free of a loss scale; those of float16 parameters are in float32 then, or small
        ones would be lost. Always computed eagerly, also by a compiled step.
        """
        state = check_fits(state, self.specification)
        with self.functional.alone, attributes_kept(self.functional.modules):
            gradients = self._halves.eager(state, batch).gradients
        return tied(dict(gradients), self.specification.tied_params)

    def per_loss_gradients(self, state: State, batch: Any) -> dict[str, dict[str, Tensor]]:
        """Each loss's gradients by path, weights applied. They sum to `gradients`, but where a merge rule decides."""
        state = check_fits(state, self.specification)
        with self.functional.alone, attributes_kept(self.functional.modules):
            apart = self._halves.eager(state, batch, per_loss=True).per_loss
        return {loss: tied(dict(row), self.specification.tied_params) for loss, row in apart.items()}

    def conflicts(self, state: State, batch: Any) -> Conflicts:
        """Where losses meet: how long each one's gradient is, the angles between them, its share in the merged one.

        By entry of `merge`, and for other parameters that two or more losses may update by module, as in the plan's
        table. Updates nothing, and reads the numbers off the device. A step with merge rules has them among its
        metrics, too: `ff/norm/<entry>`, `ff/cosine/<entry>`, `ff/weight/<entry>`, `ff/share/<entry>`.
        """
        state = check_fits(state, self.specification)
        with self.functional.alone, attributes_kept(self.functional.modules):
            return conflicts_of(self._halves.eager(state, batch, per_loss=True), self.plan)

    def call(self, state: State, f: Callable[..., Any], *args: Any, targets: Names = None) -> Any:
        """`f(model, *args)` with the state's tensors in the model: evaluation, acting, sampling.

        With the name of a target, or several, their averages are in the place of what they are of.

        No gradients are recorded. Nothing changes: buffers and train/eval flags are as before afterwards, and `f` may
        only read parameters (an error, where torch counts the write; one through `.data` goes unseen). What `f` returns
        may share memory with the state, which a later donating step overwrites: clone what must last.
        """
        state = check_fits(state, self.specification)
        return call_with(self.computation.evaluation, state, f, args, targets)

    def export(self, state: State, *, optimizer: torch.optim.Optimizer | None = None, targets: Names = None) -> Model:
        """Write the state's parameters and buffers into the model, and return it. The state stays usable.

        Args:
            state: what is written; read, and not kept.
            targets: the name of a target, or several: their averages are written in the place of what they are of.
            optimizer: an optimizer of torch.optim over this model's parameters, which takes over the optimizer's state,
                and rates that are schedules as they are at this step. A loss scale is not taken over. A scheduler of
                torch goes on from where it is: step it beside every step that is taken here.

        Raises:
            ValueError: the optimizer is not the Step's (see `init`); nothing is written then.
        """
        state = check_fits(state, self.specification)
        written = shown(self.computation.evaluation, state, targets)
        if optimizer is not None:
            goes_on_with = beside(optimizer, self.computation).given_back(
                self.specification.optimizer, state.optimizer, int(state.step)
            )
            optimizer.load_state_dict(goes_on_with)
        self.functional.write(*written)
        return self.model

    def adopt(self, state: State) -> tuple[State, Adoption]:
        """Another Step's state, as far as it fits: for a changed model, other routes or another optimizer.

        Parameters and buffers are kept where path and shape agree (in this step's precision), what the optimizer keeps
        for a parameter where it goes by the same names, the count of steps always. The rest starts afresh from the
        module's present values. The two states share tensors and are spent together.

        Returns:
            The state, and what was kept, what starts afresh and why, and what was left out.

        Raises:
            TypeError: not a `State`.
            RuntimeError: the state is spent.
            ValueError: it has nothing in common with this step.
        """
        return take_over(state, self.computation, self.specification)

    def _update(self, state: State, half: Half) -> tuple[State, dict[str, Any]]:
        with grad_mode(False):
            return (self._updating.update if self.compiled is None else self.compiled.apply)(state, half)

    @property
    def functional(self) -> FunctionalModule:
        """The model as a pure function."""
        return self.computation.evaluation.functional

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


_OPTIONS = ("engine", "compile", "donate", "loss_scale", "differentiable", "microbatches", "counts", "on_nonfinite")
"""What a step takes by keyword, but for its optimizer and what its plan says."""
