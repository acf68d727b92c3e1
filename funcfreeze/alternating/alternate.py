"""What somebody declares as an alternation, checked, and the alternation that comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from funcfreeze.alternating.alternation import Alternation, Compile
from funcfreeze.alternating.members import Members
from funcfreeze.alternating.sharing import Function, Sharing, name_of
from funcfreeze.computation.evaluation import Evaluation
from funcfreeze.computation.naming import Asked
from funcfreeze.computation.targets import Target
from funcfreeze.declare.plans import Plans
from funcfreeze.declare.timing import ALWAYS, Timing, as_count, timing_problems
from funcfreeze.model.mapping import Model
from funcfreeze.optim.transform import lines
from funcfreeze.step import Step


def alternate(
    members: Mapping[str, Step],
    *,
    every: Mapping[str, int] | None = None,
    start: Mapping[str, int] | None = None,
    stop: Mapping[str, int | None] | None = None,
    compile: Compile = None,
    shared: Function | None = None,
    donate: bool = True,
    engine: str = "routed",
) -> Alternation:
    """Train by turns: what GAN, actor-critic and bilevel loops do with several optimizers.

    In a call the members run one after another, each on the parameters and buffers that the one before left. A member
    has its own losses, routes, optimizer, loss scale and clock (`state.clocks[name]`, which its schedules read). One
    parameter may be in several members, with an optimizer state in each. A single `Step` with the same losses makes a
    *simultaneous* update, all gradients at one point: another algorithm.

    Args:
        members: name -> `Step`, all over one model. How they run (`compile`, `donate`, `engine`) is said here.
        every: name -> the member runs at every so many calls; with `start` and `stop` at the calls in
            `range(start, stop, every)`.
        start: name -> the call at which it runs first, from 0.
        stop: name -> the call from which on it runs no more.
        shared: `shared(model, batch)`, run once a call before the first member, on the parameters that the call began
            with. What it returns is given to all losses that name `shared`. Members that are routed into it
            differentiate through its graph, others find it detached.
        compile: as in `Step`, for every member. What is shared is computed eagerly, forward and back.
        donate: as in `Step`.
        engine: as in `Step`, for every member.

    Raises:
        TypeError, ValueError: everything that is wrong with the declaration.

    >>> import torch
    >>> from torch import nn
    >>> import funcfreeze as ff
    >>> nets = {"gen": nn.Linear(4, 2), "disc": nn.Linear(2, 1)}
    >>> def disc_losses(model, real):
    ...     fake = model["gen"](torch.randn(len(real), 4))
    ...     return {"score": model["disc"](fake).mean() - model["disc"](real).mean()}
    >>> def gen_losses(model, real):
    ...     return {"fool": -model["disc"](model["gen"](torch.randn(len(real), 4))).mean()}
    >>> step = ff.alternate(
    ...     {
    ...         "disc": ff.Step(nets, disc_losses, {"score": "disc"}, optimizer=ff.optim.adam(1e-3)),
    ...         "gen": ff.Step(nets, gen_losses, {"fool": "gen"}, optimizer=ff.optim.adam(1e-3)),
    ...     },
    ...     every={"gen": 2},
    ... )
    >>> state = step.init()
    >>> for _ in range(3):
    ...     state, metrics = step(state, torch.randn(8, 2))
    >>> state.step, state.clocks["gen"], sorted(metrics)
    (tensor(3), tensor(2), ['disc', 'gen'])
    """
    turns = _turns(members, every=every, start=start, stop=stop)
    _refuse_run_options(members)
    _refuse_other_models(members)
    if not isinstance(donate, bool):
        raise TypeError(f"donate is True or False, got {donate!r}")
    run = {"engine": engine, "compile": compile, "donate": donate}
    twins = _targets(members)
    own = {name: member.remade(targets=_seen_by(name, twins), **run) for name, member in members.items()}
    _refuse_unmet(own, shared, engine)
    plans = Plans({name: member.plan for name, member in own.items()}, turns)
    sharing = None
    if shared is not None:
        sharing = Sharing.of(shared, own, plans)
        plans = replace(plans, shared=f"{name_of(shared)}, for {', '.join(filter(sharing.asks, own))}")
    return Alternation(own, plans, engine, compile, donate, Members(own, turns, donate), sharing)


def _turns(members: object, **given: object) -> dict[str, Timing]:
    """When each member runs."""
    if not isinstance(members, Mapping) or not members:
        raise TypeError(f"members is a mapping name -> Step, got {members!r}")
    problems = [
        f"a member is named by a non-empty string without dots, got {name!r}" for name in members if not _is_name(name)
    ]
    problems += [
        f"member {name!r} is a funcfreeze.Step, got {type(member).__name__}"
        for name, member in members.items()
        if not isinstance(member, Step)
    ]
    for option, values in given.items():
        if values is not None and not isinstance(values, Mapping):
            problems.append(f"{option} goes by member, as in {{{next(iter(members))!r}: 2}}; got {values!r}")
        elif values is not None:
            problems += [f"{option}: no member is called {name!r}" for name in values if name not in members]
    if problems:
        raise TypeError(lines("these cannot alternate:", problems))
    named: dict[str, Any] = {option: values or {} for option, values in given.items()}
    usual = ALWAYS.to_dict()
    given_to = {
        name: {**usual, **{option: as_count(values[name]) for option, values in named.items() if name in values}}
        for name in members
    }
    wrong = [f"{name}: {problem}" for name, numbers in given_to.items() for problem in timing_problems(**numbers)]
    if wrong:
        raise ValueError(lines("the members' turns:", wrong))
    return {name: Timing(**numbers) for name, numbers in given_to.items()}


def _targets(members: Mapping[str, Step]) -> dict[str, tuple[str, Target]]:
    """Target -> the member that moves it, and the target."""
    found: dict[str, tuple[str, Target]] = {}
    problems = []
    for member, step in members.items():
        own = step.computation.evaluation.targets.by_name
        for name, target in ((name, target) for name, target in own.items() if target.moves):
            if name in found:
                problems.append(
                    f"target {name!r}: {found[name][0]} and {member} both declare it; all members see what one declares"
                )
            found[name] = member, target
    if problems:
        raise ValueError(lines("a target moves after the update of one member:", problems))
    return found


def _seen_by(member: str, twins: Mapping[str, tuple[str, Target]]) -> dict[str, Target]:
    """All targets, as one member has them."""
    return {name: replace(target, moves=owner == member) for name, (owner, target) in twins.items()}


def _refuse_unmet(members: Mapping[str, Step], shared: object, engine: str) -> None:
    """Refuse losses that ask for what there is not, and something shared that nobody asks for or can use."""
    evaluations = {name: step.computation.evaluation for name, step in members.items()}
    given = () if shared is None else ("shared",)
    problems = [
        f"member {name!r}: {what}"
        for name, evaluation in evaluations.items()
        for what in evaluation.asked.unmet({*evaluation.named, *given})
    ]
    asking = [name for name, evaluation in evaluations.items() if "shared" in evaluation.asked]
    if shared is not None and not callable(shared):
        raise TypeError(f"shared is a function shared(model, batch), got {type(shared).__name__}: {shared!r}")
    if shared is not None and not asking:
        problems.append("shared is given, and no member's losses name it: losses(model, batch, *, shared)")
    if shared is not None and engine == "reference":
        problems.append('engine="reference" (torch.func) cannot walk a graph that was made before; use "routed"')
    if shared is not None:
        problems += [
            f"member {name!r} has microbatches={members[name].microbatches}, and what is shared is computed for the "
            "whole batch: leave one of them out"
            for name in asking
            if members[name].microbatches is not None
        ]
        problems += [f"what is shared: {what}" for what in Asked.by(shared).unmet(_names_of_targets(evaluations))]
    if problems:
        raise ValueError(lines("the members and what they share:", problems))


def _names_of_targets(evaluations: Mapping[str, Evaluation]) -> tuple[str, ...]:
    return ("targets",) if any(evaluation.targets.by_name for evaluation in evaluations.values()) else ()


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name) and "." not in name


def _refuse_run_options(members: Mapping[str, Step]) -> None:
    """How members run is the alternation's affair."""
    problems = [
        f"{option}={getattr(member, option)!r} of member {name!r}: give {option}= to alternate, for all members"
        for name, member in members.items()
        for option, usual in (("engine", "routed"), ("compile", None), ("donate", True))
        if getattr(member, option) != usual
    ]
    if problems:
        raise ValueError(lines("the alternation says how its members run:", problems))


def _refuse_other_models(members: Mapping[str, Step]) -> None:
    (first, one), *rest = members.items()
    parts = [*_parts(one.model)]
    problems = [
        f"{first} has {_named(one.model)}, {name} {_named(member.model)}"
        for name, member in rest
        if [(name, id(part)) for name, part in _parts(member.model)] != [(name, id(part)) for name, part in parts]
    ]
    if problems:
        hint = "give every member the same module, or mappings of the same modules by the same names in the same order"
        raise ValueError(lines("members are over one model:", [*problems, hint]))


def _parts(model: Model) -> Iterator[tuple[str, object]]:
    yield from model.items() if isinstance(model, Mapping) else [("", model)]


def _named(model: Model) -> str:
    if isinstance(model, Mapping):
        return "{" + ", ".join(f"{name}: {type(part).__name__}" for name, part in model.items()) + "}"
    return f"the {type(model).__name__} at {id(model):#x}"
