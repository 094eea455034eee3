"""Augmentation of uint8 image batches [N, H, W, C], vectorised over the batch.

Random numbers are drawn on the CPU, so that one seed gives the same pictures on every device. Pixels that
come from outside an image, and those cut out of it, are 0: black before normalisation, as in the usual CIFAR
recipe (RandomCrop(32, padding=4) on pictures). Cutout's authors fill with the mean colour.
"""

import math
import re
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.core.errors import ConfigError

Policy = Callable[[Tensor, torch.Generator], Tensor]  # (images [N, H, W, C] uint8, CPU generator) -> images

AREAS, RATIOS, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of random parts
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


def crop_box(height: int, width: int, drawn: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part: 8 to 100 % of the area, sides as 3:4 to 4:3 (Szegedy et al. 2015).

    Area uniform, ratio log-uniform, place uniform; the first of ten that fits, else the largest middle part of an
    allowed ratio (as torchvision's RandomResizedCrop).
    """
    areas = height * width * drawn.uniform(*AREAS, TRIES)
    ratios = np.exp(drawn.uniform(*np.log(RATIOS), TRIES))
    for area, ratio in zip(areas, ratios, strict=True):
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(drawn.integers(height - h + 1)), int(drawn.integers(width - w + 1)), h, w
    h, w = min(height, round(width / RATIOS[0])), min(width, round(height * RATIOS[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Of each image a random part (see `crop_box`), resized to the whole."""
    _, height, width, _ = images.shape
    out, seeds = torch.empty_like(images), torch.randint(2**62, (len(images),), generator=generator).tolist()
    for i, seed in enumerate(seeds):
        top, left, h, w = crop_box(height, width, np.random.default_rng(seed))
        part = images[i:i + 1, top:top + h, left:left + w].permute(0, 3, 1, 2).to(torch.float32)
        resized = F.interpolate(part, (height, width), mode="bilinear", antialias=True)
        out[i] = resized[0].permute(1, 2, 0).round().clamp(0, 255)
    return out


def _none(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


def _shift(pixels: int) -> Policy:
    return lambda images, generator: pad_crop(images, pixels, generator)


def _cifar10(images: Tensor, generator: torch.Generator) -> Tensor:
    return flip(pad_crop(images, 4, generator), generator)


def _imagenet(images: Tensor, generator: torch.Generator) -> Tensor:
    return flip(random_resized_crop(images, generator), generator)


def _cifar10_cutout(size: int) -> Policy:
    return lambda images, generator: cutout(_cifar10(images, generator), size, generator)


POLICIES: dict[str, Policy] = {
    "none": _none,
    "digits": _shift(1),  # 8 x 8 pixels: one is an eighth of the picture; a mirrored digit is another sign
    "mnist": _none,
    "shift2": _shift(2),
    "cifar10": _cifar10,
    "imagenet": _imagenet,
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
