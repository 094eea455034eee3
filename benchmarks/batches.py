"""The parts of a data set, in memory or as files on disk, and their batches.

Images are uint8 [N, H, W, C] and become float only in a batch.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from methods.core.errors import ConfigError
from methods.core.train.task import Batch

from .augment import Policy, find_policy
from .pictures import read_centre, read_random

Device = torch.device | str
READERS = 16  # threads at most; decoding a picture leaves Python's lock free
RANDOM_CROPS = "imagenet"  # the policy that is carried out while a picture is read


@dataclass(frozen=True, eq=False)
class Split:
    """images uint8 [N, H, W, C] and labels int64 [N], on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels of an image."""
        return tuple(self.images.shape[1:])

    def batches(self, batch_size: int, mean: Sequence[float], std: Sequence[float], augment: str, device: Device
                ) -> "TensorBatches":
        """Batches on `device`, augmented by the policy of this name where an epoch has a generator."""
        return TensorBatches(self.images, self.labels, batch_size, mean, std, find_policy(augment), device)


@dataclass(frozen=True, eq=False)
class FileSplit:
    """Files of pictures, their labels int64 [N], and the side of the squares that they are read as."""

    paths: tuple[Path, ...]
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels of an image."""
        return self.size, self.size, 3

    def batches(self, batch_size: int, mean: Sequence[float], std: Sequence[float], augment: str, device: Device
                ) -> "FileBatches":
        """As of `Split`; "imagenet" crops while it reads, other policies change the middle of a picture."""
        return FileBatches(self, batch_size, mean, std, augment, device)


class _ScaledBatches(ABC):
    """What the two kinds of batches share (see `methods.core.train.task.Batches`).

    mean, std  on the 0..1 scale, one value per channel or one for all

    Inputs are float32 [N, C, H, W] = (image / 255 - mean) / std in channels_last memory. No image is left out:
    a last batch of one, on which batch norm cannot train, is joined to the one before it.
    """

    def __init__(self, n: int, channels: int, batch_size: int, mean: Sequence[float], std: Sequence[float],
                 augment: Policy | None, device: Device):
        if batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size}: allowed is 1 or more")
        if not {len(mean), len(std)} <= {1, channels} or min(std) <= 0:
            raise ConfigError(f"mean {tuple(mean)} and std {tuple(std)}: allowed are 1 or {channels} values, "
                              "those of std positive")
        self.batch_size, self.augment = batch_size, augment
        self._mean, self._std = (torch.tensor([255 * value for value in values], dtype=torch.float32).to(device)
                                 for values in (mean, std))
        starts = list(range(0, n, batch_size))
        if n > batch_size > 1 and n - starts[-1] == 1:
            starts.pop()
        self._bounds = list(zip(starts, [*starts[1:], n], strict=True))

    def __len__(self) -> int:
        return len(self._bounds)

    @abstractmethod
    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        """Plain and in order without a generator; else in its order, augmented by it."""

    def _inputs(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).sub_(self._mean).div_(self._std).permute(0, 3, 1, 2)


class TensorBatches(_ScaledBatches):
    """`Batches` of a split that lies on `device` as uint8 tensors.

    images, labels  uint8 [N, H, W, C], int64 [N]
    augment         what `epoch(generator)` does to the images of a batch
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, mean: Sequence[float],
                 std: Sequence[float], augment: Policy | None = None, device: Device = "cpu"):
        super().__init__(len(labels), images.shape[3], batch_size, mean, std, augment, device)
        self.images, self.labels = images.to(device), labels.to(device)

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        if generator is None:
            for start, end in self._bounds:
                yield self._inputs(self.images[start:end]), self.labels[start:end]
            return
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for start, end in self._bounds:
            chosen = order[start:end]
            images = self.images[chosen]
            if self.augment is not None:
                images = self.augment(images, generator)
            yield self._inputs(images), self.labels[chosen]


class FileBatches(_ScaledBatches):
    """`Batches` of files: no more than two batches of pictures are in memory, the second read ahead by threads.

    What a generator draws does not depend on the number of threads.
    """

    def __init__(self, split: FileSplit, batch_size: int, mean: Sequence[float], std: Sequence[float],
                 augment: str = "none", device: Device = "cpu"):
        policy = find_policy(augment)  # refuses unknown ones
        super().__init__(len(split), 3, batch_size, mean, std, None if augment == RANDOM_CROPS else policy, device)
        self.split, self.device, self._cropped = split, device, augment == RANDOM_CROPS

    def epoch(self, generator: torch.Generator | None) -> Iterator[Batch]:
        n = len(self.split)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        seeds = torch.randint(2**62, (n,), generator=generator) if generator is not None and self._cropped else None
        with ThreadPoolExecutor(min(os.cpu_count() or 1, READERS)) as pool:
            ahead: list[tuple[Tensor, list[Future]]] = []
            for start, end in self._bounds:
                chosen = order[start:end]
                drawn = None if seeds is None else seeds[start:end].tolist()
                ahead.append((chosen, self._submit(pool, chosen.tolist(), drawn)))
                if len(ahead) > 1:
                    yield self._batch(*ahead.pop(0), generator)
            for chosen, coming in ahead:
                yield self._batch(chosen, coming, generator)

    def _submit(self, pool: ThreadPoolExecutor, chosen: list[int], seeds: list[int] | None) -> list[Future]:
        paths, size = [self.split.paths[i] for i in chosen], self.split.size
        if seeds is None:
            return [pool.submit(read_centre, path, size) for path in paths]
        return [pool.submit(read_random, path, size, seed) for path, seed in zip(paths, seeds, strict=True)]

    def _batch(self, chosen: Tensor, coming: list[Future], generator: torch.Generator | None) -> Batch:
        images = torch.from_numpy(np.stack([picture.result() for picture in coming])).to(self.device)
        if generator is not None and self.augment is not None:
            images = self.augment(images, generator)
        return self._inputs(images), self.split.labels[chosen].to(self.device)
