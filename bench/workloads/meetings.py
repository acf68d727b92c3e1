"""Multi-task training under a merge rule: every loss updates the trunk and its own head, and in the trunk they meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads.merge import LOOSE, RULES, SAME, Merge
from bench.workloads.resnet import ResNet18
from bench.workloads.vit import vit
from bench.workloads.workload import NOT_WRITTEN, MultiTask, Workload, mlp

ITERATED = ("mgda", "cagrad")
"""Whose weights others find by iterations that stop early. UPGrad's are found exactly by TorchJD, too."""

MERGES = (
    *(Merge(rule, tolerance=LOOSE if rule in ITERATED else SAME) for rule in RULES),
    Merge("mgda", at="activations", tolerance=LOOSE),
)


def regression(width: int = 128, size: int = 128, tasks: int = 4) -> Workload:
    """A small MLP, where all is overhead but the rule."""
    return _multi_task(
        f"MLP, {tasks} losses",
        mlp(width // 2, width, width, width),
        [nn.Linear(width, 8) for _ in range(tasks)],
        F.mse_loss,
        lambda: (torch.randn(size, width // 2), torch.randn(tasks, size, 8)),
    )


def classification(image: int = 32, size: int = 32, tasks: int = 4) -> Workload:
    """ResNet-18 with its BatchNorm."""
    return _multi_task(
        f"ResNet-18, {tasks} losses",
        ResNet18(),
        [nn.Linear(512, 10) for _ in range(tasks)],
        F.cross_entropy,
        lambda: (torch.randn(size, 3, image, image), torch.randint(10, (tasks, size))),
    )


def _multi_task(
    name: str, trunk: nn.Module, heads: list[nn.Module], loss: Callable[..., Tensor], batch: Callable[[], Any]
) -> Workload:
    """One loss for every head, on targets of its own."""

    def losses(model: nn.Module, h: Tensor, batch: Any) -> dict[str, Tensor]:
        heads = model.get_submodule("heads").children()
        return {f"task{k}": loss(head(h), batch[1][k]) for k, head in enumerate(heads)}

    split = MultiTask(lambda model, batch: model.get_submodule("trunk")(batch[0]), losses, shared="trunk")
    return Workload(
        name,
        nn.ModuleDict({"trunk": trunk, "heads": nn.ModuleList(heads)}),
        split.together,
        {f"task{k}": ["trunk", f"heads.{k}"] for k in range(len(heads))},
        batch,
        multitask=split,
    )


def merged(made: Callable[[], Workload], merge: Merge) -> Workload:
    """A workload of several losses under a rule. What others wrote for the plain sum does not say it any more."""
    plain = made()
    name = f"{plain.name}, {merge.name}"
    return replace(plain, name=name, merge=merge, by_hand=NOT_WRITTEN, in_jax=NOT_WRITTEN)


Make = Callable[[], Workload]


def meetings(models: Mapping[str, tuple[Make, Make]]) -> dict[str, tuple[Make, Make]]:
    """Every rule on every model: `meet-MODEL-RULE`, with makers for both scales."""
    return {
        f"meet-{model}-{merge.name}": (partial(merged, small, merge), partial(merged, large, merge))
        for (model, (small, large)), merge in product(models.items(), MERGES)
    }


def meeting_models(large_vit: Mapping[str, int]) -> dict[str, tuple[Make, Make]]:
    """The models by the name that is part of a workload's; the largest ViT is the one of the plain workloads."""
    return {
        "mlp": (regression, partial(regression, width=4096, size=4096)),
        **{f"vit-{k}": (partial(vit, k), partial(vit, k, **large_vit)) for k in (2, 4, 8)},
        "resnet": (classification, partial(classification, image=128, size=256)),
    }
