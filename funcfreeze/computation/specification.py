"""What a state must look like to be used by a step, and every way in which one does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcfreeze.computation.evaluation import Evaluation
from funcfreeze.computation.state import State, known_count, known_to_fit, lease_of, make_state
from funcfreeze.computation.structure import looks_like
from funcfreeze.model.functional import in_twin
from funcfreeze.model.sites import other_names
from funcfreeze.model.ties import tied
from funcfreeze.optim import Transform
from funcfreeze.optim.cast import cast

Shape = tuple[tuple[int, ...], torch.dtype]
"""A tensor's shape and dtype."""


@dataclass(frozen=True, eq=False)
class Specification:
    """Paths, shapes and dtypes of parameters and buffers, and the structure of the optimizer state.

    Attributes:
        optimizer: the optimizer's initial state with tensors that have no storage.
        tied_params: other names of parameters, with the path that each is known by.
        tied_buffers: the same for buffers.
        targets: the parameters of each twin, and its buffers, of which a forward may change the shape: None.
        tied_targets: other names of each twin's.
    """

    params: Mapping[str, Shape]
    buffers: Mapping[str, Shape]
    optimizer: Any
    tied_params: Mapping[str, str]
    tied_buffers: Mapping[str, str]
    targets: Mapping[str, Mapping[str, Shape | None]]
    tied_targets: Mapping[str, Mapping[str, str]]

    @staticmethod
    def of(evaluation: Evaluation, transform: Transform) -> Specification:
        """The specification of the states a step makes."""
        functional, plan = evaluation.functional, evaluation.plan
        params, buffers = functional.present_parameters(), functional.present_buffers()
        twins = {**functional.present_constants(), **buffers}
        targets = {name: _twin_paths(name, twins) for name in functional.twins}
        known = {key for paths in targets.values() for key in paths.values()}
        shapeless = {path: torch.empty_like(params[path], device="meta", requires_grad=False) for path in plan.routed}
        return Specification(
            _shapes(params),
            _shapes({path: buffer for path, buffer in buffers.items() if path not in known}),
            transform.init(shapeless),
            other_names(functional.module, "_parameters"),
            other_names(functional.module, "_buffers"),
            {
                name: {path: _shape(twins[key]) if key in functional.constants else None for path, key in paths.items()}
                for name, paths in targets.items()
            },
            {
                name: {**other_names(twin, "_parameters"), **other_names(twin, "_buffers")}
                for name, twin in functional.twins.items()
            },
        )

    def named(self, fields: tuple[Mapping[str, Tensor], Mapping[str, Tensor], Any, Tensor]) -> tuple[Any, ...]:
        """The fields of a state but for its clocks, in which what is tied is found by all of its names.

        Args:
            fields: those that a step computes with, the tensors of targets among the buffers.
        """
        params, buffers, optimizer, step = fields
        targets: dict[str, Mapping[str, Tensor]] = {}
        if self.targets:
            rest = dict(buffers)
            for name, shapes in self.targets.items():
                own = {path: rest.pop(in_twin(name, path)) for path in shapes}
                targets[name] = tied(own, self.tied_targets[name])
            buffers = rest
        return tied(params, self.tied_params), tied(buffers, self.tied_buffers), optimizer, step, targets


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {path: _shape(tensor) for path, tensor in tensors.items()}


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape), tensor.dtype


def check_fits(state: object, wanted: Specification) -> State:
    """The state, if it fits; a state made by the same step is known to.

    Where its optimizer state means what the step's does in another form (see `optim.cast`), the state that is returned
    has it in the step's. The two are spent together.

    Raises:
        TypeError: not a `State`.
        RuntimeError: the state is spent.
        ValueError: every path, shape, dtype or optimizer entry that does not fit.
    """
    if not isinstance(state, State):
        pair = "; a step returns a pair: state, metrics = step(state, batch)" if isinstance(state, tuple) else ""
        raise TypeError(f"expected a State such as step.init() gives, got {type(state).__name__}{pair}")
    params = state.params  # raises if the state is spent
    if known_to_fit(state) is wanted:
        return state
    optimizer = state.optimizer
    as_ours = _is_as_wanted(wanted.optimizer, optimizer, params, None)
    if not as_ours:
        optimizer = _cast(wanted.optimizer, optimizer, params, None, "")
    problems = [
        *_tensor_problems("parameter", wanted.params, params, wanted.tied_params),
        # a forward may change the shapes of buffers
        *_path_problems("buffer", wanted.buffers, state.buffers, wanted.tied_buffers),
    ]
    if not as_ours:
        problems += _optimizer_problems(wanted.optimizer, optimizer, wanted.params.keys(), "optimizer")
    if state.clocks:
        problems.append(f"clocks of {', '.join(state.clocks)}: it is the State of an alternation, the Step is alone")
    problems += _target_problems(wanted, state)
    if not isinstance(state.step, Tensor) or state.step.ndim != 0 or state.step.dtype != torch.int64:
        problems.append(f"state.step is a 0-d int64 tensor, got {state.step!r}")
    if problems:
        shown = [f"  - {problem}" for problem in problems[:10]]
        more = [f"  and {len(problems) - 10} more"] if len(problems) > 10 else []
        hint = _about_optimizers(wanted.optimizer, optimizer, wanted.params.keys() | params.keys())
        head = "this State is of another model or optimizer than the Step:"
        raise ValueError("\n".join([head, *shown, *more, *hint]))
    if optimizer is state.optimizer:
        return state
    fields = (params, state.buffers, optimizer, state.step, state.targets)
    return make_state(fields, lease_of(state), wanted, count=known_count(state))


def _twin_paths(name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Path in a twin -> path beside the model's, of all tensors of a twin among these."""
    start = in_twin(name, "")
    return {key.removeprefix(start): key for key in tensors if key.startswith(start)}


def _target_problems(wanted: Specification, state: State) -> Iterator[str]:
    for name, given in state.targets.items():
        if name not in wanted.targets:
            yield f"targets[{name!r}]: the State has it, the Step does not declare it"
            continue
        for path, shape in wanted.targets[name].items():
            seen = given.get(path)
            if not isinstance(seen, Tensor):
                yield f"targets[{name!r}][{path!r}]: the Step has it, the State does not"
            elif shape is not None and _shape(seen) != shape:
                yield (
                    f"targets[{name!r}][{path!r}]: the Step has shape {shape[0]} and {shape[1]}, the State has shape "
                    f"{tuple(seen.shape)} and {seen.dtype}"
                )
        for path in given.keys() - wanted.targets[name].keys():
            yield f"targets[{name!r}][{path!r}]: the State has it, the Step does not"
    if missing := [name for name in wanted.targets if name not in state.targets]:
        yield (
            f"targets: the Step has {', '.join(missing)}, the State does not, since it was made before they were "
            "declared; step.adopt(state) makes them"
        )


def _about_optimizers(wanted: Any, given: Any, paths: Any) -> Iterator[str]:
    """What is wanted where two Steps share a State and their optimizers keep different things."""
    own, other = looks_like(wanted, paths), looks_like(given, paths)
    if own != other:
        yield (
            f"Steps that share a State need optimizers of one structure: this Step's is {own}, the State's was made by "
            f"{other}. Build all of them in one way, each with its own rates and other numbers"
        )


def _is_as_wanted(wanted: Any, given: Any, params: Mapping[str, Tensor], device: torch.device | None) -> bool:
    """Whether there is nothing to cast and no problem; asked at every step where Steps share a state, so quick."""
    if isinstance(wanted, Tensor):
        return _alike(wanted, given, device)
    if isinstance(wanted, dict) and isinstance(given, dict):
        for key, target in wanted.items():
            if key in given:
                place = params[key].device if key in params else device
                if not _is_as_wanted(target, given[key], params, place):
                    return False
            elif key not in params:
                return False
        return not wanted or all(key in wanted or key in params for key in given)
    if isinstance(wanted, tuple) and isinstance(given, tuple) and len(wanted) == len(given):
        return all(_is_as_wanted(one, other, params, device) for one, other in zip(wanted, given, strict=True))
    return type(wanted) is type(given) and not isinstance(wanted, tuple)


def _cast(wanted: Any, given: Any, params: Mapping[str, Tensor], device: torch.device | None, slot: str) -> Any:
    """An optimizer's state with what can be cast cast; the very same objects where there is nothing to do.

    Args:
        wanted: the step's own, of tensors without storage.
        given: the state's.
        params: path -> parameter.
        device: of the parameter that this part is kept for, if it is for one.
        slot: the key under which it is kept.
    """
    if isinstance(wanted, dict) and isinstance(given, dict):
        moved = {
            key: _cast(wanted[key], kept, params, params[key].device if key in params else device, str(key))
            for key, kept in given.items()
            if key in wanted
        }
        return {**given, **moved} if any(moved[key] is not given[key] for key in moved) else given
    if type(wanted) is type(given) is tuple and len(wanted) == len(given):
        parts = tuple(_cast(one, other, params, device, slot) for one, other in zip(wanted, given, strict=True))
        return parts if any(one is not other for one, other in zip(parts, given, strict=True)) else given
    if not isinstance(wanted, Tensor) or _alike(wanted, given, device):
        return given
    tensor = cast(given, slot, wanted.shape, wanted.dtype, device)
    return given if tensor is None else tensor


def _alike(wanted: Tensor, given: Any, device: torch.device | None) -> bool:
    """Whether there is nothing to cast: the same form on the right device."""
    return (
        isinstance(given, Tensor)
        and given.dtype == wanted.dtype
        and given.shape == wanted.shape
        and (device is None or given.device == device)
    )


def _path_problems(
    noun: str, wanted: Mapping[str, Shape], given: Mapping[str, Tensor], tied: Mapping[str, str]
) -> Iterator[str]:
    for path in wanted.keys() - given.keys():
        yield f"{noun} {path}: the Step has it, the State does not"
    for path in given.keys() - wanted.keys():
        known = f"; it is tied, and known as {tied[path]}" if path in tied else ""
        yield f"{noun} {path}: the State has it, the Step does not{known}"


def _tensor_problems(
    noun: str, wanted: Mapping[str, Shape], given: Mapping[str, Tensor], tied: Mapping[str, str]
) -> Iterator[str]:
    yield from _path_problems(noun, wanted, given, tied)
    for path, (shape, dtype) in wanted.items():
        seen = given.get(path)
        if seen is not None and (tuple(seen.shape), seen.dtype) != (shape, dtype):
            yield (
                f"{noun} {path}: the Step has shape {shape} and {dtype}, the State has shape {tuple(seen.shape)} and "
                f"{seen.dtype}"
            )


def _optimizer_problems(wanted: Any, given: Any, paths: Any, where: str) -> Iterator[str]:
    """Differences in structure. A parameter may have no entry yet: it starts afresh when it is first touched."""
    if isinstance(wanted, dict) and isinstance(given, dict):
        for key in sorted(wanted.keys() | given.keys(), key=str):
            if key in wanted and key in given:
                yield from _optimizer_problems(wanted[key], given[key], paths, f"{where}[{key!r}]")
            elif key not in paths and wanted:  # an entry that is still empty may be filled as the optimizer likes
                has, has_not = ("Step", "State") if key in wanted else ("State", "Step")
                yield f"{where}[{key!r}]: the {has}'s optimizer has it, the {has_not}'s does not"
    elif isinstance(wanted, tuple) and isinstance(given, tuple) and len(wanted) == len(given):
        for index, (one, other) in enumerate(zip(wanted, given, strict=True)):
            yield from _optimizer_problems(one, other, paths, f"{where}[{index}]")
    elif isinstance(wanted, Tensor) and isinstance(given, Tensor):
        if wanted.shape != given.shape:
            yield f"{where}: the Step's has shape {tuple(wanted.shape)}, the State's {tuple(given.shape)}"
    elif type(wanted) is not type(given) or isinstance(wanted, tuple):
        yield f"{where}: the Step's optimizer keeps {_container(wanted)}, the State's {_container(given)}"


def _container(value: Any) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"
