"""Data sets with fixed splits.

Every data set is first sorted by a digest of each image and its label: splits and `digest` depend on the pictures
alone, not on the order of a file, on file names or on a seed. Splits are stratified: each class gives its share of
the first images in that order. ImageNet's pictures stay on disk: there, names and sizes of files stand for them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from methods.core.errors import ConfigError
from methods.core.train.task import Task

from . import imagenet, sources
from .batches import Device, FileBatches, FileSplit, Split, TensorBatches
from .recipes import picture_size
from .sources import Arrays, Scaling, kind_of, label_of

SIZES = {"folder": 32, imagenet.NAME: imagenet.USUAL_SIZE}  # usual sides of pictures from files
FULL_BATCH = 64 * 64  # pixels of the largest pictures that come in full test batches


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in three parts that share no memory and, but for copies in the data, no image.

    mean, std  per channel, on the 0..1 scale
    digest     16 hex digits of the sha256 over images and labels of all parts
    """

    name: str
    class_names: tuple[str, ...]
    train: Split | FileSplit
    held_out: Split | FileSplit
    test: Split | FileSplit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.train.shape

    @property
    def channels(self) -> int:
        return self.image_shape[2]


def open_dataset(name: str, data_dir: str | Path | None = None, image_size: int | None = None) -> Dataset:
    """The data set `name`: digits, mnist, cifar10, folder:DIR, imagenet or imagenet:DIR.

    digits      scikit-learn's 8 x 8 digits: 1,293 train, 144 held out, 360 test
    mnist       55,000 / 5,000 / 10,000; cifar10 45,000 / 5,000 / 10,000; from NAME.npz in `data_dir`, else in
                $JOINTCOMPRESS_DATA, else in the user's cache folder; a missing file is downloaded
    folder:DIR  pictures, one folder per class, resized to `image_size` (see `sources.read_folder`); parts
                that DIR lacks: 20 % of all images are the test set, 10 % of the training images are held out
    imagenet:DIR  ImageNet's layout, read batch by batch (see `imagenet`); imagenet is the folder of this name
                beside the .npz files
    image_size  side of the pictures of folders and of ImageNet; by default what baselines.toml says of the task
                (see `recipes`), else 32 and 224
    Raises ConfigError for an unknown name, and for missing or malformed data.
    """
    size = _size(name, image_size)
    if kind_of(name) == imagenet.NAME:
        return _of_files(name, data_dir, size)
    source = sources.read(name, data_dir, size)
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


def _size(name: str, given: int | None) -> int:
    """Side of the pictures: as given, as baselines.toml has it, or the usual one."""
    usual = SIZES.get(kind_of(name))
    if given is not None and (usual is None or given < 1):
        fault = "allowed is 1 or more pixels" if usual is not None else f"{name} has pictures of one size"
        raise ConfigError(f"image_size = {given}: {fault}")
    if usual is None:
        return 0
    size = picture_size(label_of(name)) if given is None else given
    return usual if size is None else size


def _of_files(name: str, data_dir: str | Path | None, size: int) -> Dataset:
    """ImageNet: val/ is the test set, of train/ a tenth is held out, but at most 10,000 pictures."""
    found = imagenet.read(name, data_dir, size)
    train, held_out = _split(found.train, max(min(len(found.train[1]) // 10, imagenet.HELD_OUT), 1))
    if np.bincount(train[1], minlength=len(found.class_names)).min() == 0:
        raise ConfigError(f"{found.name} has too few images: train needs two or more of every class")
    splits = (FileSplit(tuple(paths), torch.from_numpy(labels), size)
              for paths, labels in (train, held_out, found.test))
    return Dataset(found.name, found.class_names, *splits, *imagenet.SCALING, found.digest)


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


def make_task(dataset: Dataset, *, batch_size: int, device: Device, autocast: torch.dtype | None = None,
              augment: str = "none", scaling: Scaling | None = None) -> Task:
    """What a method may see of `dataset`: train and calibration with the policy `augment`, held-out without.

    scaling  (mean, std) that a network asks for in place of the data set's own
    """
    mean, std = (dataset.mean, dataset.std) if scaling is None else scaling
    device = torch.device(device)
    train = dataset.train.batches(batch_size, mean, std, augment, device)
    held_out = dataset.held_out.batches(batch_size, mean, std, "none", device)
    return Task(train, held_out, device=device, autocast=autocast, channels_last=True, calibration=train)


def test_batches(dataset: Dataset, *, batch_size: int, device: Device,
                 scaling: Scaling | None = None) -> TensorBatches | FileBatches:
    """The test set, for the code that measures a finished file; what trains or chooses may not call this.

    Pictures above 64 x 64 come in smaller batches, of as many pixels.
    """
    mean, std = (dataset.mean, dataset.std) if scaling is None else scaling
    height, width, _ = dataset.image_shape
    batch_size = min(batch_size, max(batch_size * FULL_BATCH // (height * width), 1))
    return dataset.test.batches(batch_size, mean, std, "none", device)


test_batches.__test__ = False  # pytest would take it for a test wherever it is imported
