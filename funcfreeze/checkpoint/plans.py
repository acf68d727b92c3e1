"""A plan as a checkpoint holds it, and how the plan of a step differs from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from funcfreeze.declare.plan import Plan
from funcfreeze.declare.plans import Plans

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def plan_data(plan: Plan | Plans) -> Any:
    """A plan as plain data, without what changes from run to run: where functions are, what tensors hold."""
    return _settled(json.loads(json.dumps(plan.to_dict())))


def plan_problems(saved: Any, present: Any) -> list[str]:
    """Where two such plans differ, in words."""
    if "parameters" in saved and "parameters" in present:
        return [*_differences(saved, present)]
    if "parameters" in saved or "parameters" in present:
        own, other = ("a Step", "an alternation") if "parameters" in present else ("an alternation", "a Step")
        return [f"plan: saved was {other}, here is {own}"]
    members = {**saved.get("members", saved), **present.get("members", present)}
    return [] if saved == present else [f"plan: the members {', '.join(members)} are not declared alike"]


def _differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    before, now = ({row["names"][0]: row for row in plan["parameters"]} for plan in (saved, present))
    for path in before.keys() & now.keys():
        was, is_ = (json.dumps(row.get("weights", {})) for row in (before[path], now[path]))
        if was != is_ or before[path].get("timings") != now[path].get("timings"):
            yield f"plan: {path} was routed {was}, is routed {is_}"
    for name in sorted((saved.keys() | present.keys()) - {"parameters"}):
        if saved.get(name) != present.get(name):
            yield f"plan: {name} was {json.dumps(saved.get(name))}, is {json.dumps(present.get(name))}"


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        if "tensor" in value and "dtype" in value:
            return {"tensor": value["dtype"]}
        return {key: _settled(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_settled(part) for part in value]
    return _ADDRESS.sub("", value) if isinstance(value, str) else value
