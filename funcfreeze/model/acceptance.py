"""Which models can be used, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


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
            "loss.backward(): keep it in a loop with funcfreeze.combine(losses, routes, model).backward() "
            "(DistributedDataParallel around the whole model or modules of a mapping), or pass the module inside it "
            "(.module)"
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
