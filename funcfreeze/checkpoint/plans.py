"""What a checkpoint holds of declarations, and how a step's differ from it: plans, and the algorithms of optimizers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from funcfreeze.alternating.alternation import Alternation
from funcfreeze.checkpoint.states import AnyStep
from funcfreeze.declare.plan import Plan
from funcfreeze.declare.plans import Plans
from funcfreeze.declare.selectors import RouteError

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

SIDES = ("the checkpoint", "this step")
"""Whose declarations are compared."""


def plan_data(plan: Plan | Plans) -> Any:
    """A plan as plain data, without what changes from run to run: where functions are, what tensors hold."""
    return _settled(json.loads(json.dumps(plan.to_dict())))


def plan_problems(saved: Any, present: Any, sides: tuple[str, str] = SIDES) -> Iterator[str]:
    """Where two such plans differ, in words."""
    kinds = ["a Step" if "parameters" in plan else "an alternation" for plan in (saved, present)]
    if kinds[0] != kinds[1]:
        yield f"plan: {sides[0]} is of {kinds[0]}, {sides[1]} of {kinds[1]}"
    elif "parameters" in saved:
        yield from _differences(saved, present, sides, "plan")
    else:
        for member in saved | present:
            one, other = saved.get(member), present.get(member)
            if one is None or other is None:
                yield f"plan: only {sides[other is not None]} has a member {member!r}"
                continue
            yield from _differences(one["plan"], other["plan"], sides, f"plan of {member}")
            if one["turns"] != other["turns"]:
                yield f"plan of {member}: turns {one['turns']} in {sides[0]}, {other['turns']} in {sides[1]}"


def shown_plan(data: Any) -> str:
    """Such a plan as its table, or why there is none."""
    read = Plan.from_dict if "parameters" in data else Plans.from_dict
    try:
        return str(read(data))
    except RouteError as error:
        return f"the plan cannot be shown as a table: {error}"


def _differences(
    saved: Mapping[str, Any], present: Mapping[str, Any], sides: tuple[str, str], what: str
) -> Iterator[str]:
    before, now = ({row["names"][0]: row for row in plan["parameters"]} for plan in (saved, present))
    alike: dict[str, list[str]] = {}
    for path in [path for path in before if path in now]:
        one, other = ({key: row.get(key, {}) for key in ("weights", "timings")} for row in (before[path], now[path]))
        if one != other:
            alike.setdefault(f"{_routes(one)} in {sides[0]}, {_routes(other)} in {sides[1]}", []).append(path)
    for told, paths in alike.items():
        named = f"{paths[0]} is" if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more are"
        yield f"{what}: {named} routed {told}"
    for name in sorted((saved.keys() | present.keys()) - {"parameters"}):
        if saved.get(name) != present.get(name):
            was, is_ = (json.dumps(plan.get(name)) for plan in (saved, present))
            yield f"{what}: {name} is {was} in {sides[0]}, {is_} in {sides[1]}"


def _routes(row: Mapping[str, Any]) -> str:
    return json.dumps(row["weights"]) + (f" at {json.dumps(row['timings'])}" if row["timings"] else "")


def algorithms_of(step: AnyStep) -> dict[str, Any]:
    """Path -> what torch.optim calls the optimizer that updates it, where it has a name for it; by member."""
    if isinstance(step, Alternation):
        return {name: algorithms_of(member) for name, member in step.members.items()}
    found = step.transform.algorithms
    return {} if found is None else {path: algorithm.name for path, algorithm in found(step.plan.routed).items()}


def buffers_of(step: AnyStep) -> dict[str, Any]:
    """Path -> dtype and shape of each buffer that a state of this step begins with; a forward may change the shape."""
    if isinstance(step, Alternation):
        step = next(iter(step.members.values()))  # one module, and so the same ones in all
    return {
        path: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
        for path, (shape, dtype) in step.specification.buffers.items()
    }


def buffer_problems(saved: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    """Where a buffer begins otherwise; what only one of the two has is told with the state."""
    for path in [path for path in saved if path in present]:
        if saved[path] != present[path]:
            one, other = (f"{tuple(buffer['shape'])} {buffer['dtype']}" for buffer in (saved[path], present[path]))
            yield f"buffer {path}: it begins as {one} in {SIDES[0]}, as {other} in {SIDES[1]}"


def algorithm_problems(saved: Mapping[str, Any], present: Mapping[str, Any], where: str = "optimizer") -> Iterator[str]:
    """Where a parameter is updated by another algorithm; what only one of the two has is told with the state."""
    for name in [name for name in saved if name in present]:
        one, other = saved[name], present[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from algorithm_problems(one, other, f"{where} of {name}")
        elif one != other:
            yield f"{where}: {name} is updated by {one} in {SIDES[0]}, by {other} in {SIDES[1]}"


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        if "tensor" in value and "dtype" in value:
            return {"tensor": value["dtype"]}
        return {key: _settled(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_settled(part) for part in value]
    return _ADDRESS.sub("", value) if isinstance(value, str) else value
