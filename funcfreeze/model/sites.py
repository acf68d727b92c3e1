"""Where the tensors of a module sit, and its parameters as selectors see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from funcfreeze.declare.selectors import Leaf

Site = tuple[nn.Module, str]
"""Where a tensor sits: the module that holds it and its name there."""


def grouped(module: nn.Module, store: str) -> list[tuple[tuple[str, ...], tuple[Site, ...]]]:
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
    """The parameters of a module as selectors see them, in the order of `named_parameters()`.

    Ties are one leaf with all its names. Its modules are those that hold it under any of them.
    """
    types = {path: type(inner) for path, inner in module.named_modules(remove_duplicate=False)}
    leaves = []
    for names, sites in grouped(module, "_parameters"):
        tensor = present(sites[0], "_parameters")
        leaves.append(Leaf(names, tensor, _ancestors(names, types), tensor.requires_grad))
    return leaves


def _ancestors(names: Sequence[str], types: Mapping[str, type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    found: dict[type[nn.Module], None] = {}
    for name in names:
        parts = name.split(".")
        found |= {types[".".join(parts[:depth])]: None for depth in range(len(parts))}
    return tuple(found)
