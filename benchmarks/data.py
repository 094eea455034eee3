"""Data sets with fixed splits, and their batches.

Images are uint8 [N, H, W, C] and become float only in a batch. Every data set is first sorted by a digest of
each image and its label: splits and `digest` depend on the pictures alone, not on the order of a file, on
file names or on a seed. Splits are stratified: each class gives its share of the first images in that order.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from methods.core.errors import ConfigError
from methods.core.train.task import Batch, Task

from . import sources
from .augment import Policy, find_policy
from .sources import Arrays, Scaling

Device = torch.device | str


@dataclass(frozen=True, eq=False)
class Split:
    """images uint8 [N, H, W, C] and labels int64 [N], on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in three parts that share no memory and, but for copies in the data, no image.

    mean, std  per channel, on the 0..1 scale
    digest     16 hex digits of the sha256 over images and labels of all parts
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    held_out: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return tuple(self.train.images.shape[1:])

    @property
    def channels(self) -> int:
        return self.image_shape[2]


def open_dataset(name: str, data_dir: str | Path | None = None, image_size: int = 32) -> Dataset:
    """The data set `name`: digits, mnist, cifar10 or folder:DIR.

    digits      scikit-learn's 8 x 8 digits: 1,293 train, 144 held out, 360 test
    mnist       55,000 / 5,000 / 10,000; cifar10 45,000 / 5,000 / 10,000; from NAME.npz in `data_dir`, else in
                $JOINTCOMPRESS_DATA, else in the user's cache folder; a missing file is downloaded
    folder:DIR  pictures, one folder per class, resized to `image_size` (see `sources.read_folder`); parts
                that DIR lacks: 20 % of all images are the test set, 10 % of the training images are held out
    Raises ConfigError for an unknown name, and for missing or malformed data.
    """
    source = sources.read(name, data_dir, image_size)
    train, test, held_out = _sorted(source.train), source.test, source.held_out
    if not isinstance(test, tuple):
        train, test = _split(train, round(test * len(train[1])))
    if not isinstance(held_out, tuple):
        train, held_out = _split(train, max(round(held_out * len(train[1])), 1))
    parts = (train, _sorted(held_out), _sorted(test))
    sizes = [len(labels) for _, labels in parts]
    if min(sizes) == 0 or np.bincount(train[1], minlength=len(source.class_names)).min() == 0:
        raise ConfigError(f"{source.name} has too few images: {sizes} for train, held-out and test; every "
                          "part needs one, and train needs one of every class")
    mean, std = _measured(train[0]) if source.scaling is None else source.scaling
    digest = hashlib.sha256()
    for images, labels in parts:
        digest.update(repr(images.shape).encode() + labels.tobytes())
        digest.update(images)
    if source.digest not in (None, digest.hexdigest()[:16]):
        raise ConfigError(f"{source.name}.npz does not hold {source.name} as it was published (digest "
                          f"{digest.hexdigest()[:16]} instead of {source.digest}); other pictures come as folder:DIR")
    splits = (Split(torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in parts)
    return Dataset(source.name, source.class_names, *splits, tuple(mean), tuple(std), digest.hexdigest()[:16])


def _sorted(arrays: Arrays) -> Arrays:
    """In the order of the digests of label and pixels; no order of a file survives it."""
    images, labels = arrays
    keys = [hashlib.blake2b(label.tobytes() + image.tobytes(), digest_size=16).digest()
            for image, label in zip(images, labels, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return images[order], labels[order]


def _split(arrays: Arrays, count: int) -> tuple[Arrays, Arrays]:
    """(the rest, `count` images: of each class the first, in proportion to its size); both keep their order.

    Shares are rounded down; what is left goes to the largest remainders (of equal ones to the lowest class).
    """
    images, labels = arrays
    sizes = np.bincount(labels)
    shares = count * sizes // len(labels)
    left = np.argsort(-(count * sizes % len(labels)), kind="stable")[:count - shares.sum()]
    shares[left] += 1
    taken = np.zeros(len(labels), dtype=bool)
    for label, share in enumerate(shares):
        taken[np.flatnonzero(labels == label)[:share]] = True
    return (images[~taken], labels[~taken]), (images[taken], labels[taken])


def _measured(images: np.ndarray) -> Scaling:
    """Mean and standard deviation of each channel on the 0..1 scale, from counts of the 256 values."""
    values, mean, std = np.arange(256) / 255, [], []
    for channel in range(images.shape[3]):
        share = np.bincount(images[..., channel].reshape(-1), minlength=256) / images[..., channel].size
        mean.append(float(share @ values))
        # A constant channel would divide by 0: one grey level is the least spread that is told apart.
        std.append(max(float(np.sqrt(share @ (values - mean[-1]) ** 2)), 1 / 255))
    return mean, std


class TensorBatches:
    """`Batches` of a split that lies on `device` as uint8 tensors (see `methods.core.task.Batches`).

    images, labels  uint8 [N, H, W, C], int64 [N]
    mean, std       on the 0..1 scale, one value per channel or one for all
    augment         what `epoch(generator)` does to the images of a batch

    Inputs are float32 [N, C, H, W] = (image / 255 - mean) / std in channels_last memory. No image is left out:
    a last batch of one, on which batch norm cannot train, is joined to the one before it.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, mean: Sequence[float],
                 std: Sequence[float], augment: Policy | None = None, device: Device = "cpu"):
        channels = images.shape[3]
        if batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size}: allowed is 1 or more")
        if not {len(mean), len(std)} <= {1, channels} or min(std) <= 0:
            raise ConfigError(f"mean {tuple(mean)} and std {tuple(std)}: allowed are 1 or {channels} values, "
                              "those of std positive")
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size, self.augment = batch_size, augment
        self._mean, self._std = (torch.tensor([255 * value for value in values], dtype=torch.float32).to(device)
                                 for values in (mean, std))
        n = len(self.labels)
        starts = list(range(0, n, batch_size))
        if n > batch_size > 1 and n - starts[-1] == 1:
            starts.pop()
        self._bounds = list(zip(starts, [*starts[1:], n], strict=True))

    def __len__(self) -> int:
        return len(self._bounds)

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

    def _inputs(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).sub_(self._mean).div_(self._std).permute(0, 3, 1, 2)


def make_task(dataset: Dataset, *, batch_size: int, device: Device, autocast: torch.dtype | None = None,
              augment: str = "none", scaling: Scaling | None = None) -> Task:
    """What a method may see of `dataset`: train and calibration with the policy `augment`, held-out without.

    scaling  (mean, std) that a network asks for in place of the data set's own
    """
    mean, std = (dataset.mean, dataset.std) if scaling is None else scaling
    device = torch.device(device)
    policy = find_policy(augment)
    images, labels = dataset.train.images.to(device), dataset.train.labels.to(device)
    train = TensorBatches(images, labels, batch_size, mean, std, policy, device)
    choices = dataset.held_out
    held_out = TensorBatches(choices.images, choices.labels, batch_size, mean, std, None, device)
    return Task(train, held_out, device=device, autocast=autocast, channels_last=True, calibration=train)


def test_batches(dataset: Dataset, *, batch_size: int, device: Device,
                 scaling: Scaling | None = None) -> TensorBatches:
    """The test set, for the code that measures a finished file; what trains or chooses may not call this."""
    mean, std = (dataset.mean, dataset.std) if scaling is None else scaling
    return TensorBatches(dataset.test.images, dataset.test.labels, batch_size, mean, std, None, device)


test_batches.__test__ = False  # pytest would take it for a test wherever it is imported
