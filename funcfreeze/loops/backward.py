"""The law in an ordinary eager loop: losses already computed, on a live graph, into `.grad`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from funcfreeze.declare.overlaps import Merge
from funcfreeze.gradients.returned import check_losses
from funcfreeze.gradients.routed import planned_backward
from funcfreeze.gradients.sums import plus
from funcfreeze.loops.external import with_gradients
from funcfreeze.loops.freedom import note_call, without_hooks_where_free
from funcfreeze.loops.live import as_count, parameters_and_routing, read_live, values_of, with_rules
from funcfreeze.loops.replicas import is_averaging, wrappers
from funcfreeze.loops.uncompiled import uncompiled
from funcfreeze.model.mapping import Model


@uncompiled
def backward(
    losses: Mapping[str, Tensor | None],
    routes: object,
    model: Model,
    *,
    step: int | Tensor | None = None,
    gradient: Mapping[str, Tensor] | None = None,
    merge: Merge | None = None,
) -> None:
    """Accumulate every loss's gradient into `.grad` of the parameters it may update, as toggling `requires_grad` would.

    One call instead of the recipe; the optimizer, the scaler and all the rest of the loop stay as they are. The graph
    is used up. A parameter that no loss touches keeps the `.grad` it has, be it None.

    Hooks on activations run as they would for each loss alone. Autograd does not tell whether a graph carries any, so
    the first call for a model walks every loss by itself; later ones merge losses if no hook was registered meanwhile.

    Args:
        losses: name -> 0-d floating tensor on a live graph; for a loss that is absent this time None, and nothing else.
        routes: loss name -> which parameters it may update (see `Route`). A `Plan` (`step.plan`) is not resolved anew
            at every call, which small networks notice.
        model: the module whose parameters the losses were computed from, or a mapping of modules and parameters.
        step: the number of steps taken so far, for routes that are timed and weights that are schedules.
        gradient: for losses that are no scalars, by name, what `loss.backward(gradient=...)` would be given: constants.
        merge: a rule for where losses meet, or selector -> rule (see `Step`); one that keeps a state is for a `Step`.
            Rules that draw do so by `step`, without it from torch's global generator.

    Raises:
        RouteError: everything that is wrong with the routes or the losses, at once; or a route is timed and there is no
            `step`.
        TypeError: a weight is a schedule and there is no `step`; or the model is sharded by `fully_shard`, a
            ScriptModule, or wrapped by `DistributedDataParallel`, outside of its `no_sync()`.

        Whatever is raised, no `.grad` has changed.

    >>> from torch import nn
    >>> net = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    >>> features = net["encoder"](torch.ones(1, 2))
    >>> loss = net["head"](features).sum()
    >>> backward({"cls": loss, "adv": -loss}, {"cls": "*", "adv": "encoder"}, net)
    >>> net["encoder"].weight.grad, net["head"].bias.grad
    (tensor([[0., 0.],
            [0., 0.]]), tensor([1.]))
    """
    count = as_count(step)
    parameters, routing = parameters_and_routing(model, routes, count, merge)
    if any(map(is_averaging, wrappers(model))):
        raise TypeError(
            "DistributedDataParallel is around the model, and averages gradients in loss.backward() alone: every rank "
            "would go on with its own. Use ff.combine(losses, routes, model).backward(), or ff.backward inside of "
            "no_sync() and average what it leaves in .grad"
        )
    weights = routing.weight_values(count)
    with torch.enable_grad():
        losses = with_gradients(losses, gradient)
    present = check_losses(losses, routing, takes_vectors=True)
    graph = read_live(present, parameters)
    graph = without_hooks_where_free(graph, parameters)
    with torch.inference_mode(False), torch.no_grad():
        found = planned_backward(graph, parameters, routing, weights)
        gradients = with_rules(found, routing, values_of(routing, present), count)
        del found
        gradients.reverse()
        for parameter in parameters:  # each gradient is let go when it is in `.grad`: all twice would be the peak
            if (merged := gradients.pop()) is not None:
                _accumulate(parameter, merged)
    note_call()


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add to `.grad` as autograd would: a gradient that is the first becomes it, in a memory of its own."""
    if parameter.grad is None:
        parameter.grad = gradient.clone() if gradient.is_sparse else torch.empty_like(parameter).copy_(gradient)
    elif parameter.grad.is_sparse and not gradient.is_sparse:
        parameter.grad = plus(parameter.grad, gradient)
    else:
        parameter.grad += gradient
    for hook in tuple((parameter._post_accumulate_grad_hooks or {}).values()):
        hook(parameter)
