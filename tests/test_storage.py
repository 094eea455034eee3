"""Files of compressed models: exact round trips, honest sizes, and nothing but FormatError for a bad file."""

import base64
import json
import lzma
import os
import resource
import tracemalloc
import zlib
from hashlib import blake2b

import numpy as np
import pytest
import torch
from torch import nn

from methods.core import container
from methods.core.artifact import (
    ActivationQuantizer,
    Affine,
    Codebook,
    CompressedModel,
    CompressedTensor,
    Levels,
    Topology,
    Window,
)
from methods.core.build import assemble
from methods.core.coding import entropy, gap_encode, huffman_mean_bits
from methods.core.errors import CompressError, ConfigError, FormatError
from methods.core.storage import Sizes, decode, encode, from_bytes, inspect, load, to_bytes
from methods.core.streams import varint

MODES = ("paper", "best")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def scales(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.1


def grids(channels):
    """{name: (grid, bits)}: every kind, with and without a zero, per tensor and per channel."""
    zero = torch.arange(channels, dtype=torch.int32) % 7 - 3
    return {
        "affine": (Affine(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)), 4),
        "affine unsigned": (Affine(torch.tensor(0.1), torch.tensor(9, dtype=torch.int32), signed=False), 4),
        "affine per channel": (Affine(scales(channels), torch.zeros(channels, dtype=torch.int32)), 8),
        "affine zero points": (Affine(scales(channels), zero), 3),
        "affine 16 bits": (Affine(scales(channels), zero * 10_000), 16),
        "levels": (Levels(torch.tensor(0.3), ints(-2, -1, 0, 1, 2)), 3),
        "levels without zero": (Levels(scales(channels), ints(-3, -1, 1, 3)), 2),
        "one level": (Levels(torch.tensor(0.3), ints(-7)), 1),
        "codebook": (Codebook(torch.cat([torch.zeros(1), torch.randn(31)])), 5),
        "codebook with unused entries": (Codebook(torch.cat([torch.randn(40), torch.zeros(1), torch.ones(23)])), 6),
        "codebook without zero": (Codebook(torch.tensor([-0.5, 0.25])), 1),
    }


def tensor(grid, bits, shape, density, seed=0):
    """Random codes of the grid under a random mask; at most 32 of the codes are in use."""
    g = torch.Generator().manual_seed(seed)
    low, high = grid.code_range(bits)
    codes = torch.randint(low, min(high, low + 31) + 1, shape, generator=g)
    mask = torch.rand(shape, generator=g) < density
    if density == 0.001:
        mask.fill_(False).view(-1)[-1] = True
    return CompressedTensor.of(codes, grid, bits, mask)


def small():
    """A model with everything in it."""
    g = torch.Generator().manual_seed(3)
    weights = {
        "conv1": tensor(*grids(6)["affine per channel"], (6, 1, 3, 3), 0.5),
        "conv2": tensor(*grids(8)["levels without zero"], (8, 6, 3, 3), 0.2),
        "fc": tensor(*grids(10)["codebook"], (10, 40), 0.1),
    }
    rest = {"conv1.bias": torch.randn(6, generator=g), "bn.weight": torch.ones(6), "fc.bias": torch.zeros(10)}
    activations = {"conv1": ActivationQuantizer(0.05), "add:0": ActivationQuantizer(1 / 3, -2, 4, True)}
    windows = {"add:0": Window(3, (0, 1, 2), paired=False, sparse24=True)}
    return CompressedModel(weights, rest, activations, windows, Topology({"conv1": "bn"}, {"conv2": (8, 6)}),
                           "harness", {"note": 1})


def assert_same(a, b):
    assert list(a.weights) == list(b.weights) and list(a.rest) == list(b.rest)
    for name, one in a.weights.items():
        two = b.weights[name]
        assert torch.equal(one.mask, two.mask) and torch.equal(one.codes, two.codes) and one.bits == two.bits
        assert torch.equal(one.decode().view(torch.int32), two.decode().view(torch.int32))
        assert type(one.grid) is type(two.grid) and one.codes.dtype == two.codes.dtype
        for field, value in vars(one.grid).items():
            other = getattr(two.grid, field)
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), field
            assert getattr(value, "dtype", None) == getattr(other, "dtype", None), field
    for name, one in a.rest.items():
        two = b.rest[name]
        assert one.shape == two.shape and one.dtype == two.dtype
        assert one.contiguous().numpy(force=True).tobytes() == two.numpy(force=True).tobytes() if (
            one.dtype != torch.bfloat16) else torch.equal(one.view(torch.int16), two.view(torch.int16))
    assert (a.activations, a.windows, a.topology, a.ranges_by) == (b.activations, b.windows, b.topology, b.ranges_by)


def round_trip(model, **arguments):
    data, sizes = to_bytes(model, **arguments)
    back = from_bytes(data)
    assert_same(model, back)
    assert sizes.total == len(data) and min(vars(sizes).values()) >= 0
    return data, sizes


# --- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("kind", grids(12))
def test_every_grid_at_every_density(kind, density, mode):
    grid, bits = grids(12)[kind]
    round_trip(CompressedModel({"fc": tensor(grid, bits, (12, 7, 3, 3), density)}, {}), mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_everything_else_in_a_model(mode, tmp_path):
    model = small()
    sizes = encode(model, tmp_path / "net.jc", mode=mode)
    assert sizes.total == os.path.getsize(tmp_path / "net.jc")
    back = decode(tmp_path / "net.jc")
    assert_same(model, back)
    assert back.notes == {} and back.ranges_by == "harness"
    assert to_bytes(back, mode=mode) == to_bytes(model, mode=mode)  # deterministic, and stable over a round trip
    assert from_bytes(to_bytes(CompressedModel({}, {}), mode=mode)[0]).weights == {}


@pytest.mark.parametrize("mode", MODES)
def test_rest_keeps_every_bit(mode):
    rest = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]), "scalar": torch.tensor(3.5),
        "half": torch.randn(5).half(), "brain": torch.randn(2, 3).bfloat16(), "count": torch.tensor(2**40),
        "flags": torch.tensor([True, False, True]), "none": torch.empty(0, 3), "transposed": torch.randn(4, 3).t(),
        "double": torch.randn(2).double(), "bytes": torch.arange(5, dtype=torch.uint8),
    }
    round_trip(CompressedModel({}, rest), mode=mode)
    with pytest.raises(CompressError, match="complex"):
        to_bytes(CompressedModel({}, {"z": torch.zeros(2, dtype=torch.complex64)}), mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_odd_shapes_and_memory_formats(mode):
    grid, bits = grids(1)["affine"]
    codes = torch.randint(-8, 8, (8, 4, 3, 3)).to(memory_format=torch.channels_last)
    model = CompressedModel({
        "empty": CompressedTensor.of(ints().reshape(0, 5), grid, bits),
        "no inputs": CompressedTensor.of(ints().reshape(5, 0), *grids(5)["affine zero points"]),
        "one": CompressedTensor.of(ints(1).reshape(1, 1), grid, bits), "nhwc": CompressedTensor.of(codes, grid, bits),
    }, {})
    round_trip(model, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_zero_points_far_apart(mode):
    grid = Affine(torch.ones(2), ints(-2**31, 2**31 - 1))
    codes = torch.tensor([[1, 2, -3], [1, 2, 7]])
    round_trip(CompressedModel({"fc": CompressedTensor.of(codes, grid, 4)}, {}), mode=mode)


def test_activation_scales_are_exact():
    for scale in (0.1, 1 / 3, float(np.float32(0.1)), 5e-324, 1e300):
        model = CompressedModel({}, {}, {"a": ActivationQuantizer(scale), "b": ActivationQuantizer(2.0)})
        round_trip(model)


@pytest.mark.parametrize("mode", MODES)
def test_load_rebuilds_the_network(mode, tmp_path):
    torch.manual_seed(0)
    skeleton = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()
    weight = tensor(*grids(5)["codebook"], (5, 6), 0.4)
    encode(assemble(skeleton, {"0": weight}), tmp_path / "net.jc", mode=mode)
    network, x = load(tmp_path / "net.jc", skeleton), torch.randn(3, 6)
    assert torch.equal(network[0].weight, weight.decode()) and torch.equal(network[3].weight, skeleton[3].weight)
    skeleton[0].weight.data = weight.decode()
    assert torch.equal(network(x), skeleton(x))


def golden_model():
    """A model defined by arithmetic, not by a random generator; it takes every coder of both modes."""
    n = torch.arange(480)
    mask = (n * n % 19 < 3).reshape(12, 40)
    skewed = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3]).int()[n * n * 7 % 11]
    weights = {
        "fc1": CompressedTensor.of(skewed.reshape(12, 10, 2, 2) * 2 - 3, Affine(torch.tensor(0.5), ints(-3)[0]), 3),
        "fc2": CompressedTensor.of(skewed.reshape(12, 40), Levels(torch.tensor(0.25), ints(-3, -1, 1, 3)), 2, mask),
        "fc3": CompressedTensor.of((n[:64] // 8).reshape(8, 8), Codebook(torch.arange(8) / 4), 3),
    }
    return CompressedModel(weights, {"fc2.bias": torch.arange(3) / 8, "steps": torch.tensor(3)},
                           {"fc1": ActivationQuantizer(0.5)}, {"fc1": Window(4, (0, 2, 4))}, Topology({"fc1": "bn1"}))


GOLDEN = {
    "paper":
        "ikpDTQEATIPRQKOUQG7WMTTQMdIBuh/oXpCoEUTUBOgvI4iIMVDEQscCpCJWB2oaUB3McpBotFJxSWoBiBcLUgOODoiIFVosgKy1UgL6SKm2FgAI"
        "AAAAPwAFDt0CBQApKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpCQMEBQEAEAAsGBgYGBgYGBgYGBgYGBgYGBgYGBgY"
        "GBgYGBgYGBgYGBgYGBgYGBgYGBgYGBgBAACAPgQNBRANDn8DAAgBAAAACBCMMcYYY4wxxhhjjDHGGGMMAwEFYQgwAB6LFfupqPFFOysq/lGjxYr9"
        "VNT4op0VFf+o0WLFfioCCAAAAAAAAIA+AAAAPwAAQD8AAIA/AACgPwAAwD8AAOA/DjkDAAgBAAAACAgBAAAAAAAAAA0ASJIkkSRJ2rZtI0mSbNu2"
        "tW3b/v//BxmLNtCBOcRCx0DHAGQQlG+iEw1ylgnY0lgAAAAAPwAAAAAAAAAAPgAAgD4DAAAAAAAAALuZpBzY5kUP",
    "best":
        "ikpDTQEBTIPRQKOUQG7WMTTQMdIBuh/oXpCoEUTUBOgvI4iIMVDEQscCpCJWB2oaUB3McpBotFJxSWoBiBcLUgOODoiIFVosgKy1UgL6SKm2FgAI"
        "AAAAPwAFC90CggAESWQi4B0KtgVLnboIkmTE3qFNOqJgCGuF5cxsO/VE6OgAGA2pXYIEBQkABySU2p4Q85mKVFB4aTDciaLcS8z2O+CcvA9a99vP"
        "hD3Z6ZuNd2sBAACAPgQNBRANFk1iABEHAAAAAAAGCVkLIFj/bEo/mmIABDUKDhN77GFvG6J8LL/RxQFlAggAAAAAAACAPgAAAD8AAEA/AACAPwAA"
        "oD8AAMA/AADgPwANAAAAAEmSJJIkSdu2bSRJkm3btrZt2////xmLNtCBOcRCx0DHAGQQlG+iEw1ylgnY0lgAAAAAPwAAAAAAAAAAPgAAgD4DAAAA"
        "AAAAACgpSWJwxxMW",
}


@pytest.mark.parametrize("mode", MODES)
def test_files_of_this_version_stay_readable(mode):
    """Whoever changes the format raises VERSION; a new release of a library must not change it unnoticed."""
    assert_same(golden_model(), from_bytes(base64.b64decode(GOLDEN[mode])))


# --- sizes -------------------------------------------------------------------------------------------------


def big(density=0.1):
    """A normal layer, pruned by magnitude, on 31 levels and a zero."""
    w = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    keep = w.abs() >= w.abs().flatten().quantile(1 - density)
    codes = torch.where(keep, (w * 4).round().clamp(-15, 15) + 16, 0).int().int().int()
    return tensor_on_codebook(codes)


def tensor_on_codebook(codes):
    return CompressedTensor.of(codes, Codebook(torch.cat([torch.zeros(1), torch.linspace(-3, 3, 62)[::2] + 1e-3])), 5)


def test_best_is_near_the_entropy_and_below_paper_and_xz():
    t = big()
    model, symbols = CompressedModel({"fc": t}, {}), t.codes.numpy().reshape(-1)
    best, paper = (to_bytes(model, mode=mode)[1] for mode in ("best", "paper"))
    assert best.codes + best.positions <= 1.01 * entropy(symbols) * symbols.size / 8
    assert best.total < paper.total < len(lzma.compress(symbols.astype(np.int8).tobytes(), preset=6))


@pytest.mark.parametrize("index_bits", [3, 5, 8])
def test_paper_mode_takes_what_deep_compression_counts(index_bits):
    """Codes and positions are E x (mean Huffman bits), fillers included, plus the tables and a few bytes of framing."""
    t = big()
    sizes = to_bytes(CompressedModel({"fc": t}, {}), mode="paper", index_bits=index_bits)[1]
    symbols, is_filler = gap_encode(t.mask.numpy().reshape(-1), index_bits)
    codes = np.zeros(len(symbols), int)
    codes[~is_filler] = t.codes[t.mask].numpy()
    assert 0 <= sizes.positions - len(symbols) * huffman_mean_bits(symbols) / 8 <= 5 * 2**index_bits / 8 + 16
    assert 0 <= sizes.codes - len(symbols) * huffman_mean_bits(codes) / 8 <= 5 * 32 / 8 + 16
    assert sizes.codebooks == 32 * 4 + 2


def test_sizes_split_a_dense_stream_by_the_information_of_the_mask(tmp_path):
    t = big()
    layer = inspected(CompressedModel({"fc": t}, {}), tmp_path)["layers"][0]
    assert layer["coder"] == "dense: range"
    assert layer["bytes"]["positions"] == pytest.approx(layer["mask_entropy"] * 200_000 / 8, abs=2)


def inspected(model, folder, **arguments):
    encode(model, folder / "inspected.jc", **arguments)
    return inspect(folder / "inspected.jc")


@pytest.mark.parametrize("mode", MODES)
def test_inspect_agrees_with_encode(mode, tmp_path):
    model = small()
    sizes = encode(model, tmp_path / "net.jc", mode=mode)
    found = inspect(tmp_path / "net.jc")
    assert json.loads(json.dumps(found)) == found
    assert Sizes(**found["split"]) == sizes and found["bytes"] == sizes.total and found["mode"] == mode
    for part, total in (("codes", "codes"), ("positions", "positions"), ("codebook", "codebooks")):
        assert sum(layer["bytes"][part] for layer in found["layers"]) == getattr(sizes, total)
    layer, t = found["layers"][1], model.weights["conv2"]
    assert (layer["name"], layer["shape"], layer["bits"], layer["grid"]) == ("conv2", [8, 6, 3, 3], 2, "levels")
    assert (layer["kept"], layer["density"]) == (t.kept, t.density)
    assert layer["code_entropy"] == pytest.approx(entropy(t.codes[t.mask].numpy()))


def test_index_bits(tmp_path):
    model = small()
    sizes = {bits: to_bytes(model, mode="paper", index_bits=bits)[1].total for bits in [*range(2, 9), "auto"]}
    assert sizes["auto"] <= min(sizes.values())
    per_layer = {"conv1": 1, "conv2": 3, "fc": 16}
    coders = [layer["coder"].split(":")[0] for layer in
              inspected(model, tmp_path, mode="paper", index_bits=per_layer)["layers"]]
    assert coders == ["gap 1", "gap 3", "gap 16"]
    for wrong in (0, 17, 5.0, True, "five", None, {"fc": 5}, per_layer | {"conv2": 0}, per_layer | {"other": 5}):
        with pytest.raises(ConfigError):
            to_bytes(model, index_bits=wrong)
    with pytest.raises(ConfigError, match="zip"):
        to_bytes(model, mode="zip")


def test_small_networks_have_small_overhead():
    data, sizes = to_bytes(small())
    assert sizes.header <= 110 and sizes.activations <= 60 and len(data) < 700


def test_a_column_of_zeros_costs_less_by_column(tmp_path):
    mask = torch.zeros(64, 200, dtype=torch.bool)
    mask[:, ::23] = True
    t = CompressedTensor.of(mask.int(), Affine(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)), 2)
    model = CompressedModel({"fc": t}, {})
    round_trip(model)
    assert inspected(model, tmp_path)["layers"][0]["coder"].startswith("gap")


# --- bad files ---------------------------------------------------------------------------------------------


def refused(data, match=None):
    with pytest.raises(FormatError, match=match) as caught:
        from_bytes(data, "net.jc")
    assert str(caught.value).startswith("net.jc: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_truncation_at_every_length(mode):
    data = to_bytes(small(), mode=mode)[0]
    for length in range(len(data)):
        refused(data[:length])
    refused(data + b"\0")


@pytest.mark.parametrize("mode", MODES)
def test_every_flipped_byte(mode):
    data = to_bytes(small(), mode=mode)[0]
    rng = np.random.default_rng(0)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        refused(bytes(damaged))


def test_messages(tmp_path):
    data = to_bytes(small())[0]
    refused(b"", "empty")
    refused(b"PK\x03\x04 a zip file", "not a compressed model")
    refused(data[:4] + bytes([2]) + data[5:], "version 2, newer")
    refused(sealed(data[:4] + bytes([0]) + data[5:-8]), "version 0")
    refused(sealed(data[:5] + bytes([9]) + data[6:-8]), "mode 9")
    refused(data[:-1], "damaged or cut short")
    for bad, word in ((tmp_path / "none.jc", "no such file"), (tmp_path, "cannot be read")):
        for read in (decode, inspect, lambda path: load(path, nn.Linear(1, 1))):
            with pytest.raises(FormatError, match=word) as caught:
                read(bad)
            assert str(bad) in str(caught.value)


def sealed(body):
    """`body` with the checksum that makes it a whole file."""
    return body + blake2b(body, digest_size=8).digest()


@pytest.mark.parametrize("mode", MODES)
def test_damage_under_a_valid_checksum_is_refused_or_read_as_some_model(mode):
    data = to_bytes(small(), mode=mode)[0]
    rng = np.random.default_rng(1)
    for _ in range(1500):
        body = bytearray(data[:-8])
        for place in rng.integers(5, len(body), rng.integers(1, 4)):
            body[place] = rng.integers(256)
        try:
            from_bytes(sealed(bytes(body[:rng.integers(6, len(body)) if rng.random() < 0.2 else len(body)])))
        except FormatError:
            continue


FLOAT = np.float32(0.5).tobytes()
GOOD = b"\0" + FLOAT  # an affine grid
DENSE_ONES = GOOD + b"\0" + b"\0\2"  # a constant stream of 1
END = varint(0) + b"\0"  # no activations, nothing in the rest


def layer(shape=(2, 3), bits=4, name="fc", **parts):
    return {"w": [[name, list(shape) if isinstance(shape, tuple) else shape, bits]], **parts}


def test_names_with_line_ends_make_one_line():
    refused(container.frame("best", layer(name="a\nb", r=[["a\nb.weight", [0]]]), DENSE_ONES + END), "a b")


def test_the_hand_made_file_is_right():
    model = from_bytes(container.frame("best", layer(), DENSE_ONES + END))
    assert torch.equal(model.weights["fc"].decode(), torch.full((2, 3), 0.5))


@pytest.mark.parametrize("header", [
    [], 5, "w", {"x": 1}, {"w": 5}, {"w": [5]}, {"w": [["fc", [2, 3]]]}, layer(bits="4"), layer(bits=0), layer(bits=17),
    layer(bits=True), layer(name=7), layer(shape=(6,)), layer(shape=()), layer(shape=6), layer(shape=(2, -3)),
    layer(shape=(2, "3")), layer(shape=(2, 3) * 5), layer(shape=(2**20, 2**20)), layer(shape=(0, 2**62, 2**62)),
    layer(shape=(2**100, 2**100)), layer(shape=(2, 3, 1, 2**24)), {"w": layer()["w"] * 2}, layer(h="yes"),
    layer(h=1.0), layer(r=[["a", [2**40]]]), layer(r=[["a", [1]], ["a", [1]]]), layer(r=[["fc.weight", [0]]]),
    layer(t={"a": "int64"}), layer(r=[["a", [0]]], t={"a": "object"}), layer(f=[]), layer(f={"a": 1}),
    layer(s={"a": [1]}), layer(s={"a": [1, "2"]}), layer(r=[["a", [1]]]),
], ids=lambda header: json.dumps(header)[:50])
def test_malicious_headers(header):
    refused(container.frame("best", header, DENSE_ONES + END))


@pytest.mark.parametrize("text", [
    b"", b"{", b"\xff", b"[" * 100_000, b'{"h":' + b"9" * 5000 + b"}", b'{"h":NaN}', b'{"h":1e999}', b" " * 3_000_000,
])
def test_headers_that_are_no_json(text):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, container.PRESET)
    blob = packer.compress(text) + packer.flush()
    for stored in (blob, blob[:-1], blob + b"\0", b"", b"\xff\xff"):
        refused(sealed(container.MAGIC + b"\1\1" + varint(len(stored)) + stored + END))
    refused(sealed(container.MAGIC + b"\1\1" + varint(10**6) + blob), "ends too early")


NAN = np.float32("nan").tobytes()
PACKED, RANGE, HUFFMAN = 1, 2, 3


@pytest.mark.parametrize("block", {
    "nothing": b"",
    "unknown grid": b"\3" + FLOAT + DENSE_ONES[5:],
    "unknown flags": b"\x40" + FLOAT + DENSE_ONES[5:],
    "scale 0": b"\0" + bytes(4) + DENSE_ONES[5:],
    "scale nan": b"\0" + NAN + DENSE_ONES[5:],
    "empty codebook": b"\2\0\0\0\2",
    "long codebook": b"\2" + varint(2**50) + bytes(30),
    "codebook too short for its codes": b"\2\1" + FLOAT + b"\0\0\2",
    "many levels": b"\1" + FLOAT + varint(2**40) + b"\0\2",
    "no levels": b"\1" + FLOAT + b"\0\0\0\2",
    "equal levels": b"\1" + FLOAT + b"\3\0\2\0\0\2",
    "level beyond 32 bits": b"\1" + FLOAT + b"\1\0" + varint(2**40) + b"\0\0\0",
    "zero point beyond 32 bits": b"\x08" + FLOAT + b"\0" + varint(2**40) + b"\0\0\2",
    "code out of range": GOOD + b"\0\0" + varint(2 * 8),
    "code far out of range": GOOD + b"\0\0" + varint(2**55),
    "unknown layout": GOOD + b"\4\0\2",
    "mask of twos": GOOD + b"\1\0\4\0\2",
    "gap of no bits": GOOD + b"\2\1\0\0\0\2",
    "gap of 63 bits": GOOD + b"\xfe\1\0\0\0\2",
    "more entries than weights": GOOD + b"\x16\7\0\0\0\2",
    "positions outside": GOOD + b"\x16\4\0\2\0\2",
    "negative position": GOOD + b"\x16\1\0\1\0\2",
    "symbols of no width": GOOD + b"\0" + bytes([PACKED, 0]) + bytes(9),
    "symbols too wide": GOOD + b"\0" + bytes([PACKED | 63 << 2, 0]) + bytes(60),
    "frequencies all 0": GOOD + b"\0" + bytes([RANGE | 4 << 5, 0, 3]) + bytes(9),
    "alphabet of one": GOOD + b"\0" + bytes([RANGE | 4 << 5, 0, 1]) + bytes(9),
    "huge alphabet": GOOD + b"\0" + bytes([RANGE | 4 << 5, 0]) + varint(2**40) + bytes(9),
    "huge frequencies": GOOD + b"\0" + bytes([RANGE | 7 << 5, 0, 2]) + b"\xff" * 9,
    "no data for the range coder": GOOD + b"\0" + bytes([RANGE | 4 << 5, 0, 3, 0x11, 0x1]) + varint(2**40),
    "too many Huffman codes": GOOD + b"\0" + bytes([HUFFMAN, 0, 3, 0x21, 4, 1]) + bytes(9),
    "Huffman data too short": GOOD + b"\0" + bytes([HUFFMAN, 0, 2, 0x21, 0, 0]),
    "Huffman data too long": GOOD + b"\0" + bytes([HUFFMAN, 0, 2, 0x21, 0, 9]) + bytes(9),
}.items(), ids=lambda item: item[0])
def test_malicious_blocks(block):
    refused(container.frame("best", layer(), block[1] + END))


def activation_section(value, scales=FLOAT, header=None):
    blob = container.deflate(value, container.json_bytes(header or {}))
    return varint(len(blob)) + blob + scales


@pytest.mark.parametrize("value, scales", [
    ({}, FLOAT), ([0, [], []], FLOAT), ([0, [["a", 8, 0]], []], FLOAT), ([0, [["a", 8, 0, 0]], []], b""),
    ([0, [["a", 8, 0, 0]], []], bytes(4)), ([0, [["a", 8, 0, 0]], []], NAN), ([0, [["a", 8, 300, 0]], []], FLOAT),
    ([0, [["a", 10**12, 0, 0]], []], FLOAT), ([0, [["a", 8, 0, 2]], []], FLOAT),
    ([0, [["a", 8, 0, 0]], [["b", 4, [1], 0]]], FLOAT), ([0, [["a", 8, 0, 0]], [["a", 4, [99], 0]]], FLOAT),
    ([0, [["a", 8, 0, 0]], [["a", 4, [1], 8]]], FLOAT),
    ([0, [["a", 8, 0, 0]], [["a", 4, 1, 0]]], FLOAT), ([1, [["a", 8, 0, 0]], []], FLOAT),
])
def test_malicious_activations(value, scales):
    refused(container.frame("best", {}, activation_section(value, scales) + b"\0"))


@pytest.mark.parametrize("rest", [
    b"", b"\3" + bytes(8), b"\0" + bytes(7), b"\0" + bytes(9), b"\1" + bytes(8), b"\2\xff\xff",
    b"\1" + lzma.compress(bytes(10**7), lzma.FORMAT_RAW, filters=container.FILTERS),
])
def test_malicious_rest(rest):
    refused(container.frame("best", {"r": [["a", [2]]]}, varint(0) + rest))
    refused(container.frame("best", {"r": [["a", [2]]], "t": {"a": "bool"}}, varint(0) + b"\0\2\0"), "bool")


def test_a_small_file_cannot_ask_for_much_memory():
    tracemalloc.start()
    refused(container.frame("best", layer(shape=(2**14, 2**14)), DENSE_ONES + END), "more values")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


# --- writing -----------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path, model = tmp_path / "net.jc", small()
    encode(model, path, mode="paper")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(CompressError, match="net.jc: No space left"):
                encode(model, path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.jc"]
    with pytest.raises(CompressError, match="cannot write"):
        encode(model, tmp_path / "no such folder" / "net.jc")
    with pytest.raises(CompressError, match="cannot write"):
        encode(model, path / "net.jc")
    with pytest.raises(CompressError, match="cannot write"):
        encode(model, tmp_path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.jc"]


def test_a_write_that_the_system_cuts_short(tmp_path):
    """The real thing: the kernel refuses the bytes beyond a limit on the size of files."""
    path, limits = tmp_path / "net.jc", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(CompressError, match="cannot write"):
            encode(small(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["net.jc"]


def test_files_get_the_usual_permissions(tmp_path):
    encode(small(), tmp_path / "net.jc")
    (tmp_path / "plain").write_bytes(b"")
    assert os.stat(tmp_path / "net.jc").st_mode == os.stat(tmp_path / "plain").st_mode
