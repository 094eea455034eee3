"""Augmentation of uint8 image batches [N, H, W, C], vectorised over the batch.

Random numbers are drawn on the CPU, so that one seed gives the same pictures on every device. Pixels that
come from outside an image, and those cut out of it, are 0: black before normalisation, as in the usual CIFAR
recipe (RandomCrop(32, padding=4) on pictures). Cutout's authors fill with the mean colour.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.core.errors import ConfigError

Policy = Callable[[Tensor, torch.Generator], Tensor]  # (images [N, H, W, C] uint8, CPU generator) -> images

CUTOUT = 8  # pixels; the side of the square that `cifar10_cutout` removes


def pad_crop(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Each image moved by its own uniform offset in -pad..pad along both axes; uncovered pixels become 0."""
    n, height, width, _ = images.shape
    offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    top, left = offsets.to(images.device, non_blocking=True)
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # view [N, 2 pad + 1, 2 pad + 1, C, H, W]
    return windows.permute(0, 1, 2, 4, 5, 3)[torch.arange(n, device=images.device), top, left]


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2."""
    chosen = torch.randint(0, 2, (len(images), 1, 1, 1), generator=generator, dtype=torch.bool)
    return torch.where(chosen.to(images.device, non_blocking=True), images.flip(2), images)


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A square of `size` pixels set to 0 in each image (DeVries and Taylor 2017).

    Its centre is uniform over the image's pixels; what lies outside the image is lost.
    """
    n, height, width, _ = images.shape
    row = torch.randint(0, height, (n, 1), generator=generator) - size // 2
    column = torch.randint(0, width, (n, 1), generator=generator) - size // 2
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= row) & (rows < row + size)  # [N, H]
    in_columns = (columns >= column) & (columns < column + size)  # [N, W]
    hole = in_rows[:, :, None, None] & in_columns[:, None, :, None]
    return images.masked_fill(hole.to(images.device, non_blocking=True), 0)


def _none(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


def _shift(pixels: int) -> Policy:
    return lambda images, generator: pad_crop(images, pixels, generator)


def _cifar10(images: Tensor, generator: torch.Generator) -> Tensor:
    return flip(pad_crop(images, 4, generator), generator)


def _cifar10_cutout(size: int) -> Policy:
    return lambda images, generator: cutout(_cifar10(images, generator), size, generator)


POLICIES: dict[str, Policy] = {
    "none": _none,
    "digits": _shift(1),  # 8 x 8 pixels: one is an eighth of the picture; a mirrored digit is another sign
    "mnist": _none,
    "shift2": _shift(2),
    "cifar10": _cifar10,
    "cifar10_cutout": _cifar10_cutout(CUTOUT),
}


def find_policy(name: str) -> Policy:
    """The policy called `name`; `cifar10_cutoutN` cuts squares of N pixels. ConfigError if there is none."""
    if name in POLICIES:
        return POLICIES[name]
    sized = re.fullmatch(r"cifar10_cutout([1-9]\d?)", name)
    if sized is None:
        raise ConfigError(f"unknown augmentation {name!r}; there are: {', '.join(POLICIES)}, "
                          "cifar10_cutoutN (N pixels)")
    return _cifar10_cutout(int(sized[1]))
