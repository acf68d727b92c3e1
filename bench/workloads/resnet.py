"""ResNet-18, domain-adversarial.

Layer by layer and name by name torchvision's, written out because torchvision's wheels need the CUDA build of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads.workload import MultiTask, Reversal, Workload, mlp


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride != 1 or inside != outside:
            around = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.downsample = nn.Sequential(around, nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet18(nn.Module):
    """Up to the pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Residual(64, 64, 1), Residual(64, 64, 1))
        self.layer2 = nn.Sequential(Residual(64, 128, 2), Residual(128, 128, 1))
        self.layer3 = nn.Sequential(Residual(128, 256, 2), Residual(256, 256, 1))
        self.layer4 = nn.Sequential(Residual(256, 512, 2), Residual(512, 512, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


def _losses(model: nn.Module, h: Tensor, batch: Any) -> dict[str, Tensor]:
    _, label, domain = batch
    return {
        "cls": F.cross_entropy(model["classifier"](h), label),
        "dom": F.cross_entropy(model["domain"](h), domain),
    }


def _by_hand(model: nn.Module, batch: Any) -> Tensor:
    images, label, domain = batch
    h = model["encoder"](images)
    cls = F.cross_entropy(model["classifier"](h), label)
    return cls + F.cross_entropy(model["domain"](Reversal.apply(h)), domain)


def resnet(image: int = 32, size: int = 32) -> Workload:
    """A class loss for everything but the domain head, a domain loss that the encoder works against."""

    def in_jax() -> Callable[..., Any]:
        from bench.in_jax import resnet as written

        return written.losses

    split = MultiTask(lambda model, batch: model["encoder"](batch[0]), _losses, shared="encoder")
    return Workload(
        "ResNet-18, adversarial",
        nn.ModuleDict({"encoder": ResNet18(), "classifier": nn.Linear(512, 10), "domain": mlp(512, 256, 2)}),
        split.together,
        {"cls": ["encoder", "classifier"], "dom": {"domain": 1.0, "encoder": -0.1}},
        lambda: (torch.randn(size, 3, image, image), torch.randint(10, (size,)), torch.randint(2, (size,))),
        by_hand=_by_hand,
        multitask=split,
        in_jax=in_jax,
    )
