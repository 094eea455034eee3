"""Windows in the integer kernels: the fast look-up, and every route against the paper's im2col, in int64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.core.artifact import ActivationQuantizer, Affine, CompressedTensor, Window
from methods.core.errors import CompressError, GraphError
from methods.core.fit.calibrate import calibrate
from methods.core.fit.windows import OPTIONS, find_window, keep_24, solo_table, trim_pairs, window_table, windowed_sum
from methods.core.graph.build import apply, assemble, weight_layers
from methods.engine import windowed
from methods.engine.accumulate import exact_dtype
from methods.engine.exact import IntegerNetwork
from methods.engine.windowed import accumulate_windowed, check_window, windowed_codes

WINDOWS = [find_window(name, rounding) for name in OPTIONS for rounding in (False, True)]
each_window = pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w.bits}-{len(w.shifts)}-{w.rounding}")
LAYERS = {
    "3x3": {"kernel_size": 3, "padding": 1}, "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "1x1": {"kernel_size": 1, "stride": 2}, "same": {"kernel_size": (1, 3), "padding": "same"},
    "dilated": {"kernel_size": (1, 2), "dilation": 2, "padding": (0, 1)},
}


def draw(*shape, zeros=0.4, seed=0):
    """(activations with zeros among them, a generator for weights)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator)
    return codes * (torch.rand(shape, generator=generator) >= zeros), generator


def draw_weights(generator, layer, sparse24=False):
    weight = torch.randint(-128, 128, layer.weight.shape, generator=generator)
    return weight * keep_24(weight) * (torch.rand(weight.shape, generator=generator) > 0.1) if sparse24 else weight


# --- the look-up -------------------------------------------------------------------------------------------


@each_window
@pytest.mark.parametrize("paired", [True, False], ids=["paired", "alone"])
def test_the_look_up_knows_every_pair(window, paired):
    window = Window(window.bits, window.shifts, window.rounding, paired)
    f, g = window_table(window.bits, window.shifts, window.rounding), solo_table(window)
    a, b = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    first, second = (torch.where(other == 0, g[own], f[own]) if paired else f[own] for own, other in ((a, b), (b, a)))
    found = windowed_codes(torch.stack([a, b], 0)[None].to(torch.uint8), window)
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.stack([first, second], 0)[None].to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("window", [find_window("5opt"), find_window("7opt"), find_window("2opt", paired=False)])
def test_the_look_up_takes_any_dtype_and_memory_format(window, dtype):
    codes = draw(3, 6, 5, 4)[0].to(dtype)
    want = trim_pairs(codes, window)
    last = codes.contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(3, 9, 5, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    wide[:, 1:7] = codes
    for given in (codes, last, wide[:, 1:7], codes.flip(0).flip(0)):
        before = given.clone()
        found = windowed_codes(given, window)
        assert found.dtype == dtype and torch.equal(found, want) and torch.equal(given, before)
        assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(windowed_codes(last[1:], window), want[1:])
    assert torch.equal(windowed_codes(codes[:, :, 0, 0], window), want[:, :, 0, 0])  # what a linear layer reads


def test_look_ups_in_pieces(monkeypatch):
    codes, window = draw(3, 6, 5, 4)[0].to(torch.uint8), find_window("5opt")
    want = trim_pairs(codes, window)
    for piece in (1, 7, 90, 180):
        monkeypatch.setattr(windowed, "PIECE", piece)
        assert torch.equal(windowed_codes(codes, window), want)


def test_odd_channels_are_no_matter_of_the_codes_alone():
    codes = draw(2, 5, 3, 3)[0].to(torch.uint8)
    with pytest.raises(GraphError, match="5 channels"):
        windowed_codes(codes, find_window("5opt"))
    alone = find_window("5opt", paired=False)
    assert torch.equal(windowed_codes(codes, alone).long(), window_table(4, alone.shifts, True)[codes.long()])


# --- every route against im2col (V2, V3, V7, S1) -------------------------------------------------------------


def columns(layer, x):
    """int64 [N, L, K]: the rows of the paper's im2col, kernel row, kernel column, then channel, and the image size."""
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        total = (dh * (kh - 1), dw * (kw - 1))
        pads = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    else:
        pads = (layer.padding[1],) * 2 + (layer.padding[0],) * 2
    x = F.pad(x, pads)
    height, width = ((x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1)
    rows = [torch.cat([x[:, :, i * sh + r * dh, j * sw + c * dw] for r in range(kh) for c in range(kw)], 1)
            for i in range(height) for j in range(width)]
    return torch.stack(rows, 1), (height, width)


def paired_product(rows, weight, window):
    """[N, L, M] from rows [N, L, K] and filters [M, K]: the rule of section 3, one group after the other."""
    f, g = window_table(window.bits, window.shifts, window.rounding), solo_table(window)
    group, total = 4 if window.sparse24 else 2, torch.zeros(*rows.shape[:2], len(weight), dtype=torch.int64)
    for m, start in itertools.product(range(len(weight)), range(0, rows.shape[2], group)):
        places = range(start, min(start + group, rows.shape[2]))
        if window.sparse24:
            places = [k for k in places if weight[m, k] != 0]
        values = [rows[:, :, k] for k in places] + [torch.zeros_like(rows[:, :, 0])] * 2
        weights = [int(weight[m, k]) for k in places] + [0, 0]
        a1, a2 = values[:2]
        total[:, :, m] += torch.where(a1 == 0, g[a2] * weights[1], torch.where(
            a2 == 0, g[a1] * weights[0], f[a1] * weights[0] + f[a2] * weights[1]))
    return total


def literal(layer, codes, weight, window):
    rows, size = columns(layer, codes)
    flat = weight.permute(0, 2, 3, 1).flatten(1)
    return paired_product(rows, flat, window).transpose(1, 2).unflatten(2, size)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sparse24", [False, True], ids=["dense", "stc"])
def test_convs_equal_the_pairs_of_im2col(kind, channels, sparse24):
    layer = nn.Conv2d(channels, 3, bias=False, **LAYERS[kind])
    for window in WINDOWS[::3]:
        window = Window(window.bits, window.shifts, window.rounding, sparse24=sparse24)
        codes, generator = draw(2, channels, 5, 4)
        weight = draw_weights(generator, layer, sparse24)
        want = literal(layer, codes, weight, window)
        assert torch.equal(windowed_sum(layer, codes, weight, window), want)  # in int64
        dtype = exact_dtype(weight, 0, 255)
        assert torch.equal(accumulate_windowed(layer, codes.float(), weight.int(), window, dtype), want.to(dtype))
        if channels % 2 == 0 and not sparse24:
            assert torch.equal(windowed_sum(layer, windowed_codes(codes, window), weight, None), want)


def test_a_neighbour_in_the_padding_is_zero():
    layer = nn.Conv2d(1, 1, (1, 2), padding=(0, 1), bias=False)
    codes, weight = torch.tensor([[[[27, 31]]]]), torch.ones(1, 1, 1, 2, dtype=torch.int64)
    window = find_window("5opt", rounding=False)
    assert windowed_sum(layer, codes, weight, window).flatten().tolist() == [27, 26 + 30, 31]


def test_long_sums_of_all_ones_need_float64_and_are_exact_there():
    layer = nn.Conv2d(600, 1, 1, bias=False)
    weight = torch.full((1, 600, 1, 1), 127, dtype=torch.int32)
    codes = torch.full((1, 600, 1, 1), 255)
    dtype = exact_dtype(weight, 0, 255)
    assert dtype == torch.float64
    total = accumulate_windowed(layer, codes, weight, find_window("5opt"), dtype)
    assert int(total) == 600 * 127 * 240


# --- in a network ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A conv whose input is also added to its output, as it is."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.last(F.relu(self.conv(x) + x))


@pytest.fixture
def inputs():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def make(channels):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Residual(channels).eval()


def compressed_of(model, inputs, window, sparse24=False, edge="conv"):
    weights = {}
    for name, layer in weight_layers(model).items():
        weight = layer.weight.detach() * (keep_24(layer.weight) if sparse24 and name == "conv" else 1)
        scale = (weight.abs().flatten(1).amax(1) / 127.5).clamp_min(1e-6)
        codes = torch.round(weight / scale.reshape(-1, 1, 1, 1)).clamp(-128, 127).to(torch.int32)
        weights[name] = CompressedTensor.of(codes, Affine(scale, torch.zeros_like(scale, dtype=torch.int32)), 8)
    plain = assemble(model, weights)
    return assemble(model, weights, activations=calibrate(apply(plain, model), inputs),
                    windows={} if window is None else {edge: window})


def watched(network, inputs):
    """(output, {layer: (codes in, accumulators)})."""
    seen = {}
    network.see = lambda layer, codes, total: seen.update({layer.node.name: (codes, total)})
    return network(inputs), seen


@pytest.mark.parametrize("channels, sparse24", [(4, False), (5, False), (4, True), (6, True)])
def test_the_consumer_of_a_windowed_edge_sums_what_the_paper_sums(inputs, channels, sparse24):
    model, window = make(channels), find_window("3opt", sparse24=sparse24)
    plain = IntegerNetwork(compressed_of(model, inputs, None, sparse24), model)
    network = IntegerNetwork(compressed_of(model, inputs, window, sparse24), model)
    (_, before), (_, after) = watched(plain, inputs), watched(network, inputs)
    codes = before["conv"][0]
    want = literal(model.conv, codes.long(), network.layers["conv"].weight.integers.long(), window)
    assert torch.equal(after["conv"][1].long(), want)
    elementwise = channels % 2 == 0 and not sparse24
    assert torch.equal(after["conv"][0], trim_pairs(codes, window) if elementwise else codes)
    assert not torch.equal(after["conv"][1], before["conv"][1])


def test_a_residual_add_reads_the_codes_as_they_are(inputs):
    model = make(4)
    with torch.no_grad():
        model.conv.weight.zero_()
    plain, windowed = (IntegerNetwork(compressed_of(model, inputs, window), model)
                       for window in (None, find_window("7opt")))
    assert torch.equal(plain(inputs), windowed(inputs))


def test_a_windowed_layer_in_float_reads_no_window(inputs):
    model = make(4)
    plain, windowed = (IntegerNetwork(compressed_of(model, inputs, window), model, ("conv",))
                       for window in (None, find_window("7opt")))
    assert torch.equal(plain(inputs), windowed(inputs))


def test_batches_do_not_mix(inputs):
    model = make(5)
    network = IntegerNetwork(compressed_of(model, inputs, find_window("6opt")), model)
    assert torch.equal(torch.cat([network(x[None]) for x in inputs]), network(inputs))


# --- what is refused -----------------------------------------------------------------------------------------

UNSIGNED = ActivationQuantizer(0.1)
REFUSED = {
    "needs unsigned 8-bit codes": (nn.Conv2d(4, 2, 1), ActivationQuantizer(0.1, signed=True), "5opt"),
    "zero point 0, not ": (nn.Conv2d(4, 2, 1), ActivationQuantizer(0.1, zero=3), "5opt"),
    "codes with zero": (nn.Conv2d(4, 2, 1), ActivationQuantizer(0.1, bits=4), "5opt"),
    "has 2 groups": (nn.Conv2d(4, 2, 1, groups=2), UNSIGNED, "5opt"),
    "padding_mode = 'reflect'": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), UNSIGNED, "5opt"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_window_that_cannot_act_is_refused_by_name(message):
    layer, source, option = REFUSED[message]
    with pytest.raises(GraphError, match=message) as caught:
        check_window("layer7", layer, source, torch.ones(2, 4, 1, 1), find_window(option))
    assert "layer7" in str(caught.value) and "\n" not in str(caught.value)


def test_dense_weights_under_a_two_of_four_window_are_refused_by_name(inputs):
    compressed = compressed_of(make(4), inputs, find_window("5opt", sparse24=True))
    with pytest.raises(GraphError, match="window of conv pairs 2:4 weights"):
        IntegerNetwork(compressed, make(4))


def test_a_window_at_an_add_is_refused(inputs):
    model = make(4)
    edge = next(edge for edge in compressed_of(model, inputs, None).activations if "add" in edge)
    with pytest.raises(GraphError, match=edge):
        IntegerNetwork(compressed_of(model, inputs, find_window("5opt"), edge=edge), model)


def test_a_window_from_a_file_that_loses_the_leading_one_is_refused(inputs):
    compressed = compressed_of(make(4), inputs, Window(3, (0, 1, 2)))
    with pytest.raises(CompressError, match="highest shift"):
        IntegerNetwork(compressed, make(4))
