"""Sparse formats: literal encoders on small tensors, and the stored table of a 512 x 4608 matrix."""

import math
from functools import cache

import pytest
import torch

from methods.core.errors import ConfigError
from methods.engine.costs.formats import bits_in, fits_two_four, format_bits, smallest


@cache
def random_mask(density):
    """Exactly round(density n) kept weights at random places."""
    n = 512 * 4608
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order[:round(density * n)]] = True
    return mask.reshape(512, 4608)


@pytest.mark.parametrize("sparsity, bits, wanted", [
    (0.50, 8, {"dense": 8, "bitmap": 5.0, "csr": 10.5, "relative": 6.0, "entropy": 5.0}),
    (0.75, 8, {"dense": 8, "bitmap": 3.0, "csr": 5.25, "relative": 3.03, "entropy": 2.81}),
    (0.90, 8, {"dense": 8, "bitmap": 1.80, "csr": 2.10, "relative": 1.47, "entropy": 1.27}),
    (0.95, 8, {"dense": 8, "bitmap": 1.40, "csr": 1.05, "relative": 1.07, "entropy": 0.69}),
    (0.50, 4, {"bitmap": 3.0, "relative": 4.0}), (0.75, 4, {"bitmap": 2.0, "relative": 2.02}),
    (0.90, 4, {"bitmap": 1.4, "relative": 0.98}), (0.95, 4, {"bitmap": 1.2, "relative": 0.71})])
def test_stored_table(sparsity, bits, wanted):
    sizes = format_bits(random_mask(1 - sparsity), bits)
    assert {name: round(sizes[name] / (512 * 4608), 2) for name in wanted} == wanted
    assert "2:4" not in sizes


def test_two_four_of_the_stored_table():
    mask = torch.tensor([True, False, False, True]).repeat(512, 4608 // 4)
    assert format_bits(mask, 8)["2:4"] / mask.numel() == 5.0
    assert format_bits(mask, 4)["2:4"] / mask.numel() / 4 == 0.75  # of dense


def literal(mask, bits, index_bits):
    """Every format written out, as the number of bits of what is written."""
    rows = mask.reshape(len(mask), -1).tolist()
    n, kept = mask.numel(), int(mask.sum())
    columns = len(rows[0])
    csr = sum(bits + math.ceil(math.log2(columns)) for row in rows for keep in row if keep)
    csr += sum(math.ceil(math.log2(kept + 1)) for _ in range(len(rows) + 1))
    entries, zeros = 0, 0
    for keep in (keep for row in rows for keep in row):
        if keep:
            entries, zeros = entries + 1, 0
        elif zeros == 2**index_bits - 1:
            entries, zeros = entries + 1, 0  # a stored zero
        else:
            zeros += 1
    flat = [keep for row in rows for keep in row]
    while flat and not flat[-1]:
        flat.pop()
    trailing = (n - len(flat)) // 2**index_bits  # fillers after the last kept weight are not stored
    share = kept / n
    h = -sum(q * math.log2(q) for q in (share, 1 - share) if q)
    return {"dense": n * bits, "bitmap": sum(1 + bits * keep for row in rows for keep in row), "csr": csr,
            "relative": (entries - trailing) * (bits + index_bits), "entropy": n * h + kept * bits}


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3, 3), (1, 1), (6, 1)])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("bits, index_bits", [(1, 1), (3, 2), (8, 4)])
def test_against_literal_encoders(shape, density, bits, index_bits):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < density
    sizes = format_bits(mask, bits, index_bits=index_bits)
    assert {name: size for name, size in sizes.items() if name != "2:4"} == pytest.approx(
        literal(mask, bits, index_bits))


def test_a_grid_without_zero_needs_a_code_for_pruned():
    mask = torch.tensor([[True, False, True, True]])
    with_zero, without = format_bits(mask, 2), format_bits(mask, 2, zero_code=False)
    assert (with_zero["dense"], without["dense"]) == (8, 12) and without["bitmap"] == with_zero["bitmap"] == 10
    assert without["relative"] == 3 * (3 + 4)
    whole = torch.ones_like(mask)
    assert format_bits(whole, 2, zero_code=False)["dense"] == 8


def test_order_of_two_four():
    """Channels run fastest: 3 of 4 consecutive channels at one position do not fit, 3 of 4 columns do."""
    channels = torch.zeros(1, 4, 1, 4, dtype=torch.bool)
    channels[0, :3, 0, 0] = True
    assert not fits_two_four(channels) and fits_two_four(channels.transpose(1, 3))
    assert fits_two_four(torch.ones(5, 2, dtype=torch.bool)) and not fits_two_four(torch.ones(5, 3, dtype=torch.bool))
    tail = torch.tensor([[0, 0, 1, 1, 1, 1, 0]], dtype=torch.bool)
    assert fits_two_four(tail)
    tail[0, 6] = True
    assert not fits_two_four(tail)


def test_choosing():
    sizes = format_bits(random_mask(0.1), 8)
    assert smallest(sizes) == "relative" and bits_in("bitmap", sizes) == sizes["bitmap"]
    assert smallest(format_bits(torch.ones(2, 3, dtype=torch.bool), 8)) == "dense"
    with pytest.raises(ConfigError, match="dense, bitmap, csr, relative, entropy"):
        bits_in("2:4", sizes)


@pytest.mark.parametrize("arguments, word", [((torch.ones(2, 2, dtype=torch.bool), 0), "bits = 0"),
                                             ((torch.ones(4, dtype=torch.bool), 8), "shape"),
                                             ((torch.ones(0, 4, dtype=torch.bool), 8), "shape")])
def test_what_is_not_allowed(arguments, word):
    with pytest.raises(ConfigError, match=word):
        format_bits(*arguments)
