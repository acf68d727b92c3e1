"""Which models can be used, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from funcfreeze.model.mapping import Parts

_WITHOUT_A_SHAPE = nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer


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
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lazy = [path for path, tensor in tensors if isinstance(tensor, _WITHOUT_A_SHAPE)]
    if lazy:
        raise ValueError(
            "parameters or buffers without a shape yet (lazy modules): "
            f"{', '.join(lazy)}; run one batch through the model first"
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
    if getattr(module, "_is_replica", False):
        return (
            f"{where} is a replica that nn.DataParallel made for one device, and its tensors are copies that no "
            "gradient is kept for: take the losses from what the DataParallel module returns, outside of it"
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
    """The model as one module: a mapping is held by an `nn.ModuleDict`, so that paths start with its names.

    Raises:
        TypeError: not a module, nor a mapping of modules and parameters.
        ValueError: names that a module cannot hold.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, Mapping) or not model:
        seen = "an empty one" if isinstance(model, Mapping) else type(model).__name__
        raise TypeError(f"the model is an nn.Module or a mapping of them, got {seen}")
    kinds = (nn.Module, nn.Parameter)
    others = [f"{name!r}: {type(inner).__name__}" for name, inner in model.items() if not isinstance(inner, kinds)]
    if others:
        raise TypeError(
            f"a mapping of modules holds nn.Modules and nn.Parameters only, got {', '.join(others)}; make a parameter "
            "of a tensor that is to be trained by nn.Parameter(tensor)"
        )
    problems = [problem for name in model if (problem := _name_problem(name))]
    if problems:
        raise ValueError("\n".join(problems))
    if any(isinstance(inner, nn.Parameter) for inner in model.values()):
        return Parts(model)
    return nn.ModuleDict(dict(model))


def _name_problem(name: object) -> str | None:
    if not isinstance(name, str) or not name:
        return f"a module is named by a non-empty string, got {name!r}"
    if "." in name:
        return (
            f"the module name {name!r} has a dot, which separates the parts of a path; use {name.replace('.', '_')!r}"
        )
    if name in dir(nn.ModuleDict()) or name in dir(Parts({})):
        return f"the module name {name!r} is taken by nn.ModuleDict itself; use {name + '_'!r}"
    return None
