"""Files of compressed models: exact round trips and honest sizes. For bad files see test_bad_files.py."""

import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

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
from methods.core.errors import CompressError, ConfigError
from methods.core.file.coding import entropy, gap_encode, huffman_mean_bits
from methods.core.file.container import write_file
from methods.core.file.storage import Sizes, decode, encode, from_bytes, inspect, load, to_bytes
from methods.core.graph.build import assemble

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
        round_trip(CompressedModel({}, {}, {"a": ActivationQuantizer(scale), "b": ActivationQuantizer(2.0)}))


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


# --- sizes -------------------------------------------------------------------------------------------------


def big(density=0.1):
    """A normal layer, pruned by magnitude, on 31 levels and a zero."""
    w = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    keep = w.abs() >= w.abs().flatten().quantile(1 - density)
    codes = torch.where(keep, (w * 4).round().clamp(-15, 15) + 16, 0).int().int().int()
    return CompressedTensor.of(codes, Codebook(torch.cat([torch.zeros(1), torch.linspace(-3, 3, 31) + 0.01])), 5)


def test_best_is_near_the_entropy_and_below_paper_and_xz(tmp_path):
    t = big()
    model, symbols = CompressedModel({"fc": t}, {}), t.codes.numpy().reshape(-1)
    layer = inspected(model, tmp_path)["layers"][0]
    assert layer["coder"] == "dense: range"  # one stream, of which the mask's information counts as positions
    assert layer["bytes"]["positions"] == pytest.approx(layer["mask_entropy"] * 200_000 / 8, abs=2)
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


def test_only_plain_files_are_replaced(tmp_path):
    """A link is followed, and a pipe, a device or a folder stays what it is."""
    real, link, pipe = tmp_path / "real.jc", tmp_path / "link.jc", tmp_path / "pipe.jc"
    link.symlink_to(real)
    write_file(link, b"one")
    assert link.is_symlink() and real.read_bytes() == b"one"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("")):
        with pytest.raises(CompressError, match="cannot write .*no plain file"):
            write_file(path, b"two")
    assert pipe.is_fifo() and sorted(p.name for p in tmp_path.iterdir()) == ["link.jc", "pipe.jc", "real.jc"]


def test_index_bits(tmp_path):
    model, layers = small(), {str(density): big(density) for density in (0.005, 0.05, 0.5)}
    sizes = {bits: to_bytes(CompressedModel(layers, {}), mode="paper", index_bits=bits)[1].total
             for bits in [*range(2, 9), "auto"]}
    assert sizes["auto"] < min(sizes[bits] for bits in range(2, 9))  # each layer has a width of its own
    per_layer = {"conv1": 1, "conv2": 3, "fc": 16}
    coders = [layer["coder"].split(":")[0] for layer in
              inspected(model, tmp_path, mode="paper", index_bits=per_layer)["layers"]]
    assert coders == ["gap 1", "gap 3", "gap 16"]
    for wrong in (0, 17, 5.0, True, "five", None, {"fc": 5}, per_layer | {"conv2": 0}, per_layer | {"other": 5}):
        with pytest.raises(ConfigError):
            to_bytes(model, index_bits=wrong)
    with pytest.raises(ConfigError, match="zip"):
        to_bytes(model, mode="zip")


def test_what_follows_from_the_shapes_is_not_stored_twice():
    weights = {f"conv{i}": tensor(*grids(6)["affine"], (6, 5, 3, 3), 0.5, i) for i in range(9)}
    biases = {f"{layer}.bias": torch.randn(6) for layer in weights}
    topology = Topology(widths=dict.fromkeys(weights, (6, 5)) | {"bn": (6, 6)})
    bare = to_bytes(CompressedModel(weights, {}))[1].header
    sizes = round_trip(CompressedModel(weights, biases, topology=topology))[1]
    assert sizes.header <= bare + 30
    for other in (dict(reversed(biases.items())), biases | {"conv3.bias": torch.randn(4)},  # as they are, then
                  {"first": torch.ones(1), **biases}, {"conv1.bias": biases["conv1.bias"].half(), "x": torch.ones(2)}):
        round_trip(CompressedModel(weights, other, topology=Topology(widths={"conv1": (5, 6)})))


def test_small_networks_have_small_overhead():
    data, sizes = to_bytes(small())
    assert sizes.header <= 110 and sizes.activations <= 60 and len(data) < 700


def test_whole_columns_of_zeros_cost_next_to_nothing(tmp_path):
    kept = (torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.1).int()
    t = CompressedTensor.of(kept.expand(64, 200), Affine(torch.tensor(1.0), ints(0)[0]), 2)
    model = CompressedModel({"fc": t}, {})
    round_trip(model)
    layer = inspected(model, tmp_path)["layers"][0]
    assert layer["coder"] == "classes + constant" and layer["bytes"]["positions"] < 30
