"""ImageNet (ILSVRC 2012) from a folder: train/CLASS/*.JPEG and val/CLASS/*.JPEG.

Classes are the names of folders in order, which is the order of torchvision's published weights. No picture is read
here: names and sizes of files stand for them, in the digest and in the order in which splits are made.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from methods.core.errors import ConfigError

from .pictures import PICTURES
from .sources import Arrays, Scaling, class_names_of, data_directory, label_of, same_classes

NAME = "imagenet"
USUAL_SIZE = 224
HELD_OUT = 10_000
SCALING: Scaling = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False)
class Found:
    """Files of train/ and val/ (paths as an array of objects, labels int64), in the order of digests of their names."""

    name: str
    class_names: tuple[str, ...]
    train: Arrays
    test: Arrays
    digest: str


def read(name: str, data_dir: str | Path | None, size: int) -> Found:
    """The files of `imagenet:DIR`, or of the folder imagenet in the data directory; `size` only goes into the digest.

    Raises ConfigError where train/ or val/ is missing or not one folder per class, and for a class without pictures.
    """
    given = name.partition(":")[2]
    if name != NAME and not given:
        raise ConfigError(f"unknown data set {name!r}; ImageNet is imagenet:DIR, or {NAME} in --data-dir")
    root = Path(given).expanduser() if given else data_directory(data_dir) / NAME
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise ConfigError(f"there is no folder {root / part}; {NAME} takes train/CLASS/*.JPEG and "
                              f"val/CLASS/*.JPEG in {root}")
    class_names = class_names_of(root / "train")
    same_classes(root / "val", class_names)
    digest = hashlib.sha256(f"{size}".encode())
    train, test = (_files(root / part, class_names, digest) for part in ("train", "val"))
    return Found(label_of(name), class_names, train, test, digest.hexdigest()[:16])


def _files(folder: Path, class_names: tuple[str, ...], digest: "hashlib._Hash") -> Arrays:
    found = []
    for label, class_name in enumerate(class_names):
        with os.scandir(folder / class_name) as entries:
            files = [(entry.name, entry.stat().st_size) for entry in entries
                     if Path(entry.name).suffix.lower() in PICTURES and entry.name[0] != "."]
        if not files:
            raise ConfigError(f"class folder {folder / class_name} holds no picture ({' '.join(PICTURES)})")
        found += [(hashlib.blake2b(f"{class_name}/{file}".encode(), digest_size=16).digest(), label, file, size)
                  for file, size in files]
    found.sort()
    digest.update(repr([(class_names[label], file, size) for _, label, file, size in found]).encode())
    paths = np.empty(len(found), dtype=object)
    paths[:] = [folder / class_names[label] / file for _, label, file, _ in found]
    return paths, np.array([label for _, label, _, _ in found], dtype=np.int64)
