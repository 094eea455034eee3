"""The int8 kernels of oneDNN by themselves: what they round, where they may be used, digits of wide weights."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from methods.core.artifact import ActivationQuantizer
from methods.engine import bytecodes, onednn

int8 = pytest.mark.skipif(bool(onednn.unsupported()), reason=onednn.unsupported() or "there are int8 kernels")


@int8
def test_why_inexact_products_are_not_fused():
    """oneDNN rounds t + code * m1 once, the definition the product as well: codes differ where m1 is long."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(64, 64, 1)
    w = torch.randint(-128, 128, layer.weight.shape, generator=generator)
    x, r = (torch.randint(0, 256, (8, 64, 32, 32), generator=generator, dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last) for _ in range(2))
    kernel = onednn.Int8Layer(layer, w, 0, torch.full((64,), 2.0**-12), torch.full((64,), 50.0))
    target = ActivationQuantizer(1.0)
    for factor, differ in ((0.5, False), (0.5 + 2**-24, True), (1.5 + 2**-23, True)):
        want = bytecodes.summed(kernel, x, r, target, factor, target)
        fused = kernel.add_to(r.clone(), x, factor)
        assert onednn.exact_product(factor) != differ
        assert torch.equal(want, fused) != differ and int((want.int() - fused.int()).abs().max()) == differ


@int8
def test_saturating_sums_are_noticed():
    """oneDNN held to instructions that add products in 16 bits."""
    code = "from methods.engine import onednn; print(onednn.unsupported())"
    found = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
                           capture_output=True, text=True, check=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    assert "not exact on this CPU" in found.stdout


def test_exact_products():
    for factor in (1.0, 0.5, 95 / 256, 65535 / 65536, 1.5 * 2**-9):
        assert onednn.exact_product(factor)
        products = torch.arange(256).double() * factor
        assert torch.equal(products.float().double(), products)
    assert not any(onednn.exact_product(factor) for factor in (1 / 3, 0.5 + 2**-24, 65537 / 65536, 0.0, 2.0**-120))


@pytest.mark.parametrize("rows, columns", [(4, 300), (2, 3000), (2, 9000)])
def test_digits(rows, columns):
    integers = torch.randint(-32768, 32768, (rows, columns), generator=torch.Generator().manual_seed(0))
    integers[0], integers[1] = 32767, -32768
    digits = bytecodes.digits_of(integers)
    assert digits == [] or torch.equal(sum(factor * plane for factor, plane in digits), integers)
    for _, plane in digits:
        assert plane.min() >= -128 and plane.max() <= 127
        assert bytecodes.largest_partial_sum(plane, 0, 255) <= 1 << 24
    assert (digits == []) == (columns == 9000)
