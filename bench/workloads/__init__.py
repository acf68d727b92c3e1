"""The models and losses that are timed, written as their users write them, one family a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from bench.workloads.actor_critic import actor_critic
from bench.workloads.adversarial import adversarial, confusion
from bench.workloads.byol import byol
from bench.workloads.gan import gan
from bench.workloads.gpt import gpt
from bench.workloads.many_heads import many_heads
from bench.workloads.meetings import meeting_models, meetings
from bench.workloads.merge import Merge
from bench.workloads.program import Loop, Program
from bench.workloads.resnet import ResNet18, resnet
from bench.workloads.sac import sac
from bench.workloads.transformer import transformer
from bench.workloads.vit import vit
from bench.workloads.wgan_gp import wgan_gp
from bench.workloads.workload import MultiTask, Workload, mlp

__all__ = [
    "MEETINGS",
    "SCALES",
    "WORKLOADS",
    "Loop",
    "Merge",
    "MultiTask",
    "Program",
    "Workload",
    "actor_critic",
    "adversarial",
    "byol",
    "confusion",
    "make",
    "many_heads",
    "mlp",
    "resnet",
    "sac",
    "transformer",
    "wgan_gp",
]

SCALES = ("small", "large")
"""For two cores of a CPU, and for a GPU."""


def make(name: str, scale: str = "small") -> Workload | Program:
    """A workload with the same numbers every time, in any process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (WORKLOADS.get(name) or MEETINGS[name])[SCALES.index(scale)]()


_LARGE_BYOL = {"features": 512, "hidden": 4096, "outputs": 256, "image": 128, "size": 256}  # the paper's heads
_LARGE_VIT = {"width": 768, "depth": 12, "heads": 12, "size": 64, "image": 128, "patch": 8}

Make = Callable[[], Workload | Program]
WORKLOADS: Mapping[str, tuple[Make, Make]] = {
    "adversarial": (adversarial, partial(adversarial, width=4096, size=4096)),
    "confusion": (confusion, partial(confusion, width=4096, size=4096)),
    "resnet": (resnet, partial(resnet, image=128, size=256)),
    **{f"vit-{k}": (partial(vit, k), partial(vit, k, **_LARGE_VIT)) for k in (1, 2, 4, 8, 16)},
    "gpt": (gpt, partial(gpt, width=1024, depth=12, heads=16, size=16, length=512, vocabulary=16384, bottleneck=64)),
    "gan": (gan, partial(gan, width=4096, size=4096)),
    "actor-critic": (actor_critic, actor_critic),  # overhead is the point, at any scale
    "wgan-gp": (wgan_gp, partial(wgan_gp, width=4096, size=4096)),
    "byol": (byol, partial(byol, ResNet18, **_LARGE_BYOL)),
    "sac": (sac, partial(sac, width=2048, size=4096)),
}
"""Makers by the name that `--workloads` takes, one for each of `SCALES`."""

MEETINGS: Mapping[str, tuple[Make, Make]] = meetings(meeting_models(_LARGE_VIT))
"""Where losses meet under a rule. `--workloads` takes these, too; a run that names no workloads leaves them out."""
