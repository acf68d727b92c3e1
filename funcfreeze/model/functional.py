"""An `nn.Module` as a pure function of its parameters and buffers: the only place that puts tensors into modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter, is_

import torch
from torch import Tensor, nn

from funcfreeze.model.census import Census
from funcfreeze.model.memory import memories_of, memory_of
from funcfreeze.model.sites import Site, grouped, present

Mark = tuple[int, int | None]
"""A tensor's version and memory: a write through `.data` changes neither, every other write one of them."""


_VERSION = attrgetter("_version")


def marks_of(tensors: Mapping[str, Tensor]) -> dict[str, Mark]:
    """What each tensor is at now."""
    values = tensors.values()
    return dict(zip(tensors, zip(map(_VERSION, values), memories_of(values), strict=True), strict=True))


def in_twin(name: str, path: str) -> str:
    """How a tensor of a twin is known beside those of the model.

    >>> in_twin("teacher", "net.weight")
    'targets.teacher.net.weight'
    """
    return f"targets.{name}.{path}"


def constant_problem(path: str) -> str:
    """A parameter of a twin was written to."""
    _, name, inside = path.split(".", 2)
    return (
        f"`losses` writes to parameter {inside} of target {name!r}, which moves after the step by what funcfreeze.ema "
        "declares; leave out what moves it in `losses`"
    )


@dataclass(frozen=True)
class Left:
    """What a call left in the module.

    Attributes:
        buffers: every buffer: those given, or what the call put in their place.
        written: the parameters that the call wrote to, of those that it may write to: their values now.
    """

    buffers: dict[str, Tensor]
    written: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class FunctionalModule:
    """A module, and where each of its parameters and buffers sits; and twins of its parts, which go beside it.

    Parameters and buffers are known by the first path `named_parameters()` and `named_buffers()` give, without what
    `torch.compile` adds; a tied one has several sites. Those of a twin are known by `in_twin(name, path)`: its buffers
    are among the others, and its parameters are constants, which a call is given with the buffers and only reads.

    Attributes:
        module: the user's.
        twins: by name.
        parameters: path -> sites.
        buffers: path -> sites, those of twins too.
        constants: path -> sites of the twins' parameters.
        census: what all parts of the module and of its twins held when the sites were noted.
    """

    module: nn.Module
    twins: Mapping[str, nn.Module]
    parameters: Mapping[str, tuple[Site, ...]]
    buffers: Mapping[str, tuple[Site, ...]]
    constants: Mapping[str, tuple[Site, ...]]
    census: Census

    @staticmethod
    def of(module: nn.Module, twins: Mapping[str, nn.Module] | None = None) -> FunctionalModule:
        """Note the sites of all parameters and buffers that the module, and twins of its parts, have now."""
        twins = twins or {}
        beside = [
            {in_twin(name, names[0]): sites for name, twin in twins.items() for names, sites in grouped(twin, store)}
            for store in ("_buffers", "_parameters")
        ]
        return FunctionalModule(
            module,
            twins,
            {names[0]: sites for names, sites in grouped(module, "_parameters")},
            {names[0]: sites for names, sites in grouped(module, "_buffers")} | beside[0],
            beside[1],
            Census.of([("", module), *((in_twin(name, ""), twin) for name, twin in twins.items())]),
        )

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All parts of the module and of its twins."""
        return self.census.modules

    def present_parameters(self) -> dict[str, Tensor]:
        """The parameters in the module now, by path."""
        with _EXCHANGING:
            return {path: present(sites[0], "_parameters") for path, sites in self.parameters.items()}

    def present_buffers(self) -> dict[str, Tensor]:
        """The buffers in the module now, by path."""
        with _EXCHANGING:
            return {path: present(sites[0], "_buffers") for path, sites in self.buffers.items()}

    def present_constants(self) -> dict[str, Tensor]:
        """The parameters in the twins now, by path."""
        with _EXCHANGING:
            return {path: present(sites[0], "_parameters") for path, sites in self.constants.items()}

    @cached_property
    def of_twins(self) -> frozenset[str]:
        """The paths of all tensors of twins."""
        start = tuple(in_twin(name, "") for name in self.twins)
        return frozenset(path for path in (*self.constants, *self.buffers) if path.startswith(start))

    def buffer(self, path: str) -> Tensor | None:
        """The buffer that is in the module now, or None if it is gone."""
        module, name = self.buffers[path][0]
        found: Tensor | None = module.__dict__["_buffers"].get(name)
        return found

    def parameter_hooks(self) -> list[tuple[str, Callable[[Tensor], Tensor | None]]]:
        """The hooks registered on the module's own parameters, which its stand-ins must carry too."""
        with _EXCHANGING:
            return [
                (path, hook)
                for path, (module, name) in self._first_places
                if (tensor := module.__dict__["_parameters"].get(name)) is not None and tensor._backward_hooks
                for hook in tensor._backward_hooks.values()
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
                present(sites[0], "_parameters").copy_(parameters[path])
            for path, value in buffers.items():
                sites = self.buffers[path]
                held = present(sites[0], "_buffers")
                if (held.shape, held.dtype) == (value.shape, value.dtype):
                    held.copy_(value)
                else:
                    _put(sites, "_buffers", value.clone())

    def exchange_buffers(self, f: Callable[[Tensor], Tensor]) -> None:
        """Put `f(buffer)` in the place of every buffer, wherever it is tied."""
        for path, tensor in self.present_buffers().items():
            _put(self.buffers[path], "_buffers", _with_attributes_of(tensor, f(tensor)))

    def exchange(self, f: Callable[[Tensor], Tensor]) -> None:
        """Put `f(tensor)` in the place of every parameter's values and of every buffer, wherever it is tied."""
        for parameter in self.present_parameters().values():
            parameter.data = f(parameter)
        self.exchange_buffers(f)

    @contextmanager
    def holding(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """These tensors are in the module inside the block; afterwards it holds its own again, whatever happens.

        The buffers are written to where a forward updates them in place: pass clones. The twins' parameters are among
        them, and only read.
        """
        release = self.hold(parameters, buffers)
        try:
            yield
        finally:
            release()

    def hold(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Callable[[], None]:
        """Put these tensors into the module; what is returned puts its own back, and must be called.

        The module's own dicts are written, not its attributes: `nn.Module.__setattr__` takes only `nn.Parameter`s where
        a parameter was.

        Raises:
            RuntimeError: the model has lost a parameter or a buffer since its sites were noted. Nothing has changed.
        """
        _EXCHANGING.acquire()
        taken: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
        stores: list[dict[str, Tensor | None]] = []
        kept: list[dict[str, Tensor | None] | None] = []

        def release() -> None:
            try:
                for store, name, own, _ in taken:
                    store[name] = own
                for store, before in zip(stores, kept, strict=False):  # Ctrl-C may come between the two
                    if store or before:  # also where a forward adds or removes one
                        store.clear()
                        store.update(before or {})
            finally:
                _EXCHANGING.release()

        try:
            own_buffers = self.present_buffers() if self.buffers else {}  # all are there
            given_at = (
                {**parameters, **{path: buffers[path] for path in self.constants}} if self.constants else parameters
            )
            taken += [
                (site[0].__dict__["_parameters"], site[1], present(site, "_parameters"), given_at[path])
                for path, site in self._places
            ]
            stores += [module.__dict__["_buffers"] for module in self.modules]
            kept += [store.copy() if store else None for store in stores]
            for store, name, own, given in taken:
                store[name] = _with_attributes_of(own, given)
            self.put_buffers({path: _with_attributes_of(own, buffers[path]) for path, own in own_buffers.items()})
        except BaseException:
            release()
            raise
        return release

    @property
    def alone(self) -> AbstractContextManager[bool]:
        """Inside, no other thread has its tensors in a module."""
        return _EXCHANGING

    def left(self, given: Mapping[str, Tensor], marks: Mapping[str, Mark], may_write: AbstractSet[str]) -> Left:
        """What a call left behind; asked while its tensors are held.

        Args:
            given: the parameters that the module, and its twins, were given to hold.
            marks: what these tensors were at before the call.
            may_write: the paths of parameters whose values a call may exchange.

        Raises:
            RuntimeError: the call changed a parameter that it may only read; it added or removed parameters or buffers;
                or the module is no longer what it was when its sites were noted.
        """
        problems: list[str] = []
        written: dict[str, Tensor] = {}
        now = marks_of(given)
        known = {**self.parameters, **self.constants}
        for path, sites in () if now == marks and self._holds(given) else known.items():
            tensor, mark = given[path], marks[path]
            found = [module.__dict__["_parameters"].get(name) for module, name in sites]
            if mark == now[path] and all(held is tensor for held in found):
                continue
            problem = _write_problem(path, tensor, mark, found, path in may_write)
            if path in self.constants:
                problems.append(constant_problem(path))
            elif problem is not None:
                problems.append(problem)
            elif found[0] is not None:
                written[path] = found[0].detach()
        buffers = {path: self.buffer(path) for path in self.buffers}
        problems += self._problems_with_the_set(buffers)
        if problems:
            raise RuntimeError("\n".join(problems))
        # a state is plain data, without what somebody keeps on its tensors
        there = {
            path: tensor.detach() if tensor.__dict__ else tensor
            for path, tensor in buffers.items()
            if tensor is not None
        }
        return Left(there, written)

    def _holds(self, given: Mapping[str, Tensor]) -> bool:
        """Whether the module holds these parameters."""
        held = [module.__dict__["_parameters"].get(name) for _, (module, name) in self._places]
        return all(map(is_, held, [given[path] for path, _ in self._places]))

    @cached_property
    def _first_places(self) -> list[tuple[str, Site]]:
        """Every parameter of the model at the first of its sites."""
        return [(path, sites[0]) for path, sites in self.parameters.items()]

    @cached_property
    def _places(self) -> list[tuple[str, Site]]:
        """Every parameter, those of twins too, at each of its sites."""
        return [(path, site) for path, sites in {**self.parameters, **self.constants}.items() for site in sites]

    def hold_copies(self, tensors: Mapping[str, Tensor]) -> None:
        """Put copies of these buffers into the module, until it gets its own back."""
        held = self.present_buffers() if tensors else {}
        self.put_buffers({path: _with_attributes_of(held[path], tensor.clone()) for path, tensor in tensors.items()})

    def put_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Put these buffers into the module, wherever they are tied."""
        for path, tensor in tensors.items():
            _put(self.buffers[path], "_buffers", tensor)

    def _problems_with_the_set(self, buffers: Mapping[str, Tensor | None]) -> Iterator[str]:
        """What a call did to the set of parameters and buffers, which a state cannot follow."""
        for path, held in buffers.items():
            if held is None:
                yield f"the forward removed buffer {path} or set it to None; give it a value instead, zeros for example"
        yield from self.problems_with_new_ones()

    def problems_with_new_ones(self) -> Iterator[str]:
        """Parameters and buffers that the module holds by now, and did not when its sites were noted."""
        return self.census.problems()


def _with_attributes_of(own: Tensor, given: Tensor) -> Tensor:
    """What stands for a tensor, with what somebody keeps on that (`weight.scale`); but for Dynamo's notes on it."""
    if own.__dict__:
        given.__dict__ |= {name: value for name, value in own.__dict__.items() if not name.startswith("_dynamo_")}
    return given


_EXCHANGING = threading.RLock()
"""Held while a module holds tensors that are not its own. Modules are shared in ways nobody can see from here (another
`Step`, another `ModuleDict` around the same parts), so one lock serves them all; a call inside a call may pass."""


def _put(sites: Sequence[Site], store: str, tensor: Tensor) -> None:
    """Put a tensor at all of its sites."""
    for module, name in sites:
        module.__dict__[store][name] = tensor


def _write_problem(path: str, given: Tensor, mark: Mark, found: Sequence[Tensor | None], may_write: bool) -> str | None:
    """What is wrong with a call's write to a parameter, or None.

    Args:
        path: of the parameter.
        given: what the module was given to hold.
        mark: what that was at before the call.
        found: what is at each of the parameter's sites now.
        may_write: whether a call may exchange its values.
    """
    now = found[0]
    if now is None or any(tensor is not now for tensor in found):
        return f"the forward removed parameter {path}, or put different tensors in the places of one that is tied"
    if may_write:
        return None
    if now is not given:
        seen = "put another tensor in the place of"
    elif memory_of(given) != mark[1]:
        seen = "exchanged the memory (.data = ...) of"
    else:
        seen = f"changed in place (version {mark[0]} became {given._version}) the value, which the state now holds, of"
    return (
        f"the forward {seen} parameter {path}, which a loss may update: its gradient belongs to neither value; "
        "`losses` may only read such parameters: change them between steps, with state.replace(params=...)"
    )
