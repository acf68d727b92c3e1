"""scikit-learn's handwritten digits (1797 images of 8 x 8, shipped with it), cut up without leaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from sklearn.datasets import load_digits
from torch import Tensor

NOISE = 0.7
"""How bright the noise is that the target domain has for a background."""

Batch = tuple[Tensor, Tensor, Tensor]
"""Source images, their labels, target images."""


@dataclass(frozen=True, eq=False)
class Images:
    """Some of the digits.

    Attributes:
        index: which of the 1797 images these are.
        pixels: their 64 pixels, from 0 (paper) to 1 (ink).
        labels: the digits.
    """

    index: Tensor
    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chosen: Tensor | slice) -> Images:
        return Images(self.index[chosen], self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Domains:
    """Four sets of digits, no image in two of them.

    Attributes:
        source: clean images to train on, with labels.
        target: images on a noisy background to train on. Training never looks at their labels.
        source_test: clean images held out.
        target_test: noisy images held out.
    """

    source: Images
    target: Images
    source_test: Images
    target_test: Images


def all_digits() -> Images:
    """The whole data set.

    >>> digits = all_digits()
    >>> len(digits), digits.pixels.shape, int(digits.labels.max())
    (1797, torch.Size([1797, 64]), 9)
    """
    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32) / 16
    return Images(torch.arange(len(pixels)), pixels, torch.tensor(data.target))


def two_domains(seed: int) -> Domains:
    """The digits shuffled by the seed: two thirds to train on, a third held out, each half clean and half noisy.

    The noise is drawn once: an image of the target domain looks the same whenever it is seen.

    >>> domains = two_domains(0)
    >>> len(domains.source), len(domains.target), len(domains.source_test), len(domains.target_test)
    (599, 599, 299, 300)
    """
    digits = all_digits()
    draw = torch.Generator().manual_seed(seed)
    shuffled = digits[torch.randperm(len(digits), generator=draw)]
    third = len(digits) // 3
    held_out = 2 * third + (len(digits) - 2 * third) // 2
    return Domains(
        source=shuffled[:third],
        target=_with_noise(shuffled[third : 2 * third], draw),
        source_test=shuffled[2 * third : held_out],
        target_test=_with_noise(shuffled[held_out:], draw),
    )


def _with_noise(images: Images, draw: torch.Generator) -> Images:
    """The images on a noisy background; full ink stays as it is."""
    noise = torch.rand(images.pixels.shape, generator=draw)
    return Images(images.index, images.pixels + NOISE * noise * (1 - images.pixels), images.labels)


def batches(domains: Domains, seed: int, steps: int, size: int) -> Iterator[Batch]:
    """Batches of `size` source and `size` target images, drawn with replacement in an order fixed by the seed."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        source = domains.source[torch.randint(len(domains.source), (size,), generator=draw)]
        target = domains.target[torch.randint(len(domains.target), (size,), generator=draw)]
        yield source.pixels, source.labels, target.pixels


class Drawn:
    """The same batches, once, as something that says where it is."""

    def __init__(self, domains: Domains, seed: int, steps: int, size: int) -> None:
        self._drawn = partial(batches, domains, seed, steps, size)
        self._position = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in islice(self._drawn(), self._position, None):
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many were drawn."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after so many."""
        self._position = state["position"]


def only(images: Images, digits: range) -> Images:
    """Those images that show one of the given digits."""
    return images[(images.labels >= digits.start) & (images.labels < digits.stop)]
