"""Masks by classes of rows and columns: exact, near the information of their definition, refused where damaged."""

import numpy as np
import pytest

from methods.core.errors import FormatError
from methods.core.file.classes import pack_classes, read_classes
from methods.core.file.streams import Reader

RNG = np.random.default_rng(3)


def uneven(rows, columns, dead=0.3):
    """A mask whose rows and columns are full to very different degrees, some not at all."""
    p = np.outer(RNG.random(rows) ** 3 * (RNG.random(rows) > dead), RNG.random(columns) * (RNG.random(columns) > dead))
    mask = RNG.random((rows, columns)) < p
    mask[-1, -1] = True
    return mask


MASKS = {
    "uneven": uneven(60, 300), "tall": uneven(500, 7), "one": np.ones((1, 1), bool), "one of many": np.eye(40) > 2,
    "full": np.ones((5, 9), bool), "diagonal": np.eye(30) > 0, "one row": uneven(1, 100), "one column": uneven(100, 1),
    "random": RNG.random((50, 50)) < 0.5, "stripes": np.tile(np.arange(90) % 3 == 0, (20, 1)),
    "sparse": RNG.random((200, 400)) < 0.002, "conv": uneven(32, 16 * 9),
}
MASKS["one of many"][7, 11] = True


@pytest.mark.parametrize("name", MASKS)
def test_round_trip(name):
    mask = MASKS[name]
    reader = Reader(pack_classes(mask) + b"next")
    assert np.array_equal(read_classes(reader, *mask.shape), mask) and reader.left() == 4


def entropy(counts):
    share = counts[counts > 0] / counts.sum()
    return -(share * np.log2(share)).sum()


def test_used_rows_and_columns_cost_what_is_inside_them():
    mask = np.zeros((300, 500), bool)
    rows, columns = np.sort(RNG.permutation(300)[:40]), np.sort(RNG.permutation(500)[:60])
    mask[np.ix_(rows, columns)] = RNG.random((40, 60)) < 0.3
    inside = 40 * 60 * entropy(np.array([0.3, 0.7])) + 300 * entropy(np.array([40, 260])) + 500 * entropy(
        np.array([60, 440]))
    assert len(pack_classes(mask)) <= inside / 8 * 1.03 + 24
    assert len(pack_classes(MASKS["stripes"])) <= 40  # a third of the columns, all of them whole


def test_bands_cost_less_than_one_density():
    mask = MASKS["uneven"]
    plain = mask.size * entropy(np.array([mask.sum(), (~mask).sum()])) / 8
    assert len(pack_classes(mask)) < 0.75 * plain


def test_damage_is_refused_or_read_as_some_mask():
    for name in ("uneven", "conv", "diagonal"):
        data, shape = pack_classes(MASKS[name]), MASKS[name].shape
        for _ in range(300):
            damaged = bytearray(data)
            for place in RNG.integers(0, len(data), RNG.integers(1, 4)):
                damaged[place] = RNG.integers(256)
            try:
                found = read_classes(Reader(bytes(damaged[:RNG.integers(1, len(data) + 1)])), *shape)
            except FormatError:
                continue
            assert found.shape == shape


@pytest.mark.parametrize("data", [
    b"\0\1" + b"\0\2" + b"\0\0" + b"\0", b"\0\x7f" + b"\0\2" + b"\0\0" + b"\0", b"\0\2" + b"\0\2" + b"\0\1" + b"\0",
    b"\0\2" + b"\0\2" + b"\0\x90\x09" + b"\0",
], ids=["class -1", "class -64", "count -1", "count 584"])
def test_malicious_classes(data):
    with pytest.raises(FormatError):
        read_classes(Reader(data), 3, 4)


def test_a_pair_of_one_weight_has_no_frequencies():
    with pytest.raises(FormatError, match="impossible count"):
        read_classes(Reader(b"\0\2" + b"\0\2" + b"\0\4" + b"\0"), 1, 1)
