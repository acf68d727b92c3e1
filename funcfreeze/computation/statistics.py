"""Norms whose running statistics stay as they are: they are in eval mode by their own flag, while `losses` runs.

It is what people write, `model.train()` and then `eval()` on some norms, but for the time of a call: outside of it
every flag is the user's. Dynamo guards the flags, so compiled code sees them as eager code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # what its norms with running statistics have in common

from funcfreeze.declare.plan import FrozenStatistics, raise_problems
from funcfreeze.declare.routes import Selection
from funcfreeze.declare.selectors import Leaf, RouteError, Selector, label, module_problems, to_selector
from funcfreeze.model.sites import part_leaves

_NOUN = "norm with running statistics"


@dataclass(frozen=True, eq=False)
class FrozenNorms:
    """The norms of a module that keep their running statistics.

    Attributes:
        declared: their paths, as a plan has them; None if there are none.
        norms: the modules, in that order.

    >>> net = nn.ModuleDict({"backbone": nn.BatchNorm1d(2), "head": nn.BatchNorm1d(2)})
    >>> frozen = FrozenNorms.of(net, "backbone", None)
    >>> with frozen.holding():
    ...     net["backbone"].training, net["head"].training
    (False, True)
    >>> net["backbone"].training
    True
    """

    declared: FrozenStatistics | None
    norms: tuple[nn.Module, ...]

    @staticmethod
    def of(module: nn.Module, selection: Selection | None, planned: FrozenStatistics | None) -> FrozenNorms:
        """The norms that a selection of modules stands for, or a plan names.

        Raises:
            RouteError: everything that is wrong with the selection, or what the plan names and the module does not
                have, or both are given and differ.
        """
        found = part_leaves(module, has_statistics)
        norms = {leaf.path: norm for norm, leaf in found}
        if selection is not None:
            declared = _resolved(selection, module, [leaf for _, leaf in found])
            if planned is not None and declared != planned:
                raise RouteError(
                    f"frozen_statistics selects {', '.join(declared.norms)}, and the plan that was given as routes "
                    f"freezes the statistics of {', '.join(planned.norms)}; leave one of them out"
                )
        elif planned is not None:
            declared = planned
            raise_problems(
                [
                    f"the plan freezes the statistics of {path}, no {_NOUN} of the model; {_known([*norms], module)}"
                    for path in declared.norms
                    if path not in norms
                ]
            )
        else:
            return FrozenNorms(None, ())
        return FrozenNorms(declared, tuple(norms[path] for path in declared.norms))

    @staticmethod
    def union(several: Iterable[FrozenNorms]) -> FrozenNorms:
        """The norms of all of these, over one module."""
        paths: dict[str, nn.Module] = {}
        selectors: dict[str, None] = {}
        for frozen in several:
            if frozen.declared is not None:
                paths |= zip(frozen.declared.norms, frozen.norms, strict=True)
                selectors |= dict.fromkeys(frozen.declared.declared)
        declared = FrozenStatistics(tuple(paths), tuple(selectors)) if paths else None
        return FrozenNorms(declared, tuple(paths.values()))

    def hold(self) -> Callable[[], None]:
        """Put the norms into eval mode; what is returned gives them back their flags, and must be called."""
        parts = [vars(norm) for norm in self.norms]
        before = [part["training"] for part in parts]

        def release() -> None:
            for part, training in zip(parts, before, strict=True):
                part["training"] = training

        for part in parts:
            part["training"] = False
        return release

    @contextmanager
    def holding(self) -> Iterator[None]:
        """The norms are in eval mode inside the block."""
        release = self.hold()
        try:
            yield
        finally:
            release()

    def problems(self) -> list[str]:
        """What a call did to the flags; asked while they are held."""
        paths = () if self.declared is None else self.declared.norms
        moved = [path for path, norm in zip(paths, self.norms, strict=True) if norm.training]
        if not moved:
            return []
        return [
            f"`losses` has put {', '.join(moved)} into train mode (by train() on a module around it, or training = "
            "True), and frozen_statistics keeps its running statistics: call train() and eval() outside of `losses`, "
            "between steps, or leave it out of frozen_statistics"
        ]


def has_statistics(module: nn.Module) -> bool:
    """Whether it moves statistics in train mode, and normalises by them in eval mode."""
    return isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None


def _resolved(selection: Selection, module: nn.Module, norms: Sequence[Leaf]) -> FrozenStatistics:
    selectors: Sequence[Any] = selection if isinstance(selection, list | tuple) else [selection]
    if not selectors:
        raise RouteError("frozen_statistics: an empty list selects nothing; leave it out")
    raise_problems([_form_problem(selector, module) for selector in selectors if not _is_selector(selector)])
    modules = [leaf for _, leaf in part_leaves(module, lambda part: part is not module or not part._modules)]
    problems: list[str] = []
    for selector in map(to_selector, selectors):
        found = [*module_problems(selector, modules, norms, _NOUN)]
        if not found and not any(map(selector.matches, norms)):
            found = [f"{selector} leaves no {_NOUN}"]
        problems += [f"frozen_statistics: {problem}" for problem in found]
    if problems:
        raise_problems([*problems[:-1], f"{problems[-1]}; {_known([leaf.path for leaf in norms], module)}"])
    chosen = [leaf.path for leaf in norms if any(to_selector(selector).matches(leaf) for selector in selectors)]
    return FrozenStatistics(tuple(chosen), tuple(map(label, selectors)))


def _is_selector(given: object) -> bool:
    return isinstance(given, str | Selector)


def _form_problem(given: object, module: nn.Module) -> str:
    if not isinstance(given, nn.Module):
        return (
            'frozen_statistics selects modules by a string, or by path, regex or kind ("*" is all of them); got '
            f"{type(given).__name__}: {given!r}"
        )
    paths = [repr(path) for path, part in module.named_modules() if part is given and path]
    return (
        f"frozen_statistics selects modules by their paths; for this {type(given).__name__} write "
        f"{paths[0] if paths else 'its path in the model'}"
    )


def _known(paths: Sequence[str], module: nn.Module) -> str:
    """Which norms there are, or, if none keeps statistics, what else is one."""
    if paths:
        shown = ", ".join(path or "the model itself" for path in paths[:8])
        return f"the norms with running statistics are {shown}{f' and {len(paths) - 8} more' if paths[8:] else ''}"
    others = part_leaves(module, lambda part: "Norm" in type(part).__name__)
    kinds = sorted({type(norm).__name__ for norm, _ in others})
    return f"the model has none: its {', '.join(kinds)} keeps none" if kinds else "the model has none"
