"""Scales, biases and shared values in 16 bits: what changes, by how much, and what the file takes for it."""

import pytest
import torch
from torch import nn

from methods.core.artifact import Affine, Codebook, CompressedModel, CompressedTensor, Levels
from methods.core.errors import FormatError
from methods.core.file.blocks import read_tensor
from methods.core.file.storage import from_bytes, to_bytes
from methods.core.file.streams import Reader
from methods.core.fit.sixteen_bit import nearest_16_bit, sixteen_bit
from methods.core.graph.build import apply, assemble


def grids(n):
    scale = torch.rand(n) / 50 + 1e-3
    return {"affine": Affine(scale, torch.arange(n).int() % 7), "levels": Levels(scale, torch.arange(-3, 5).int()),
            "codebook": Codebook(torch.cat([torch.zeros(1), torch.randn(15)]))}


@pytest.mark.parametrize("name", ["affine", "levels", "codebook"])
def test_values_move_by_half_a_unit_in_the_last_place_and_codes_stay(name):
    t = CompressedTensor.of(torch.randint(0, 8, (40, 30)), grids(40)[name], 5, torch.rand(40, 30) < 0.5)
    model = CompressedModel({"fc": t}, {"fc.bias": torch.randn(40), "head.weight": torch.randn(3, 4)})
    small = sixteen_bit(model)
    one = small.weights["fc"]
    assert torch.equal(one.codes, t.codes) and torch.equal(one.mask, t.mask)
    assert ((one.decode() - t.decode()).abs() <= t.decode().abs() * 2.0**-8).all()
    assert torch.equal(small.rest["head.weight"], model.rest["head.weight"])
    before, after = to_bytes(model)[1], to_bytes(small)[1]
    floats = 16 if name == "codebook" else 40
    assert after.codebooks == before.codebooks - 2 * floats and after.rest < 0.75 * before.rest
    back = from_bytes(to_bytes(small)[0])
    assert torch.equal(back.weights["fc"].decode(), one.decode()) and torch.equal(back.rest["fc.bias"],
                                                                                  small.rest["fc.bias"])
    assert all(torch.equal(a, b) for a, b in zip(sixteen_bit(small).rest.values(), small.rest.values(), strict=True))


def test_the_nearer_format_that_loses_nothing():
    for values, dtype in (([1.0 + 2**-10, 3.3], torch.float16), ([1e-9, 1.0], torch.bfloat16),
                          ([1e5, 1.0], torch.bfloat16), ([0.0, -0.5], torch.float16)):
        tensor = torch.tensor(values)
        assert torch.equal(nearest_16_bit(tensor), tensor.to(dtype).float())
    for lost in ([3.4e38, 1.0], [1e-45, 1.0], [float("inf")]):
        assert torch.equal(nearest_16_bit(torch.tensor(lost)), torch.tensor(lost))


@torch.no_grad()
def test_the_network_hardly_notices():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(16, 3, 8, 8)
    want, found = (apply(c, model)(x) for c in (assemble(model, {}), sixteen_bit(assemble(model, {}))))
    assert 0 < (want - found).abs().max() < 0.01 * want.abs().max()


def test_two_widths_at_once_are_no_grid():
    with pytest.raises(FormatError, match="unknown kind of grid"):
        read_tensor(Reader(bytes([0x60, 0, 0, 0, 0]) + bytes(9)), [2, 3], 4)
