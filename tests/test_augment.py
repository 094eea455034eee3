"""Augmentation: every picture it makes is the one its definition names."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import augment
from methods.core.errors import ConfigError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, height=6, width=5, channels=3):
    return torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator())


def test_each_crop_is_a_slice_of_the_padded_image():
    images, pad = pictures(300), 2
    padded = np.zeros((300, 6 + 2 * pad, 5 + 2 * pad, 3), dtype=np.uint8)
    padded[:, pad:-pad, pad:-pad] = images.numpy()
    found, offsets = augment.pad_crop(images, pad, generator()), Counter()
    assert found.shape == images.shape and found.is_contiguous()
    for crop, whole in zip(found.numpy(), padded, strict=True):
        fits = [(top, left) for top, left in itertools.product(range(2 * pad + 1), repeat=2)
                if np.array_equal(crop, whole[top:top + 6, left:left + 5])]
        assert len(fits) == 1
        offsets[fits[0]] += 1
    assert len(offsets) == 25 and max(offsets.values()) < 40  # 300 / 25 = 12 each on average


def test_flips_are_exact():
    images = pictures(200)
    flipped = 0
    for before, after in zip(images, augment.flip(images, generator()), strict=True):
        mirrored = torch.equal(after, before[:, torch.arange(4, -1, -1)])
        assert mirrored or torch.equal(after, before)
        flipped += mirrored
    assert 70 < flipped < 130


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_cutout_removes_one_square(size):
    images = torch.full((400, 6, 5, 2), 9, dtype=torch.uint8)
    holes = Counter()
    for image in augment.cutout(images, size, generator()):
        rows, columns = (image[:, :, 0] == 0).nonzero(as_tuple=True)
        box = image[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
        assert bool((box == 0).all()) and int((image == 0).sum()) == box.numel()  # a full rectangle, all channels
        assert max(box.shape[:2]) <= size
        assert box.shape[0] == size or rows.min() == 0 or rows.max() == 5  # smaller only at the border
        assert box.shape[1] == size or columns.min() == 0 or columns.max() == 4
        holes[(int(rows.min()), int(columns.min()))] += 1
    assert len(holes) > 1


def test_policies():
    images = pictures(64, 8, 8, 1)
    for name in ("none", "mnist"):
        assert torch.equal(augment.find_policy(name)(images, generator()), images)
    assert torch.equal(augment.find_policy("digits")(images, generator()), augment.pad_crop(images, 1, generator()))
    assert torch.equal(augment.find_policy("shift2")(images, generator()), augment.pad_crop(images, 2, generator()))
    for name in (*augment.POLICIES, "cifar10_cutout16"):
        policy, before = augment.find_policy(name), images.clone()
        assert torch.equal(policy(images, generator(1)), policy(images, generator(1)))
        assert torch.equal(images, before)  # never in place: the images are the data set
    white = torch.full((64, 32, 32, 3), 255, dtype=torch.uint8)
    one, two = (augment.find_policy(f"cifar10_cutout{size}")(white, generator()) for size in ("", "16"))
    assert int((two == 0).sum()) > int((one == 0).sum()) > 0


@pytest.mark.parametrize("name", ["cifar10_cutout0", "cifar10_cutout123", "cifar10_cutoutx", ""])
def test_unknown_policies(name):
    with pytest.raises(ConfigError):
        augment.find_policy(name)
