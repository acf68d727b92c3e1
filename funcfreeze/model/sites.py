"""Where the tensors of a module sit, and its parameters as selectors see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from funcfreeze.declare.selectors import Leaf

Site = tuple[nn.Module, str]
"""Where a tensor sits: the module that holds it and its name there."""


Group = tuple[tuple[str, ...], tuple[Site, ...]]
"""All names of a tensor, and all sites."""


def grouped(module: nn.Module, store: str) -> list[Group]:
    """All names and sites of each distinct tensor in `_parameters` or `_buffers`, in the order torch gives.

    What `torch.compile` puts into the names is left out where that is unambiguous.
    """
    groups = _as_torch_names_them(module, store)
    clear = _clear_names([name for names, _ in groups for name in names])
    return [(tuple(clear[name] for name in names), sites) for names, sites in groups]


def other_names(module: nn.Module, store: str) -> dict[str, str]:
    """All other names that a tensor in a store goes by, ties and how torch writes them, with the one it is known by."""
    groups = _as_torch_names_them(module, store)
    clear = _clear_names([name for names, _ in groups for name in names])
    known = {name: clear[names[0]] for names, _ in groups for name in names}
    found = {**known, **{clear[name]: path for name, path in known.items()}}
    return {name: path for name, path in found.items() if name != path}


def clear_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The parts of a module by all of their paths, also without what `torch.compile` puts into them."""
    named = dict(module.named_modules(remove_duplicate=False))
    clear = _clear_names([*named])
    return {**named, **{clear[path]: part for path, part in named.items()}}


def _clear_names(names: Sequence[str]) -> dict[str, str]:
    """The names without `_orig_mod`, of which each stands for one.

    >>> _clear_names(["_orig_mod.encoder.weight", "head.weight"])
    {'_orig_mod.encoder.weight': 'encoder.weight', 'head.weight': 'head.weight'}
    >>> _clear_names(["_orig_mod.weight", "weight"])
    {'_orig_mod.weight': '_orig_mod.weight', 'weight': 'weight'}
    """
    clear = {name: ".".join(part for part in name.split(".") if part != "_orig_mod") for name in names}
    number = Counter(clear.values())
    return {name: short if number[short] == 1 else name for name, short in clear.items()}


def _as_torch_names_them(module: nn.Module, store: str) -> list[Group]:
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


def present(site: Site, store: str) -> Tensor:
    """The tensor that is at a site now; `RuntimeError` if there is none."""
    module, name = site
    tensor: Tensor | None = module.__dict__[store].get(name)
    if tensor is None:
        raise RuntimeError(
            f"{type(module).__name__}.{name} is gone: the model has changed since the Step was built; build the Step "
            "after the model is complete"
        )
    return tensor


def module_leaves(module: nn.Module) -> list[Leaf]:
    """The parameters of a module as selectors see them, by the names of `grouped` and in its order.

    Ties are one leaf with all its names. Its modules are those that hold it under any of them.
    """
    types = {path: type(inner) for path, inner in module.named_modules(remove_duplicate=False)}
    leaves = []
    groups = _as_torch_names_them(module, "_parameters")
    clear = _clear_names([name for names, _ in groups for name in names])
    for names, sites in groups:
        tensor = present(sites[0], "_parameters")
        short = tuple(clear[name] for name in names)
        written = {clear[name]: name for name in names if clear[name] != name}
        leaves.append(Leaf(short, tensor, _ancestors(names, types), tensor.requires_grad, written))
    return leaves


def part_leaves(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, Leaf]]:
    """Parts of a module, itself among them, each as selectors see a parameter that is in it and has its very path.

    Args:
        module: whose parts.
        wanted: which of them.
    """
    named = [*module.named_modules(remove_duplicate=False)]
    types = {path: type(inner) for path, inner in named}
    parts = {id(inner): inner for _, inner in named if wanted(inner)}
    names: dict[int, list[str]] = {}
    for path, inner in named:
        if id(inner) in parts:
            names.setdefault(id(inner), []).append(path)
    clear = _clear_names([path for paths in names.values() for path in paths])
    return [
        (
            parts[key],
            Leaf(
                tuple(clear[path] for path in paths),
                _NO_TENSOR,
                (*_ancestors(paths, types), type(parts[key])),
                written={clear[path]: path for path in paths if clear[path] != path},
            ),
        )
        for key, paths in names.items()
    ]


_NO_TENSOR = torch.empty(0, device="cpu")


def _ancestors(names: Sequence[str], types: Mapping[str, type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    found: dict[type[nn.Module], None] = {}
    for name in names:
        parts = name.split(".")
        found |= {types[".".join(parts[:depth])]: None for depth in range(len(parts))}
    return tuple(found)
