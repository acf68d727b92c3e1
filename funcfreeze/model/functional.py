"""An `nn.Module` as a pure function of its parameters and buffers: the only place that puts tensors into modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funcfreeze.declare.selectors import Leaf

Site = tuple[nn.Module, str]
"""Where a tensor sits: the module that holds it and its name there."""


@dataclass(frozen=True, eq=False)
class FunctionalModule:
    """A module, and where each of its parameters and buffers sits.

    Parameters and buffers are known by the first path `named_parameters()` and `named_buffers()` give; a tied one has
    several sites.
    """

    module: nn.Module
    parameters: Mapping[str, tuple[Site, ...]]
    buffers: Mapping[str, tuple[Site, ...]]

    @staticmethod
    def of(module: nn.Module) -> FunctionalModule:
        """Note the sites of all parameters and buffers the module has now."""
        return FunctionalModule(
            module,
            {names[0]: sites for names, sites in _grouped(module, "_parameters")},
            {names[0]: sites for names, sites in _grouped(module, "_buffers")},
        )

    def present_parameters(self) -> dict[str, Tensor]:
        """The parameters in the module now, by path."""
        with _EXCHANGING:
            return {path: _present(sites[0], "_parameters") for path, sites in self.parameters.items()}

    def present_buffers(self) -> dict[str, Tensor]:
        """The buffers in the module now, by path."""
        with _EXCHANGING:
            return {path: _present(sites[0], "_buffers") for path, sites in self.buffers.items()}

    def parameter_hooks(self) -> list[tuple[str, Callable[[Tensor], Tensor | None]]]:
        """The hooks registered on the module's own parameters, which its stand-ins must carry too."""
        return [
            (path, hook)
            for path, tensor in self.present_parameters().items()
            for hook in (tensor._backward_hooks or {}).values()
        ]

    def refuse_accumulation_hooks(self) -> None:
        """Refuse parameters with hooks on `.grad`, to which nothing is accumulated here.

        Raises:
            ValueError: naming every such parameter.
        """
        hooked = [path for path, tensor in self.present_parameters().items() if tensor._post_accumulate_grad_hooks]
        if hooked:
            raise ValueError(
                f"{', '.join(hooked)} has a hook that runs after .grad is accumulated, which a Step never does; remove "
                "it (an optimizer in the backward has nothing to add to a Step), or use funcfreeze.backward"
            )

    def write(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Write values into the module: in place, or as new tensors where a buffer has changed its shape or dtype."""
        with _EXCHANGING, torch.no_grad():
            for path, sites in self.parameters.items():
                _present(sites[0], "_parameters").copy_(parameters[path])
            for path, sites in self.buffers.items():
                held, value = _present(sites[0], "_buffers"), buffers[path]
                if (held.shape, held.dtype) == (value.shape, value.dtype):
                    held.copy_(value)
                    continue
                for module, name in sites:
                    module.__dict__["_buffers"][name] = value.clone()

    def exchange_buffers(self, f: Callable[[Tensor], Tensor]) -> None:
        """Put `f(buffer)` in the place of every buffer, wherever it is tied."""
        for path, tensor in self.present_buffers().items():
            exchanged = f(tensor)
            for module, name in self.buffers[path]:
                module.__dict__["_buffers"][name] = exchanged

    def exchange(self, f: Callable[[Tensor], Tensor]) -> None:
        """Put `f(tensor)` in the place of every parameter's values and of every buffer, wherever it is tied."""
        for parameter in self.present_parameters().values():
            parameter.data = f(parameter)
        self.exchange_buffers(f)

    def call(
        self, f: Callable[[nn.Module], Any], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """`f(module)` with these tensors in the module, which holds its own again afterwards, whatever happens.

        Returns:
            What `f` returned, and the buffers as the call left them: those given, or what the forward put in their
            place. The given buffers are written to where the forward updates them in place: pass clones.

        Raises:
            RuntimeError: as `buffers_after`.
        """
        with self.holding(parameters, buffers):
            versions = {path: tensor._version for path, tensor in parameters.items()}
            result = f(self.module)
            return result, self.buffers_after(parameters, versions)

    @contextmanager
    def holding(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """These tensors are in the module inside the block; afterwards it holds its own again.

        A backward belongs inside, too: activation checkpointing runs parts of the module once more.
        """
        with (
            _EXCHANGING,
            _buffers_kept(self.module),
            _in_place_of(self.parameters, "_parameters", parameters),
            _in_place_of(self.buffers, "_buffers", buffers),
        ):
            yield

    def buffers_after(self, parameters: Mapping[str, Tensor], versions: Mapping[str, int]) -> dict[str, Tensor]:
        """The buffers as a call left them, by path; asked while its tensors are held.

        Args:
            parameters: what the module was given to hold.
            versions: of these tensors, before the call.

        Raises:
            RuntimeError: the call changed a parameter, in place or by putting another one in its place, or it added or
                removed a buffer; or the module is no longer what it was when its sites were noted.
        """
        problems = [
            problem
            for path, sites in self.parameters.items()
            if (problem := _changed(path, sites, parameters[path], versions[path]))
        ]
        problems += self._buffer_problems()
        if problems:
            raise RuntimeError("\n".join(problems))
        return self.present_buffers()

    def hold_copies(self, tensors: Mapping[str, Tensor]) -> None:
        """Put copies of these buffers into the module, until the block of `holding` ends."""
        for path, tensor in tensors.items():
            copy = tensor.clone()
            for module, name in self.buffers[path]:
                module.__dict__["_buffers"][name] = copy

    def _buffer_problems(self) -> Iterator[str]:
        """What the call did to the set of buffers, which a state cannot follow."""
        known = {(id(module), name) for sites in self.buffers.values() for module, name in sites}
        for path, sites in self.buffers.items():
            if any(module.__dict__["_buffers"].get(name) is None for module, name in sites):
                yield f"the forward removed buffer {path} or set it to None; give it a value instead, zeros for example"
        for prefix, module in self.module.named_modules():
            for name, tensor in module.__dict__["_buffers"].items():
                if tensor is not None and (id(module), name) not in known:
                    yield (
                        f"the forward made a buffer, {prefix}.{name}, that was None when the Step was built; run one "
                        "batch through the model first"
                    )


def module_leaves(module: nn.Module) -> list[Leaf]:
    """The parameters of a module as selectors see them, in the order of `named_parameters()`.

    Ties are one leaf with all its names. Its modules are those that hold it under any of them.
    """
    types = {path: type(inner) for path, inner in module.named_modules(remove_duplicate=False)}
    return [
        Leaf(names, _present(sites[0], "_parameters"), _ancestors(names, types), _trainable(sites[0]))
        for names, sites in _grouped(module, "_parameters")
    ]


def _trainable(site: Site) -> bool:
    return _present(site, "_parameters").requires_grad


def _ancestors(names: Sequence[str], types: Mapping[str, type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    found: dict[type[nn.Module], None] = {}
    for name in names:
        parts = name.split(".")
        found |= {types[".".join(parts[:depth])]: None for depth in range(len(parts))}
    return tuple(found)


def _grouped(module: nn.Module, store: str) -> list[tuple[tuple[str, ...], tuple[Site, ...]]]:
    """All names and sites of each distinct tensor in `_parameters` or `_buffers`, in the order torch gives."""
    names: dict[int, list[str]] = {}
    sites: dict[int, list[Site]] = {}
    for prefix, inner in module.named_modules(remove_duplicate=False):
        for name, tensor in inner.__dict__[store].items():
            if tensor is None:
                continue
            names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
            held = sites.setdefault(id(tensor), [])
            if (inner, name) not in held:
                held.append((inner, name))
    return [(tuple(names[key]), tuple(sites[key])) for key in names]


def _present(site: Site, store: str) -> Tensor:
    module, name = site
    tensor: Tensor | None = module.__dict__[store].get(name)
    if tensor is None:
        raise RuntimeError(
            f"{type(module).__name__}.{name} is gone: the model has changed since the Step was built; build the Step "
            "after the model is complete"
        )
    return tensor


_EXCHANGING = threading.RLock()
"""Held while a module holds tensors that are not its own. Modules are shared in ways nobody can see from here (another
`Step`, another `ModuleDict` around the same parts), so one lock serves them all; a call inside a call may pass."""


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Leave every module with the buffers it had, also where a forward adds or removes one."""
    saved = [(inner.__dict__["_buffers"], dict(inner.__dict__["_buffers"])) for inner in module.modules()]
    try:
        yield
    finally:
        for store, before in saved:
            store.clear()
            store.update(before)


@contextmanager
def _in_place_of(places: Mapping[str, tuple[Site, ...]], store: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors at their sites, and what was there back on leaving.

    The module's own dicts are written, not its attributes: `nn.Module.__setattr__` takes only `nn.Parameter`s where a
    parameter was.
    """
    saved = [(site, _present(site, store)) for sites in places.values() for site in sites]
    try:
        for path, sites in places.items():
            for module, name in sites:
                module.__dict__[store][name] = tensors[path]
        yield
    finally:
        for (module, name), tensor in saved:
            module.__dict__[store][name] = tensor


def _changed(path: str, sites: Sequence[Site], given: Tensor, version: int) -> str | None:
    """What the call did to a parameter that it may only read, or None."""
    if any(module.__dict__["_parameters"].get(name) is not given for module, name in sites):
        return f"the forward put another tensor in the place of parameter {path}; `losses` may only read parameters"
    if given._version != version:
        return (
            f"the forward changed parameter {path} in place (its version went from {version} to {given._version}), "
            "so its gradient belongs to neither value, and the state holds the new one already; `losses` may only read "
            "parameters: change them between steps, with state.replace(params=...)"
        )
    return None


def refuse_unusable(module: nn.Module) -> None:
    """Refuse modules whose parameters cannot be handled as plain tensors, saying why and what to do.

    Raises:
        TypeError: not an `nn.Module`, or one wrapped by DDP, `fully_shard` or TorchScript.
        ValueError: lazy parameters that have no shape yet, or strided nested parameters.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"the model is an nn.Module or a mapping of them, got {type(module).__name__}")
    problems = [problem for path, inner in module.named_modules() if (problem := _refusal(path, inner))]
    if problems:
        raise TypeError("\n".join(problems))
    lazy = [path for path, p in module.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"parameters without a shape yet (lazy modules): {', '.join(lazy)}; run one batch through the model first"
        )
    nested = [path for path, p in module.named_parameters() if p.is_nested and p.layout == torch.strided]
    if nested:
        raise ValueError(
            f"strided nested parameters: {', '.join(nested)}; autograd cannot plan them, use layout=torch.jagged"
        )


def _refusal(path: str, module: nn.Module) -> str | None:
    where = f"module {path!r}" if path else "the model"
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if kinds & {"DistributedDataParallel", "DataParallel"}:
        return (
            f"{where} is wrapped by {type(module).__name__}, which reduces gradients by hooks that fire only in "
            "loss.backward(); pass the module inside it (.module) and reduce the merged gradient yourself"
        )
    if "FSDPModule" in kinds or "FullyShardedDataParallel" in kinds:
        return (
            f"{where} is sharded by fully_shard, which gathers parameters by hooks that gradients taken here "
            "do not fire; pass the module before it is sharded"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return f"{where} is a ScriptModule, whose parameters cannot be exchanged; pass the nn.Module it was made from"
    return None


def as_module(model: object) -> nn.Module:
    """The model as one module: a mapping of modules is held by an `nn.ModuleDict`, so that paths start with its names.

    Raises:
        TypeError: not a module, nor a mapping of modules.
        ValueError: names that a `ModuleDict` cannot hold.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, Mapping) or not model:
        seen = "an empty one" if isinstance(model, Mapping) else type(model).__name__
        raise TypeError(f"the model is an nn.Module or a mapping of them, got {seen}")
    others = [f"{name!r}: {type(inner).__name__}" for name, inner in model.items() if not isinstance(inner, nn.Module)]
    if others:
        raise TypeError(f"a mapping of modules holds nn.Modules only, got {', '.join(others)}")
    problems = [problem for name in model if (problem := _name_problem(name))]
    if problems:
        raise ValueError("\n".join(problems))
    return nn.ModuleDict(dict(model))


def _name_problem(name: object) -> str | None:
    if not isinstance(name, str) or not name:
        return f"a module is named by a non-empty string, got {name!r}"
    if "." in name:
        return (
            f"the module name {name!r} has a dot, which separates the parts of a path; use {name.replace('.', '_')!r}"
        )
    if name in dir(nn.ModuleDict()):
        return f"the module name {name!r} is taken by nn.ModuleDict itself; use {name + '_'!r}"
    return None
