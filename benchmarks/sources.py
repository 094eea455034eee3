"""Where pictures come from: scikit-learn, .npz files, folders. All return arrays; `data.py` splits them."""

import http.client
import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from methods.core.errors import CompressError, ConfigError
from methods.core.file.container import write_file

from . import _torchvision
from .pictures import PICTURES, read_squeezed

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, H, W, C], labels int64 [N]
Scaling = tuple[tuple[float, ...], tuple[float, ...]]  # (mean, std) on the 0..1 scale, per channel or for all

DATA_VARIABLE = "JOINTCOMPRESS_DATA"
SHOWN = 4  # names in an error message
KEYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True, eq=False)
class Source:
    """Pictures as they were found. `test` and `held_out` are arrays, or a fraction to take from `train`.

    scaling  mean and std to normalise with, or None for those of the training images
    digest   what the pictures must have, or None
    """

    name: str
    class_names: tuple[str, ...]
    train: Arrays
    test: Arrays | float
    held_out: Arrays | float = 0.1
    scaling: Scaling | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Published:
    """What NAME.npz must hold: images uint8 [train | test, *shape], labels 0..classes - 1."""

    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    train: int
    test: int
    held_out: float  # fraction of train
    scaling: Scaling
    digest: str | None  # of the data set as published (see `Dataset.digest`); None: anything of this form


DIGITS = tuple("0123456789")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PUBLISHED = {
    "cifar10": Published(CIFAR10, (32, 32, 3), 50_000, 10_000, 5 / 50,
                         ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), "d4e8bd2fe1560c99"),
    "mnist": Published(DIGITS, (28, 28, 1), 60_000, 10_000, 5 / 60, ((0.1307,), (0.3081,)), "6d491172146e46d9"),
}


def read(name: str, data_dir: str | Path | None, image_size: int) -> Source:
    """The pictures of `name`; arguments and errors as of `data.open_dataset`."""
    if name.startswith("folder:"):
        return read_folder(Path(name.removeprefix("folder:")).expanduser(), image_size)
    if name == "digits":
        return read_digits()
    if name in PUBLISHED:
        return read_published(name, data_directory(data_dir))
    raise ConfigError(f"unknown data set {name!r}; there are: digits, {', '.join(PUBLISHED)}, folder:DIR, imagenet:DIR")


def kind_of(name: str) -> str:
    """Of folder:DIR it is folder."""
    return name.partition(":")[0]


def label_of(name: str) -> str:
    """How rows call a data set: one in a folder by that folder's last name, not its whole path."""
    kind, colon, folder = name.partition(":")
    return f"{kind}:{Path(folder).expanduser().resolve().name}" if colon else name


def data_directory(given: str | Path | None = None) -> Path:
    """Where NAME.npz files are: `given`, else $JOINTCOMPRESS_DATA, else the user's cache folder."""
    if given is not None:
        return Path(given)
    if os.environ.get(DATA_VARIABLE):
        return Path(os.environ[DATA_VARIABLE])
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "jointcompress"


def read_digits() -> Source:
    """scikit-learn's 1,797 digits, 8 x 8 x 1; 360 of them are the test set."""
    from sklearn.datasets import load_digits  # takes a second to import

    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]  # stored as 0..16
    return Source("digits", DIGITS, (images, found.target.astype(np.int64)), test=360 / len(images))


def read_published(name: str, directory: Path) -> Source:
    """CIFAR-10 or MNIST from `directory`/NAME.npz; a missing file is downloaded and converted, once."""
    spec, path = PUBLISHED[name], directory / f"{name}.npz"
    if not path.is_file():
        _download(name, path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in KEYS}
    except KeyError as error:
        raise ConfigError(f"{path}: {error.args[0]}; it must hold {', '.join(KEYS)}") from error
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path} is not a readable .npz file of plain arrays: {error}") from error
    train, test = (_checked(arrays, part, getattr(spec, part), spec, path) for part in ("train", "test"))
    return Source(name, spec.class_names, train, test, spec.held_out, spec.scaling, spec.digest)


def _download(name: str, path: Path) -> None:
    try:
        arrays = _torchvision.download(name, path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()
        np.savez(packed, **arrays)
        write_file(path, packed.getbuffer())
    except (OSError, RuntimeError, EOFError, ImportError, CompressError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"there is no {path}, and the download failed ({reason}): put a {path.name} with "
                          f"{', '.join(KEYS)} there or name its folder in ${DATA_VARIABLE}, or allow network "
                          "access for the one download through torchvision") from error


def _checked(arrays: dict[str, np.ndarray], part: str, count: int, spec: Published, path: Path) -> Arrays:
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    shape = (count, *spec.shape)
    plain = images.shape == shape or (spec.shape[2] == 1 and images.shape == shape[:3])
    if images.dtype != np.uint8 or not plain:
        raise ConfigError(f"{part}_images in {path} is {images.dtype} {list(images.shape)}; "
                          f"it must be uint8 {list(shape)}")
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ConfigError(f"{part}_labels in {path} is {labels.dtype} {list(labels.shape)}; "
                          f"it must be integers [{count}]")
    if labels.min() < 0 or labels.max() >= len(spec.class_names):
        raise ConfigError(f"{part}_labels in {path} reach from {labels.min()} to {labels.max()}; "
                          f"allowed is 0..{len(spec.class_names) - 1}")
    return images.reshape(shape), labels.astype(np.int64)


def read_folder(root: Path, image_size: int) -> Source:
    """Pictures in one folder per class (searched to any depth), squeezed to image_size x image_size RGB.

    Where `root` holds train/ and test/ or val/, these are the parts; with all three, val/ is held out. Hidden
    files and files without a picture's suffix are passed over. Raises ConfigError for a missing folder, fewer
    than 2 classes, a class without a picture, or a picture that cannot be read.
    """
    if not root.is_dir():
        raise ConfigError(f"there is no folder {root}; folder:DIR takes one with a folder per class")
    name = label_of(f"folder:{root}")
    parts = [part for part in ("train", "test", "val") if (root / part).is_dir()]
    if "train" not in parts or len(parts) == 1:
        class_names = class_names_of(root)
        return Source(name, class_names, _read_classes(root, class_names, image_size), test=0.2)
    class_names = class_names_of(root / "train")
    arrays = {part: _read_classes(root / part, class_names, image_size) for part in parts}
    held_out = arrays["val"] if len(parts) == 3 else 0.1
    return Source(name, class_names, arrays["train"], arrays["test" if "test" in parts else "val"], held_out)


def class_names_of(folder: Path) -> tuple[str, ...]:
    """The names of the folders in `folder`, in order; ConfigError if there are fewer than 2."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if len(names) < 2:
        raise ConfigError(f"{folder} holds {len(names)} class folders; classification needs 2 or more")
    return tuple(names)


def same_classes(folder: Path, class_names: tuple[str, ...]) -> None:
    """ConfigError unless these are the folders in `folder`."""
    found = class_names_of(folder)
    if found != class_names:
        different = sorted(set(found) ^ set(class_names))
        raise ConfigError(f"{folder} holds {len(found)} classes, train {len(class_names)}; only one of them has: "
                          f"{', '.join(different[:SHOWN])}" + " ..." * (len(different) > SHOWN))


def _read_classes(folder: Path, class_names: tuple[str, ...], image_size: int) -> Arrays:
    same_classes(folder, class_names)
    images, labels = [], []
    for label, class_name in enumerate(class_names):
        files = [file for file in sorted((folder / class_name).rglob("*"))
                 if file.suffix.lower() in PICTURES and not file.name.startswith(".")]
        if not files:
            raise ConfigError(f"class folder {folder / class_name} holds no picture ({' '.join(PICTURES)})")
        images += [read_squeezed(file, image_size) for file in files]
        labels += [label] * len(files)
    return np.stack(images), np.array(labels, dtype=np.int64)
