"""One picture from a file, as uint8 [H, W, 3]: squeezed, its middle, or a random part of it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from methods.core.errors import ConfigError

from .augment import crop_box

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def read_squeezed(file: Path, size: int) -> np.ndarray:
    """Turned upright as its EXIF says, and squeezed to size x size."""
    from PIL import ImageOps  # an extra, used for files of pictures only

    return _read(file, lambda picture: _resized(ImageOps.exif_transpose(picture).convert("RGB"), size, size))


def read_centre(file: Path, size: int) -> np.ndarray:
    """The usual view of ImageNet's test pictures: resized so that the shorter side is 256/224 of `size`, then the
    middle size x size. As torchvision's Resize and CenterCrop do it; EXIF is not looked at, as there."""
    return _read(file, lambda picture: _centre(picture.convert("RGB"), size))


def read_random(file: Path, size: int, seed: int) -> np.ndarray:
    """The usual view in training: a random box (see `augment.crop_box`), resized, mirrored with probability 1/2."""
    def cut(picture: "Picture") -> "Picture":
        from PIL import ImageOps

        drawn = np.random.default_rng(seed)
        top, left, height, width = crop_box(picture.height, picture.width, drawn)
        part = picture.convert("RGB").crop((left, top, left + width, top + height))
        part = _resized(part, size, size)
        return ImageOps.mirror(part) if drawn.random() < 0.5 else part

    return _read(file, cut)


def _centre(picture: "Picture", size: int) -> "Picture":
    short = round(size * 256 / 224)
    if picture.width <= picture.height:
        width, height = short, int(short * picture.height / picture.width)
    else:
        width, height = int(short * picture.width / picture.height), short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _resized(picture, width, height).crop((left, top, left + size, top + size))


def _resized(picture: "Picture", width: int, height: int) -> "Picture":
    from PIL import Image

    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _read(file: Path, change: Callable[["Picture"], "Picture"]) -> np.ndarray:
    """What `change` makes of the picture in `file`; ConfigError where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            return np.asarray(change(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"picture {file} cannot be read: {str(error).splitlines()[0]}") from error
