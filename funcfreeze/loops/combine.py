"""The law for any loop and any trainer: one scalar whose `.backward()` is the planned backward.

It hangs on the parameters by one node of autograd's, which gives each of them its merged gradient. So whatever hangs on
a parameter or on `loss.backward()` works as it does for a plain loss: accumulation, scalers, hooks, trainers' loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from funcfreeze.declare.overlaps import Merge
from funcfreeze.declare.plan import Plan, resolve_plan
from funcfreeze.declare.selectors import RouteError
from funcfreeze.gradients import Routing
from funcfreeze.gradients.graph import NO_LEAF
from funcfreeze.gradients.hooks import noticing_hooks
from funcfreeze.gradients.returned import check_losses
from funcfreeze.gradients.routed import LiveGraph, planned, planned_backward, read_losses
from funcfreeze.gradients.seed import seed_of
from funcfreeze.gradients.walk import at_end_of_backward, is_kept
from funcfreeze.gradients.weights import UNIT_WEIGHT
from funcfreeze.loops.external import with_gradients
from funcfreeze.loops.freedom import Moment, hooked_anywhere, note_call, without_hooks_where_free
from funcfreeze.loops.live import as_count, leaves_of, parameters_and_routing, read_live, values_of, with_rules
from funcfreeze.loops.replicas import averaged, begin_backward, unknown_to, waits_for_all, walks_other_outputs, wrappers
from funcfreeze.loops.uncompiled import uncompiled
from funcfreeze.model.mapping import Model


def plan(model: Model, routes: object, *, merge: Merge | None = None) -> Plan:
    """The resolved table of which loss may update which parameters, without a `Step`: to print, and to pass on.

    Args:
        model: a module, or a mapping of modules and parameters.
        routes: loss name -> which parameters it may update (see `Route`).
        merge: a rule for where losses meet, or selector -> rule (see `Step`).

    Raises:
        RouteError: everything that is wrong with the routes, at once.

    >>> from torch import nn
    >>> net = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    >>> print(plan(net, {"cls": "*", "adv": {"encoder": -0.1}}))
    parameter       elements  cls   adv
    encoder.weight         4    1  -0.1
    encoder.bias           2    1  -0.1
    head.weight            2    1     ·
    head.bias              1    1     ·
    cls updates 4 of 4 parameters (9 of 9 elements)
    adv updates 2 of 4 parameters (6 of 9 elements)
    """
    return resolve_plan(routes, leaves_of(model), merge)


@uncompiled
def combine(
    losses: Mapping[str, Tensor | None],
    routes: object,
    model: Model,
    *,
    step: int | Tensor | None = None,
    gradient: Mapping[str, Tensor] | None = None,
    merge: Merge | None = None,
) -> Tensor:
    """One loss for all: its value is their plain sum, its `.backward()` gives every parameter its merged gradient.

    A line in the loop that is there; whatever the loop does with a loss it does with this one: divides it by the
    number of accumulated batches, scales it, calls `.backward()` itself, asks `torch.autograd.grad` for gradients.
    A cotangent that arrives multiplies the gradients of all losses, as their weights do.

    Hooks on a parameter run once, on its merged gradient, and not where no loss touches it; such a parameter keeps the
    `.grad` it has. Hooks on activations run as they would for each loss alone; `retain_grad()` on one makes no hook
    that could be known, and leaves a part of its gradient. Tensors that require grad and belong to no parameter of the
    model (inputs, other models' parameters) get the gradient of the plain sum, as from any backward: detach or freeze
    what needs none, since a graph that reaches them may have to be walked once for each loss. A further loss on the
    same forward belongs into `losses`, with a route: added to the result, it would find the graph used up. Under
    `torch.no_grad()` the result is the plain sum, since trainers evaluate so.

    Under `DistributedDataParallel` gradients are averaged as for a plain loss, all of them once. Parameters that no
    loss touches on any rank keep their `.grad` with `find_unused_parameters=True`; without it `DistributedDataParallel`
    gives them zeros.

    Args:
        losses: name -> 0-d floating tensor on a live graph; for a loss that is absent this time None, and nothing else.
        routes: loss name -> which parameters it may update (see `Route`), or what `plan` made of them, which is
            quicker.
        model: the module whose parameters the losses were computed from, or a mapping of modules and parameters;
            `DistributedDataParallel` around them does not matter.
        step: the number of steps taken so far, for routes that are timed and weights that are schedules. Reading it off
            a device waits for that.
        gradient: for losses that are no scalars, by name, what `loss.backward(gradient=...)` would be given: constants.
            Such a loss's value is the sum of its products with that.
        merge: a rule for where losses meet, or selector -> rule (see `Step`), applied in every backward: where batches
            are accumulated, to each, and under `DistributedDataParallel` on every rank before the average. The
            cotangent multiplies what a rule makes of the losses' own gradients. One that keeps a state is for a
            `Step`; rules that draw do so by `step`, without it from torch's global generator.

    Returns:
        A 0-d tensor, at least float32, on the device of the first loss that is present.

    Raises:
        RouteError: everything that is wrong with the routes or the losses, at once; or a loss touches a parameter that
            `DistributedDataParallel`, around other parts of the model, does not know; or a route is timed and there is
            no `step`.
        TypeError: the model is sharded by `fully_shard`, or a ScriptModule; or a weight is a schedule and there is no
            `step`.

    >>> from torch import nn
    >>> net = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    >>> cls = net["head"](net["encoder"](torch.ones(1, 2))).sum()
    >>> loss = combine({"cls": cls, "adv": -cls}, {"cls": "*", "adv": "encoder"}, net)
    >>> loss.backward()
    >>> loss.item(), net["encoder"].weight.grad, net["head"].bias.grad
    (0.0, tensor([[0., 0.],
            [0., 0.]]), tensor([1.]))
    """
    count = as_count(step)
    parameters, routing = parameters_and_routing(model, routes, count, merge)
    weights = routing.weight_values(count)
    losses = with_gradients(losses, gradient)
    present = check_losses(losses, routing, inside_func=not torch.is_grad_enabled(), takes_vectors=True)
    value = _sum(present, parameters[0].device)
    if not torch.is_grad_enabled():
        return value
    graph, parameters, routing = _read(present, parameters, routing)
    graph = without_hooks_where_free(graph, parameters)
    around = wrappers(model)
    passes = planned(graph.structure, routing)
    touched = {leaf for one in passes for leaf, _, _ in one.leaves}
    _refuse_unknown(around, [(path, parameters[at]) for at, path in enumerate(routing.paths) if at in touched])
    wanted = sorted(touched | _waited_for(around, graph, parameters))
    values = [None if loss is None else loss.detach() for loss in present]
    is_shared = walks_other_outputs(around)
    call = _Call(graph, values, parameters, routing, weights, count, wanted, around, is_shared, note_call())
    # without any parameter to hang on it is still a loss: of absent losses alone, say
    inputs = [parameters[index] for index in wanted] or [torch.zeros((), requires_grad=True)]
    combined: Tensor = _Combined.apply(call, value, *inputs)  # type: ignore[no-untyped-call]  # torch's
    return combined


def _refuse_unknown(around: Sequence[DistributedDataParallel], named: Sequence[tuple[str, Tensor]]) -> None:
    unknown = unknown_to(around, named)
    if unknown:
        raise RouteError(
            f"{', '.join(unknown)}: DistributedDataParallel is around other parts of the model and does not know these "
            "parameters, so that every rank would go on with gradients of its own; wrap all that losses may update"
        )


def _waited_for(around: Sequence[DistributedDataParallel], graph: LiveGraph, parameters: Sequence[Tensor]) -> set[int]:
    """The parameters of which `DistributedDataParallel` must hear, also that there is no gradient."""
    found: set[int] = set()
    reached = {leaf for leaf in graph.structure.leaves[1::2] if leaf != NO_LEAF}
    index = {id(parameter): number for number, parameter in enumerate(parameters)}
    for wrapper in around:
        numbers = {index[id(parameter)] for parameter in averaged(wrapper) if id(parameter) in index}
        found |= numbers if waits_for_all(wrapper) else numbers & reached
    return found


def _sum(losses: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """The plain sum of the present losses, in the dtype that all of them fit in, at least float32."""
    values = [loss.detach() for loss in losses if loss is not None]
    dtype = reduce(torch.promote_types, [value.dtype for value in values], torch.float32)
    if not values:
        return torch.zeros((), dtype=dtype, device=device)
    total = values[0].to(dtype, copy=True)
    for value in values[1:]:
        total += value.to(total.device)
    return total


def _read(
    losses: Sequence[Tensor | None], parameters: list[Tensor], routing: Routing
) -> tuple[LiveGraph, list[Tensor], Routing]:
    """The losses' graph, all leaves that it ends in, and a routing in which every loss updates those of no model."""
    graph = read_live(losses, parameters)
    ends = zip(graph.structure.leaves[::2], graph.structure.leaves[1::2], strict=True)
    found = [getattr(graph.nodes[node], "variable", None) for node, leaf in ends if leaf == NO_LEAF]
    others = [tensor for tensor in found if tensor is not None]
    if not others:
        return graph, parameters, routing
    ours = len(parameters)
    everything = tuple((ours + index, UNIT_WEIGHT) for index in range(len(others)))
    wider = replace(routing, weights=tuple((*row, *everything) for row in routing.weights))
    parameters = [*parameters, *others]
    return read_losses(losses, parameters, hooked=()), parameters, wider


@dataclass
class _Call:
    """A graph that waits for its backward.

    Attributes:
        graph: the losses' graph; None once it is used up.
        losses: their values.
        leaves: all leaves that the graph ends in.
        routing: which loss may update which leaf.
        weights: the value of every weight index.
        count: the number of steps taken so far, if it is known.
        wanted: the leaves that get a gradient.
        around: what averages the gradients of the model's parameters.
        is_shared: whether the backward walks the graph once more, from other outputs of a forward.
        moment: when the losses were complete. The next call has the same, and counts on its handles.
    """

    graph: LiveGraph | None
    losses: Sequence[Tensor | None]
    leaves: Sequence[Tensor]
    routing: Routing
    weights: Sequence[float | Tensor]
    count: Tensor | None
    wanted: Sequence[int]
    around: Sequence[DistributedDataParallel]
    is_shared: bool
    moment: Moment

    @uncompiled
    def gradients(self, cotangent: Tensor) -> list[Tensor | None]:
        """The merged gradients of the leaves that are wanted, times the cotangent."""
        graph = self.graph
        if graph is None:
            raise RuntimeError(
                "backward through the graph of a combined loss a second time; pass retain_graph=True to the first "
                "call, or combine the losses of a new forward"
            )
        if Moment.now().handles != self.moment.handles:
            graph = hooked_anywhere(graph)  # something was hooked since the losses were combined
        seeds = [None if loss is None else seed_of(loss, cotangent) for loss in self.losses]
        for wrapper in self.around:
            begin_backward(wrapper)
        keeps = is_kept()
        # what is made of gradients that carry a graph hangs on this one too, and may be in the same backward later
        self.is_shared |= torch.is_grad_enabled()
        if not keeps:
            self.graph = None
        with noticing_hooks() as noticed, _hooks_left_out([self.leaves[index] for index in self.wanted]):
            apart = planned_backward(
                graph._replace(seeds=seeds),
                self.leaves,
                self.routing,
                self.weights,
                retain_graph=keeps or self.is_shared,
            )
        if noticed.all_known and not noticed.nodes:
            self.moment.handles += noticed.registrations  # of hooks that are gone
        unit = torch.where(cotangent == 0, 1.0, cotangent)  # rules see what the losses' own gradients are
        found = with_rules(apart, self.routing, values_of(self.routing, self.losses), self.count, unit)
        _spare_hooks([self.leaves[index] for index in self.wanted if found[index] is None])
        return [found[index] for index in self.wanted]


@dataclass(frozen=True)
class _UnlessNone:
    """A hook that is not called where there is no gradient."""

    hook: Callable[[Tensor], Tensor | None]

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else self.hook(gradient)


def _spare_hooks(leaves: Sequence[Tensor]) -> None:
    """Inside a backward: autograd calls hooks with None where it is given no gradient; these are spared until its end.

    What fails before then leaves the hooks as they are here, which differ in nothing else.
    """
    hooks = [leaf._backward_hooks for leaf in leaves if leaf._backward_hooks]
    kept = [dict(held) for held in hooks]
    for held in hooks:
        held.update({key: hook if isinstance(hook, _UnlessNone) else _UnlessNone(hook) for key, hook in held.items()})

    def give_back() -> None:
        for held, before in zip(hooks, kept, strict=True):
            held.update({key: hook for key, hook in before.items() if key in held})

    if hooks:
        at_end_of_backward(give_back)


@contextmanager
def _hooks_left_out(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Inside, leaves' hooks do not run: they will, on the merged gradients."""
    hooks = [leaf._backward_hooks for leaf in leaves if leaf._backward_hooks]
    kept = [dict(held) for held in hooks]
    for held in hooks:
        held.update(dict.fromkeys(held, _pass_on))
    try:
        yield
    finally:
        for held, before in zip(hooks, kept, strict=True):
            held.update({key: hook for key, hook in before.items() if key in held})  # others were removed meanwhile


def _pass_on(gradient: Tensor) -> None:
    """A hook that does nothing."""


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, value: Tensor, *leaves: Tensor) -> Tensor:
        ctx.call, ctx.number = call, len(leaves)
        return value.clone()  # an input that is returned is a view of it, which `loss /= n` may not write to

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.call.gradients(cotangent)
        return None, None, *gradients, *[None] * (ctx.number - len(gradients))
