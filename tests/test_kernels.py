"""Integer kernels: accumulators against int64 loops, requantization against numpy's float32, bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from methods.core.artifact import ActivationQuantizer, Affine, Codebook, CompressedModel, CompressedTensor, Levels
from methods.core.errors import GraphError
from methods.core.fit.quantize import fit_asymmetric, fit_symmetric, quantize
from methods.core.graph.build import assemble, weight_layers
from methods.engine.accumulate import accumulate, accumulate_int64, exact_dtype, largest_partial_sum
from methods.engine.exact import IntegerNetwork
from methods.engine.weights import integer_table, integer_weight


class Residual(nn.Module):
    """conv-bn-relu, a grouped conv-bn that is added to its own input, both pools, a depthwise conv, a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.depthwise, self.relu3 = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.ReLU()
        self.pool2, self.fc = nn.AvgPool2d(2), nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool1(self.relu2(self.bn2(self.conv2(x)) + x))
        return self.fc(torch.flatten(self.pool2(self.relu3(self.depthwise(x))), 1))


RANGES = {  # zero points of 0, in the middle and odd; one edge of 6 bits, one signed
    "conv1": ActivationQuantizer(0.031, 117), "conv2": ActivationQuantizer(0.017),
    "add:1": ActivationQuantizer(0.02, 3), "depthwise": ActivationQuantizer(0.05, 5, 6),
    "pool2": ActivationQuantizer(0.01, -7, 8, signed=True), "fc": ActivationQuantizer(0.007, 9),
}


@pytest.fixture(scope="module")
def residual():
    """The module, and it compressed with all three kinds of grid."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Residual().eval()
        for norm in (model.bn1, model.bn2):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 2)
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
        w = {name: layer.weight.detach() for name, layer in weight_layers(model).items()}
        keep = torch.rand(w["conv1"].shape) < 0.6
        levels = Levels(torch.full((8,), 0.03), torch.tensor([-4, -2, -1, 1, 2, 4], dtype=torch.int32))
        weights = {
            "conv1": quantize(w["conv1"], fit_symmetric(w["conv1"], 8), 8, keep),
            "conv2": quantize(w["conv2"], fit_asymmetric(w["conv2"], 4), 4),
            "depthwise": CompressedTensor.of(torch.randint(0, 6, w["depthwise"].shape), levels, 3,
                                             torch.rand(w["depthwise"].shape) < 0.7),
            "fc": CompressedTensor.of(torch.randint(0, 8, w["fc"].shape),
                                      Codebook(torch.tensor([0, -0.4, -0.21, -0.1, 0.07, 0.13, 0.2, 0.52])), 3),
        }
    return model, assemble(model, weights, activations=RANGES)


def conv64(x, w, stride, pad, groups):
    """Loops over kernel positions in int64: x [N, C, H, W] without its zero point, padded with real zeros."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    size = (x.shape[2] - w.shape[2]) // stride + 1
    out = np.zeros((len(x), len(w), size, size), np.int64)
    per, wide = len(w) // groups, w.shape[1]
    for k, r, s in itertools.product(range(len(w)), range(w.shape[2]), range(w.shape[3])):
        first = k // per * wide
        seen = x[:, first:first + wide, r:r + stride * size:stride, s:s + stride * size:stride]
        out[:, k] += np.einsum("nchw,c->nhw", seen, w[k, :, r, s])
    return out


def epilogue(model, compressed, name, norm, shape):
    """float64 gain and shift of a layer: acc * gain + shift is its real output after batch norm."""
    integers = integer_weight(compressed.weights[name])
    layer, ratio, shift = model.get_submodule(name), np.ones(1), np.zeros(1)
    shift = np.zeros(1) if layer.bias is None else layer.bias.detach().double().numpy()
    if norm is not None:
        ratio = norm.weight.detach().double().numpy() / np.sqrt(norm.running_var.double().numpy() + norm.eps)
        shift = (shift - norm.running_mean.double().numpy()) * ratio + norm.bias.detach().double().numpy()
    gain = integers.scale.numpy() * ratio * RANGES[name].scale
    return integers.integers.numpy().astype(np.int64), gain.reshape(shape), shift.reshape(shape)


def codes(terms, shift, quantizer):
    """clamp(round_half_even((t0 m0 + b) + t1 m1)) in numpy float32; each factor rounded once from float64."""
    step, zero = (1.0, 0) if quantizer is None else (quantizer.scale, quantizer.zero)
    y = np.asarray(shift / step + zero).astype(np.float32)
    for i, (t, gain) in enumerate(terms):
        product = t.astype(np.float32) * np.asarray(gain / step).astype(np.float32)
        y = product + y if i == 0 else y + product
    assert y.dtype == np.float32
    return y if quantizer is None else np.clip(np.rint(y), *quantizer.code_range).astype(np.int64)


def reference(model, compressed, x):
    """(logits, {layer: accumulators}) with nothing of the kernels but the integers of the weights."""
    q, acc, image = RANGES, {}, (1, -1, 1, 1)
    first = np.clip(np.rint(x / np.float32(q["conv1"].scale)) + q["conv1"].zero, *q["conv1"].code_range)
    w, gain, shift = epilogue(model, compressed, "conv1", model.bn1, image)
    acc["conv1"] = conv64(first.astype(np.int64) - q["conv1"].zero, w, 1, 1, 1)
    one, two = (np.maximum(codes([(acc["conv1"], gain)], shift, q[e]), q[e].zero) for e in ("conv2", "add:1"))
    w, gain, shift = epilogue(model, compressed, "conv2", model.bn2, image)
    acc["conv2"] = conv64(one - q["conv2"].zero, w, 1, 1, 2)
    side = q["add:1"]
    total = codes([(acc["conv2"], gain), (two, np.float64(side.scale))], shift - side.zero * side.scale, q["depthwise"])
    total = np.maximum(total, q["depthwise"].zero)
    pooled = total.reshape(*total.shape[:2], 4, 2, 4, 2).max((3, 5))
    w, gain, shift = epilogue(model, compressed, "depthwise", None, image)
    acc["depthwise"] = conv64(pooled - q["depthwise"].zero, w, 2, 1, 8)
    third = np.maximum(codes([(acc["depthwise"], gain)], shift, q["pool2"]), q["pool2"].zero)
    flat = codes([((third - q["pool2"].zero).sum((2, 3)), np.float64(q["pool2"].scale / 4))], np.zeros(()), q["fc"])
    w, gain, shift = epilogue(model, compressed, "fc", None, (1, -1))
    acc["fc"] = (flat - q["fc"].zero) @ w.T
    return codes([(acc["fc"], gain)], shift, None), acc


def run(network, x):
    """(outputs, {layer: (codes in, accumulators)})."""
    seen = {}
    network.see = lambda layer, inputs, total: seen.update({layer.node.name: (layer, inputs, total)})
    return network(x), seen


def test_residual_network_bit_for_bit(residual):
    model, compressed = residual
    assert (model.bn1.weight < 0).any() and (model.bn2.weight < 0).any()
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 1.5
    network = IntegerNetwork(compressed, model)
    assert network.float_nodes == []
    got, seen = run(network, x)
    want, accumulators = reference(model, compressed, x.numpy())
    assert seen.keys() == accumulators.keys()
    for name, (layer, inputs, total) in seen.items():
        assert np.array_equal(total.numpy(), accumulators[name]), name
        int64 = accumulate_int64(layer.node.module, inputs - layer.source.zero, layer.weight.integers)
        assert torch.equal(total.long(), int64), name
    assert np.array_equal(got.numpy(), want) and len(np.unique(want)) == want.size


def test_a_float_model_of_the_same_quantizers_is_near(residual):
    """Not bit for bit: the decoded network with fake-quantized edges, in float64."""
    model, compressed = residual
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    m = Residual().double().eval()
    m.load_state_dict(compressed.state_dict(), strict=False)

    def fake(edge, value):
        q = RANGES[edge]
        return ((value / q.scale).round() + q.zero).clamp(*q.code_range).sub(q.zero) * q.scale

    y = torch.relu(m.bn1(m.conv1(fake("conv1", x))))
    y = m.pool1(torch.relu(m.bn2(m.conv2(fake("conv2", y))) + fake("add:1", y)))
    y = m.pool2(fake("pool2", torch.relu(m.depthwise(fake("depthwise", y)))))
    want = m.fc(fake("fc", y.flatten(1)))
    got = IntegerNetwork(compressed, model)(x.float())
    assert (got - want).abs().max() < 0.05 * want.abs().max()


def chain(first, second, quantizers, input_scale=1.0):
    """A network of two 1 x 1 convs with integer weights, as codes on a grid of scale 1."""
    model = nn.Sequential(nn.Conv2d(1, len(first), 1, bias=False), nn.Conv2d(len(first), 1, 1, bias=False)).eval()
    one = Affine(torch.tensor(input_scale), torch.tensor(0, dtype=torch.int32))
    grids = {"0": (torch.tensor(first).reshape(-1, 1, 1, 1), one),
             "1": (torch.tensor(second).reshape(1, -1, 1, 1), Affine(torch.tensor(1.0), one.zero))}
    weights = {name: CompressedTensor.of(c, grid, 8) for name, (c, grid) in grids.items()}
    return IntegerNetwork(CompressedModel(weights, {}, quantizers), model)


@pytest.mark.parametrize("zero", [0, 3])
def test_ties_go_to_the_even_code(zero):
    quantizers = {"0": ActivationQuantizer(1.0), "1": ActivationQuantizer(2.0, zero)}
    values = torch.arange(12.0).reshape(1, 1, 3, 4)
    _, seen = run(chain([1], [1], quantizers), values)
    assert seen["1"][1].flatten().tolist() == np.rint(np.arange(12, dtype=np.float32) * 0.5 + zero).tolist()


# --- exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(0, 255), (-117, 138), (-128, 127), (0, 0)])
def test_largest_partial_sum_is_the_worst_of_all_sums(low, high):
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        integers = torch.randint(-128, 128, (3, 5), generator=generator)
        worst = max(abs(sum(w * x for w, x, take in zip(row.tolist(), xs, subset, strict=True) if take))
                    for row in integers for xs in itertools.product((low, high), repeat=5)
                    for subset in itertools.product((0, 1), repeat=5))
        assert largest_partial_sum(integers, low, high) == worst
    assert largest_partial_sum(torch.zeros(2, 0), low, high) == 0


@pytest.mark.parametrize("weight, k, dtype", [(-128, 514, torch.float32), (-128, 515, torch.float64),
                                              (127, 518, torch.float32), (127, 519, torch.float64),
                                              (7, 9399, torch.float32), (7, 9400, torch.float64)])
def test_float32_is_taken_exactly_where_it_is_certain(weight, k, dtype):
    assert exact_dtype(torch.full((1, k), weight), 0, 255) == dtype


def test_inputs_of_both_signs_reach_twice_as_far():
    integers = torch.tensor([127, -127]).repeat(520).reshape(1, -1)
    worst = torch.where(integers > 0, 127, -128)
    assert int((integers * worst).sum()) == 127 * (127 + 128) * 520 > 1 << 24
    assert 128 * 127 * 520 < 1 << 24  # the sum of either sign alone would not have told
    assert exact_dtype(integers, -128, 127) == torch.float64


@pytest.mark.parametrize("shape, groups", [((4, 600, 1, 1), 1), ((4, 160, 3, 3), 1), ((8, 80, 3, 3), 2)])
def test_adversarial_data_need_float64(shape, groups):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(shape[1] * groups, shape[0], shape[2:], padding=shape[2] // 2, groups=groups, bias=False)
    integers = torch.where(torch.rand(shape, generator=generator) < 0.95, 127, -128)
    x = 255 - (torch.rand(2, shape[1] * groups, 5, 5, generator=generator) < 0.1).float()
    want = accumulate_int64(layer, x, integers)
    assert int(want.abs().max()) > 1 << 24
    assert torch.equal(accumulate(layer, x, integers, exact_dtype(integers, 0, 255)).long(), want)
    assert not torch.equal(accumulate(layer, x, integers, torch.float32).long(), want)


def test_sums_beyond_float64_are_refused():
    with pytest.raises(GraphError, match="2\\^53"):
        exact_dtype(torch.full((1, 1 << 12), 2**31 - 1), 0, 1 << 16)


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, width", [
    ([0, -1.0, 1.0], 8), ([0, 127.0, 1.0, -64.0], 8), ([0, 1.0, 0.003], 16), ([0, 1.0, 0.991, 0.992], 16),
    ([0, 1.0, 1e-9, -1e-9], 16), ([0.0], 8), ([5.0, 2.0], 8)])
def test_tables_lose_no_weight(values, width):
    values = torch.tensor(values)
    used = (values != 0).nonzero().flatten()
    table, scale, got = integer_table(values, used)
    limit = (1 << got - 1) - 1
    assert got == width and int(table.abs().max()) <= limit
    assert torch.equal(table == 0, values == 0) and torch.equal(table.sign().float(), values.sign())
    off = (table * scale - values.double()).abs()
    assert bool((off <= torch.where(table.abs() == 1, 1.0, 0.5 + 1e-9) * scale).all())


def test_only_used_entries_decide_the_table():
    values = torch.tensor([0, 1.0, 0.5, 1000.0, 1e-6])
    table, scale, width = integer_table(values, torch.tensor([1, 2]))
    assert width == 8 and scale == 1 / 126 and table[1:3].tolist() == [126, 63]  # 127 has no half


def test_the_scale_of_a_table_has_the_least_error_over_the_weights():
    """Brute force over the 64 largest integers; the entries that many weights have decide."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        values = torch.cat([torch.zeros(1), torch.randn(7, generator=generator)])
        codes = torch.multinomial(torch.rand(8, generator=generator), 500, replacement=True, generator=generator)
        codes = codes[codes > 0]
        table, scale, width = integer_table(values, codes)
        weights, peak = values[codes].double(), values[codes].abs().max().double()
        tries = {}
        for top in range(64, 128):
            near = (weights * top / peak).round()
            if len(near.unique()) == len(weights.unique()) and not bool((near == 0).any()):
                tries[top] = float((near * peak / top - weights).square().mean())
        assert width == (8 if 127 in tries else 16)
        if width == 16:
            continue
        error = float((table[codes].double() * scale - weights).square().mean())
        assert error == pytest.approx(min(tries.values()))
        assert round(float(peak) / scale) in tries and tries[127] >= min(tries.values())
    few = torch.tensor([0, 1.0, 0.1004, 0.3333])  # 0.1004 is 12.75 of 127 and 12.05 of 120, 0.3333 is 42.3 and 40.0
    for code, share in ((2, 0.1004), (3, 0.3333)):
        table, scale, _ = integer_table(few, torch.tensor([1] + [code] * 1000 + [5 - code]))
        best = min((abs(round(share * top) / top - share), -top) for top in range(64, 128))
        assert abs(float(table[code]) * scale - share) < 2 * best[0] + 1e-5


def test_random_codebooks_keep_every_kept_weight():
    generator = torch.Generator().manual_seed(0)
    for spread in (1, 4, 12):
        values = torch.cat([torch.zeros(1), torch.randn(31, generator=generator) * 10 ** -(
            spread * torch.rand(31, generator=generator))])
        tensor = CompressedTensor.of(torch.randint(0, 32, (8, 40), generator=generator), Codebook(values), 5)
        weight = integer_weight(tensor)
        assert torch.equal(weight.integers != 0, tensor.mask)
        assert (weight.integers * weight.scale[:, None] - tensor.decode()).abs().max() <= weight.scale[0]


def test_uniform_grids_are_taken_as_they_are(residual):
    for name in ("conv1", "conv2", "depthwise"):
        tensor = residual[1].weights[name]
        weight = integer_weight(tensor)
        scale = weight.scale.reshape(-1, 1, 1, 1)
        assert torch.equal((weight.integers * scale).float(), tensor.decode()) and weight.width == 8
    wide = CompressedTensor.of(torch.tensor([[0, 255]]), Affine(torch.tensor(1.0), torch.tensor(9, dtype=torch.int32),
                                                                signed=False), 8)
    assert integer_weight(wide).width == 16 and integer_weight(wide).integers.tolist() == [[-9, 246]]
