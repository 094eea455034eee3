"""The int8 kernels of oneDNN by themselves: what they round, where they may be used, digits of wide weights."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from methods.core.artifact import ActivationQuantizer
from methods.core.errors import CompressError
from methods.core.graph.graph import Node
from methods.engine import bytecodes, onednn, wide
from methods.engine.accumulate import accumulate_int64, largest_partial_sum

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


SATURATING = """
import torch
from torch import nn
from methods.engine import onednn
from methods.engine.accumulate import accumulate_int64
print(repr(onednn.unsupported()))
generator = torch.Generator().manual_seed(0)
x = torch.randint(0, 256, (4, 64, 6, 6), generator=generator, dtype=torch.uint8)
x[0] = 255
for layer in (nn.Conv2d(64, 32, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Linear(6, 16),
              nn.Conv2d(64, 64, 5, 2, padding=2, groups=64), nn.Conv2d(64, 64, (1, 3), dilation=2, groups=64)):
    w = torch.randint(-128, 128, layer.weight.shape, generator=generator)
    w[0], w[1], w[2], w[3], w[4] = -128, 127, 64, -64, 65
    one = torch.ones(len(w))
    given = x if w.ndim == 2 else x.contiguous(memory_format=torch.channels_last)
    kernels = [onednn.Int8Layer(layer, w, 0, one, 0 * one, largest) for largest in (None, 64, 128)]
    want = accumulate_int64(layer, x.long(), w)
    print(onednn.largest_weight(layer), *(torch.equal(kernel(given, torch.float32).long(), want) for kernel in kernels))
"""


@int8
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_weights_are_split_where_sums_saturate(instructions):
    """oneDNN held to instructions that add products in 16 bits: all weights of 8 bits at once are too large."""
    found = subprocess.run([sys.executable, "-c", SATURATING], env={**os.environ, "ONEDNN_MAX_CPU_ISA": instructions},
                           capture_output=True, text=True, check=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    fault, conv, depthwise, linear, *others = found.stdout.splitlines()
    assert fault == "''" and conv == linear == "64 True True False"
    assert all(line.split()[1:3] == ["True", "True"] for line in (depthwise, *others))
    if instructions == "AVX2":  # whose depthwise kernels add no two products
        assert depthwise == others[0] == others[1] == "128 True True True"


def test_a_kernel_that_is_never_exact_is_not_made(monkeypatch):
    """No split of its weights would help: the search for one must not begin."""
    monkeypatch.setattr(onednn, "_tried", lambda trials: (0, "not exact on this CPU"))
    with pytest.raises(CompressError, match="^not exact on this CPU$"):
        onednn.Int8Layer(nn.Linear(2, 2), torch.ones(2, 2), 0, torch.ones(2), torch.zeros(2))


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
    digits = wide.digits_of(integers)
    assert digits == [] or torch.equal(sum(factor * plane for factor, plane in digits), integers)
    for factor, plane in digits:
        assert plane.abs().max() <= (128 if factor == 1 else 255)
        assert largest_partial_sum(plane, 0, 255) <= 1 << 24
    assert (digits == []) == (columns == 9000) and (columns > 300 or len(digits) == 2)


EDGES = {  # (in, out, kernel), what else, sides of the picture, whether the int8 kernels take such a layer
    "a window above the picture": ((1, 9, 2), {"padding": 2}, (3, 3), False),
    "windows beside the picture": ((3, 4, (1, 2)), {"padding": (0, 2)}, (4, 4), False),
    "columns a dilation misses": ((2, 4, (4, 2)), {"padding": (2, 1), "dilation": 3}, (10, 2), True),
    "rows a dilation misses": ((2, 3, 2), {"padding": 3, "dilation": 3}, (2, 5), True),
    "a strided window above the picture": ((4, 2, 1), {"stride": 3, "padding": 1, "dilation": 3}, (7, 2), False),
    "one column of a strided conv": ((8, 16, 3), {"stride": (1, 2), "padding": 1, "groups": 8}, (6, 1), True),
}


@int8
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("zero", [0, 77])
def test_windows_without_pixels(edge, zero):
    """Refused, or right: oneDNN gives garbage there, or ends the process."""
    sizes, options, sides, taken = EDGES[edge]
    generator, layer = torch.Generator().manual_seed(0), nn.Conv2d(*sizes, **options)
    x = torch.randint(0, 256, (2, sizes[0], *sides), generator=generator, dtype=torch.uint8)
    integers = torch.randint(-128, 128, layer.weight.shape, generator=generator)
    total = accumulate_int64(layer, x.long() - zero, integers)
    ones, offset = torch.ones(sizes[1]), torch.full((sizes[1],), 0.25)
    assert onednn.takes(layer, integers, 8) == taken
    if not taken:
        return
    kernel = onednn.Int8Layer(layer, integers, zero, ones / 256, offset)
    x = x.contiguous(memory_format=torch.channels_last)
    want = total.float() / 256 + 0.25
    assert torch.equal(kernel(x, torch.float32), want)
    assert torch.equal(kernel(x, torch.uint8), want.round().clamp(0, 255).to(torch.uint8))
    codes = torch.randint(0, 256, want.shape, generator=generator, dtype=torch.uint8)
    codes = codes.contiguous(memory_format=torch.channels_last)
    assert torch.equal(kernel.add_to(codes.clone(), x, 0.5), (want + codes * 0.5).round().clamp(0, 255).to(torch.uint8))


def test_sums_beyond_int32_are_not_taken():
    """70,000 products of 255 and -128 do not fit: such a layer runs on the exact kernels."""
    for count, taken in ((30_000, True), (70_000, False)):
        assert onednn.takes(nn.Linear(count, 1), torch.full((1, count), -128), 8) == taken


@pytest.mark.parametrize("kernel, padding, stride", [(3, 1, 2), (2, 1, 1), ((1, 3), (0, 1), 1)])
def test_max_pools_pad_with_what_never_wins(kernel, padding, stride):
    """Of codes that are all the lowest, the border of the pooled ones is the lowest too."""
    pool = nn.MaxPool2d(kernel, stride, padding)
    form = ActivationQuantizer(0.1, -3, 8, signed=True)
    lowest = torch.zeros(2, 3, 5, 5, dtype=torch.uint8)
    assert not bool(bytecodes.on_bytes(Node("pool", "maxpool", ("x",), pool, pool), form, lowest).any())


@int8
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("largest", [128, 64])
def test_wide_weights_read_inputs_again(groups, largest):
    """Three inputs of a group: one of 9 bits, one of up to 384, one of 8 bits."""
    generator, layer = torch.Generator().manual_seed(0), nn.Conv2d(3 * groups, 4 * groups, 3, padding=1, groups=groups)
    if largest > onednn.largest_weight(layer):
        pytest.skip("this CPU adds products in 16 bits")
    integers = torch.randint(-128, 128, layer.weight.shape, generator=generator)
    integers[:, 0], integers[:, 1] = integers[:, 0] * 2 + 1, integers[:, 1] * 3
    x = torch.randint(0, 256, (2, 3 * groups, 6, 5), generator=generator, dtype=torch.uint8)
    count = torch.ones(4 * groups)
    kernel = onednn.Int8Layer(layer, integers, 9, count, 0 * count, largest)
    peaks = [(int(part.max()), int(-part.min())) for part in integers.movedim(1, 0)]
    reads = [max(-(-high // min(largest, 127)), -(-low // largest)) for high, low in peaks]
    assert sorted(kernel.again.tolist()) == [i for i, count in enumerate(reads) for _ in range(count - 1)]
    assert kernel.integers.abs().int().max() <= largest and onednn.takes(layer, integers, 8)
    assert kernel.again.tolist() == [0, 1, 1] or largest == 64
    got = kernel(x.contiguous(memory_format=torch.channels_last), torch.float32)
    assert torch.equal(got.long(), accumulate_int64(layer, x.long() - 9, integers))
