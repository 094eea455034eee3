"""ONNX files of compressed networks: run in ONNX Runtime, they say what the integers here say, to a code or two."""

import numpy as np
import pytest
import torch
from torch import nn

from methods.core.artifact import ActivationQuantizer, Affine, Codebook, CompressedModel, CompressedTensor, Window
from methods.core.errors import ConfigError, GraphError
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.graph.build import apply, assemble, weight_layers
from methods.engine.exact import IntegerNetwork
from methods.engine.export import compare_onnx, to_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


class Net(nn.Module):
    """Residual sums, a depthwise conv, both pools, a batch norm with negative factors, a linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.pool, self.narrow = nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.mean, self.flat, self.fc = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)
        self.relu = nn.ModuleList(nn.ReLU() for _ in range(4))

    def forward(self, x):
        x = self.relu[0](self.bn(self.stem(x)))
        x = self.relu[1](self.point(self.relu[2](self.deep(x))) + x)
        return self.fc(self.flat(self.mean(self.relu[3](self.narrow(self.pool(x))))))


def compressed_net(bits=8, activation_bits=8, asymmetric=False):
    """A random Net, its weights on affine grids, and inputs."""
    generator = torch.Generator().manual_seed(bits)
    with torch.random.fork_rng():
        torch.manual_seed(bits)
        net = Net().eval()
    nn.init.uniform_(net.bn.weight, -1.5, 1.5, generator=generator)
    nn.init.uniform_(net.bn.running_mean, -0.5, 0.5, generator=generator)
    x = torch.randn(64, 3, 16, 16, generator=generator)
    weights = {}
    for name, layer in weight_layers(net).items():
        top = (1 << bits - 1) - 1
        scale = layer.weight.detach().abs().flatten(1).amax(1) / top
        zero = torch.full((len(scale),), 3 if asymmetric else 0, dtype=torch.int32)
        codes = torch.round(layer.weight.detach() / scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        codes = (codes + zero.reshape(-1, *[1] * (layer.weight.ndim - 1))).clamp(-top - 1, top).int()
        weights[name] = CompressedTensor.of(codes, Affine(scale, zero), bits)
    made = assemble(net, weights)
    ranges = calibrate(apply(made, net), x, activation_bits)
    return net, assemble(net, weights, activations=ranges), x


def ran(path, x):
    from methods.engine.export.check import onnx_session
    return onnx_session(path)(x)


@pytest.mark.parametrize("bits, activation_bits, opset, tolerance",
                         [(8, 8, 13, 0.02), (8, 8, 21, 0.02), (4, 8, 21, 0.02), (6, 5, 13, 0.1), (8, 12, 21, 0.01)])
@pytest.mark.parametrize("residual", ["float", "int8"])
def test_outputs_agree(tmp_path, bits, activation_bits, opset, tolerance, residual):
    net, compressed, x = compressed_net(bits, activation_bits)
    written = to_onnx(compressed, net, tmp_path / "net.onnx", (3, 16, 16), opset=opset, residual=residual)
    ours, theirs = IntegerNetwork(compressed, net)(x), ran(tmp_path / "net.onnx", x)
    spread = float(ours.max() - ours.min())
    assert float((ours - theirs).abs().max()) < (tolerance if residual == "float" else max(tolerance, 0.05)) * spread
    assert float((ours - theirs).abs().mean()) < 0.01 * spread
    assert written.bytes == (tmp_path / "net.onnx").stat().st_size
    assert set(written.layers.values()) == {"int4" if bits == 4 else "int8"}


@pytest.mark.parametrize("bits, activation_bits, asymmetric", [(8, 8, False), (6, 5, True), (4, 12, False)])
def test_spelled_out_outputs_are_equal(tmp_path, bits, activation_bits, asymmetric):
    net, compressed, x = compressed_net(bits, activation_bits, asymmetric)
    written = to_onnx(compressed, net, tmp_path / "net.onnx", (3, 16, 16), arithmetic="exact")
    assert torch.equal(IntegerNetwork(compressed, net)(x), ran(tmp_path / "net.onnx", x))
    assert set(written.layers.values()) == {"int8"}
    assert {t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer if len(t.dims) == 4 and
            max(t.dims) > 1 and t.dims[0] > 1} == {onnx.TensorProto.INT8}


def test_weights_are_stored_as_integers(tmp_path):
    net, compressed, _ = compressed_net()
    to_onnx(compressed, net, tmp_path / "net.onnx", (3, 16, 16))
    model = onnx.load(tmp_path / "net.onnx")
    stored = {tuple(t.dims): t.data_type for t in model.graph.initializer if len(t.dims) == 4}
    assert set(stored.values()) == {onnx.TensorProto.INT8} and len(stored) == 4
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 4 and "BatchNormalization" not in kinds
    codes = next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if tuple(t.dims) == (8, 3, 3, 3))
    assert np.array_equal(codes, compressed.weights["stem"].codes.numpy())  # also where a factor is negative


@pytest.mark.parametrize("bits, opset, kind", [(8, 13, "int8"), (4, 21, "int4")])
@pytest.mark.parametrize("residual", ["float", "int8"])
def test_weights_around_a_zero_point_stay_integers(tmp_path, bits, opset, kind, residual):
    """Codes of a grid per tensor whose zero is not in the middle, as DFQ makes them; a zero at an end, too."""
    net, compressed, x = compressed_net()
    top, weights = (1 << bits) - 1, {}
    for name, layer in weight_layers(net).items():
        low, high = layer.weight.min(), layer.weight.max()
        low = low.new_zeros(()) if name == "point" else low
        zero = torch.round(-low / (high - low) * top).int()
        grid = Affine(((high - low) / top).detach(), zero, signed=False)
        codes = torch.round(layer.weight.detach() / grid.scale) + zero
        weights[name] = CompressedTensor.of(codes.clamp(0, top).int(), grid, bits)
    assert int(weights["point"].codes.max()) == top  # above what a type around 0 holds
    made = assemble(net, weights)
    made = assemble(net, weights, activations=calibrate(apply(made, net), x, 8))
    written = to_onnx(made, net, tmp_path / "net.onnx", (3, 16, 16), opset=opset, residual=residual)
    assert set(written.layers.values()) == {kind}
    ours, theirs = IntegerNetwork(made, net)(x), ran(tmp_path / "net.onnx", x)
    assert float((ours - theirs).abs().max()) < 0.05 * float(ours.max() - ours.min())
    assert float((ours - theirs).abs().mean()) < 0.01 * float(ours.max() - ours.min())


def test_any_batch_and_one_comparison(tmp_path):
    net, compressed, x = compressed_net()
    to_onnx(compressed, net, tmp_path / "net.onnx", (3, 16, 16))
    whole = ran(tmp_path / "net.onnx", x)
    assert torch.allclose(torch.cat([ran(tmp_path / "net.onnx", part) for part in x.split(30)]), whole, atol=1e-5)
    targets = IntegerNetwork(compressed, net)(x).argmax(1)
    found = compare_onnx(tmp_path / "net.onnx", IntegerNetwork(compressed, net),
                         [(x[:40], targets[:40]), (x[40:], targets[40:])])
    assert found.inputs == 64 and found.top1_ours == 100.0
    assert found.same_argmax == found.top1_onnx == 100 * float((whole.argmax(1) == targets).float().mean())


def test_dead_channels_keep_their_bias(tmp_path):
    net, compressed, x = compressed_net()
    tensor = compressed.weights["deep"]
    mask = tensor.mask.clone()
    mask[2] = False
    weights = {**compressed.weights, "deep": CompressedTensor.of(tensor.codes, tensor.grid, 8, mask)}
    rest = {**compressed.rest, "deep.bias": compressed.rest["deep.bias"].clone().index_fill_(0, torch.tensor(2), 1e4)}
    made = CompressedModel(weights, rest, compressed.activations)
    to_onnx(made, net, tmp_path / "net.onnx", (3, 16, 16))
    ours = IntegerNetwork(made, net)(x)
    assert torch.allclose(ours, ran(tmp_path / "net.onnx", x), atol=0.02 * float(ours.max() - ours.min()))


def test_what_8_bits_do_not_hold_is_float_and_told(tmp_path):
    net, compressed, x = compressed_net()
    table = Codebook(torch.tensor([0.0, 1e-4, 0.5, -0.3, 1.0]))  # 1e-4 would be 0 in 8 bits
    codes = torch.arange(24 * 5).reshape(5, 24) % 5
    made = CompressedModel({**compressed.weights, "fc": CompressedTensor.of(codes, table, 3)}, compressed.rest,
                           compressed.activations)
    written = to_onnx(made, net, tmp_path / "net.onnx", (3, 16, 16))
    assert written.layers["fc"] == "float32" and written.layers["stem"] == "int8"
    ours = IntegerNetwork(made, net)(x)
    assert torch.allclose(ours, ran(tmp_path / "net.onnx", x), atol=0.02 * float(ours.max() - ours.min()))


def test_layers_in_float_stay_float(tmp_path):
    net, compressed, x = compressed_net()
    written = to_onnx(compressed, net, tmp_path / "net.onnx", (3, 16, 16), float_policy=("stem", "fc"))
    assert set(written.layers) == {"deep", "point", "narrow"}
    ours = IntegerNetwork(compressed, net, ("stem", "fc"))(x)
    assert torch.allclose(ours, ran(tmp_path / "net.onnx", x), atol=0.02 * float(ours.max() - ours.min()))


def test_mistakes_are_one_line(tmp_path):
    net, compressed, _ = compressed_net(8, 12)
    with pytest.raises(ConfigError, match="12 bits need opset 21"):
        to_onnx(compressed, net, tmp_path / "net.onnx", (3, 16, 16))
    with pytest.raises(ConfigError, match="opset = 12: allowed are 13, 21"):
        to_onnx(compressed, net, tmp_path / "net.onnx", (3, 16, 16), opset=12)
    with pytest.raises(ConfigError, match="arithmetic = 'integer': allowed are qdq, exact"):
        to_onnx(compressed, net, tmp_path / "net.onnx", (3, 16, 16), arithmetic="integer")
    with pytest.raises(ConfigError, match="residual = 'int8': arithmetic = 'exact' rounds no sums"):
        to_onnx(compressed, net, tmp_path / "net.onnx", (3, 16, 16), arithmetic="exact", residual="int8")
    window = {"deep": Window(4, (0, 2, 4))}
    ranges = {**compressed.activations, "deep": ActivationQuantizer(0.1)}
    with pytest.raises(GraphError, match="input of deep goes through a bit window"):
        to_onnx(CompressedModel(compressed.weights, compressed.rest, ranges, window), net, tmp_path / "net.onnx",
                (3, 16, 16), opset=21)
    assert not list(tmp_path.iterdir())


class Mobile(nn.Module):
    """A clamp and a mean written as a method."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.b(nn.functional.relu6(self.a(x))).mean((2, 3)))


def test_clamps_and_means_have_a_form(tmp_path):
    net = Mobile().eval()
    net.a.weight.data *= 20  # so that the clamp cuts
    x = torch.randn(32, 3, 12, 12)
    weights = {name: quantize(layer.weight, fit_symmetric(layer.weight, 8), 8)
               for name, layer in weight_layers(net).items()}
    made = assemble(net, weights)
    made = assemble(net, weights, activations=calibrate(apply(made, net), x, 8))
    to_onnx(made, net, tmp_path / "net.onnx", (3, 12, 12))
    want = IntegerNetwork(made, net)(x)
    to_onnx(made, net, tmp_path / "exact.onnx", (3, 12, 12), arithmetic="exact")
    assert torch.equal(ran(tmp_path / "exact.onnx", x), want)
    assert float((ran(tmp_path / "net.onnx", x) - want).abs().max()) < 0.02 * float(want.abs().max())


class Dense(nn.Module):
    """Concatenations of values on different ranges; with `stacks`, of whole inputs into a new dimension."""

    def __init__(self, stacks):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1), nn.Conv2d(6, 4, 3)
        self.d, self.stacks = nn.Conv2d(6, 4, 3), stacks

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.cat([x, self.b(x)], 1)
        return torch.stack([self.c(x), self.d(x)], 1) if self.stacks else self.c(x) + self.d(x)


def dense_net(stacks):
    net, x = Dense(stacks).eval(), torch.randn(32, 3, 8, 8)
    weights = {name: quantize(layer.weight, fit_symmetric(layer.weight, 8), 8)
               for name, layer in weight_layers(net).items()}
    made = assemble(net, weights)
    return net, assemble(net, weights, activations=calibrate(apply(made, net), x, 8)), x


def test_concatenations_join_codes(tmp_path):
    net, made, x = dense_net(stacks=False)
    to_onnx(made, net, tmp_path / "net.onnx", (3, 8, 8))
    want = IntegerNetwork(made, net)(x)
    assert float((ran(tmp_path / "net.onnx", x) - want).abs().max()) < 0.02 * float(want.abs().max())
    to_onnx(made, net, tmp_path / "exact.onnx", (3, 8, 8), arithmetic="exact")
    assert torch.equal(ran(tmp_path / "exact.onnx", x), want)
    graph = onnx.load(tmp_path / "net.onnx").graph
    (concat,) = (node for node in graph.node if node.op_type == "Concat")
    assert all(name.startswith("dequantizelinear") for name in concat.input)


def test_stacks_are_refused_by_name(tmp_path):
    net, made, _ = dense_net(stacks=True)
    with pytest.raises(GraphError, match=r"stack makes \[2, 4, 6, 6\] of \[4, 6, 6\] and \[4, 6, 6\]"):
        to_onnx(made, net, tmp_path / "net.onnx", (3, 8, 8))
