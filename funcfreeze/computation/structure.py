"""Which optimizer a state looks like it was made by, for messages about two that do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

_KEPT = {
    frozenset(): "sgd without momentum",
    frozenset({"momentum_buffer"}): "sgd with momentum",
    frozenset({"momentum_buffer", "step"}): "sgd with momentum and dampening",
    frozenset({"step", "exp_avg", "exp_avg_sq"}): "adam",
    frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}): "adam with amsgrad",
    frozenset({"step", "square_avg"}): "rmsprop",
    frozenset({"step", "square_avg", "momentum_buffer"}): "rmsprop with momentum",
    frozenset({"step", "square_avg", "grad_avg"}): "centered rmsprop",
    frozenset({"step", "square_avg", "momentum_buffer", "grad_avg"}): "centered rmsprop with momentum",
}
"""By what is kept for a parameter; adamw keeps what adam does."""


def looks_like(state: Any, paths: Collection[str]) -> str:
    """The optimizer that a state of this structure comes from, as far as the structure tells.

    >>> looks_like(((), {"w": {"step": 0, "exp_avg": 0, "exp_avg_sq": 0}}), ["w"])
    'chain(stateless, adam)'
    >>> looks_like({"gen": {"w": {"momentum_buffer": 0}}, "disc": {}}, ["w"])
    "partition({'gen': sgd with momentum, 'disc': nothing})"
    """
    if isinstance(state, tuple):
        return f"chain({', '.join(looks_like(part, paths) for part in state)})" if state else "stateless"
    if not isinstance(state, Mapping):
        return f"a transform that keeps a {type(state).__name__}"
    if state.keys() == {"loss_scale", "optimizer"}:
        return f"{looks_like(state['optimizer'], paths)} under a loss scale"
    if state.keys() == {"merge", "optimizer"}:
        return f"{looks_like(state['optimizer'], paths)} beside merge rules that keep a state"
    if not state:
        return "nothing"
    if all(is_entry(key, kept, paths) for key, kept in state.items()):
        return " and ".join(dict.fromkeys(map(_kept, state.values())))
    parts = ", ".join(f"{key!r}: {looks_like(part, paths)}" for key, part in state.items())
    return f"partition({{{parts}}})"


def is_entry(key: object, kept: object, paths: Collection[str]) -> bool:
    """Whether this is what is kept for one parameter."""
    return key in paths and isinstance(kept, Mapping) and not any(isinstance(v, Mapping | tuple) for v in kept.values())


def entries(state: Any, paths: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What is kept for parameters, wherever in the state it is.

    >>> list(entries(((), {"all": {"w": {"momentum_buffer": 0}}}), ["w"]))
    [('w', {'momentum_buffer': 0})]
    """
    if type(state) is tuple:
        for part in state:
            yield from entries(part, paths)
    elif isinstance(state, Mapping):
        for key, kept in state.items():
            if is_entry(key, kept, paths):
                yield key, kept
            else:
                yield from entries(kept, paths)


def entries_at(own: Any, state: Any, paths: Collection[str]) -> Iterator[tuple[str, Any]]:
    """What a state keeps for parameters, in the places where an optimizer's own initial state says it does.

    >>> list(entries_at(((), {"w": {}}), ((), {"w": {"moments": {"mean": 0}}}), ["w"]))
    [('w', {'moments': {'mean': 0}})]
    """
    if type(own) is tuple:
        for mine, theirs in zip(own, state, strict=True):
            yield from entries_at(mine, theirs, paths)
    elif isinstance(own, Mapping):
        for key, kept in own.items():
            if key not in state:
                continue
            if is_entry(key, kept, paths):
                yield key, state[key]
            else:
                yield from entries_at(kept, state[key], paths)


def with_entries(own: Any, f: Callable[[str, Mapping[str, Any]], Any], paths: Collection[str]) -> Any:
    """An optimizer's initial state with `f(path, entry)` in the place of what it keeps for each parameter.

    >>> with_entries(((), {"w": {"step": 0}}), lambda path, entry: {"step": 3}, ["w"])
    ((), {'w': {'step': 3}})
    """
    if type(own) is tuple:
        return tuple(with_entries(part, f, paths) for part in own)
    if isinstance(own, Mapping):
        return {
            key: f(key, kept) if is_entry(key, kept, paths) else with_entries(kept, f, paths)
            for key, kept in own.items()
        }
    return own


def in_several_places(paths: Iterable[str]) -> list[str]:
    """The parameters for which something is kept more than once."""
    return [path for path, number in Counter(paths).items() if number > 1]


def _kept(entry: Mapping[str, Any]) -> str:
    known = _KEPT.get(frozenset(entry))
    return known if known is not None else f"a transform that keeps {', '.join(map(str, entry))}"
