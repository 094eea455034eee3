"""The int8 kernels: every code of every value equals the exact integer network's, and that one's the definition's."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from benchmarks.networks import build
from benchmarks.networks.resnet import BasicBlock
from benchmarks.networks.vgg import POOL, conv_layers
from methods.core.artifact import ActivationQuantizer, Affine, Codebook, CompressedTensor
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.fit.windows import find_window
from methods.core.graph.build import apply, assemble, weight_layers
from methods.engine import bytecodes, fast, onednn
from methods.engine.exact import IntegerNetwork
from methods.engine.fast import FastNetwork
from methods.engine.reference import ReferenceRun
from methods.engine.verify import recorded, verify


def seeded(make, seed=0):
    """A network in eval mode, with batch norms of both signs that have seen data, one channel scaled by 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().eval()
        for norm in (m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(-0.5, 1.5)[0] = 0
            norm.bias.data.normal_(std=0.5)
        return model


def compressed(model, x, bits=8, activation_bits=8, **changes):
    weights = {name: quantize(layer.weight, fit_symmetric(layer.weight, bits), bits)
               for name, layer in weight_layers(model).items()}
    ranges = calibrate(apply(assemble(model, weights), model), x, activation_bits)
    return assemble(model, weights, **{"activations": ranges} | changes)


def check(model, parts, x, policy=(), reference=True):
    """The fast network of a compressed model, after it was found equal to the exact one, and that to the reference."""
    exact, quick = IntegerNetwork(parts, model, policy), FastNetwork(parts, model, policy)
    (want, codes), (got, found) = recorded(exact, x), recorded(quick, x)
    assert torch.equal(got, want)
    if not quick.unsupported:
        assert found.keys() == codes.keys()
        assert [key for key in codes if not torch.equal(found[key], codes[key])] == []
    if reference:
        run = ReferenceRun(exact, x)
        assert torch.equal(torch.from_numpy(run.real(exact.graph.output)), want)
        for (name, form), value in codes.items():
            if isinstance(form, ActivationQuantizer):
                assert torch.equal(torch.from_numpy(run.codes(name, form)).float(), value), name
    return quick


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def chain(*layers, x):
    """A seeded nn.Sequential of fresh `layers` that ends in a linear of two outputs."""
    model = seeded(lambda: nn.Sequential(*(layer() for layer in layers), nn.Flatten(), nn.LazyLinear(2)))
    model(x)
    return model


NETWORKS = {
    "lenet300": (lambda: build("lenet300", 10, 1), (1, 28, 28)),
    "lenet5_caffe": (lambda: build("lenet5_caffe", 10, 1), (1, 28, 28)),
    "vgg": (lambda: nn.Sequential(conv_layers((16, 16, POOL, 24, POOL), 3, True), nn.Flatten(), nn.Linear(96, 24),
                                  nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)), (3, 8, 8)),
    "resnet18w16": (lambda: build("resnet18w16", 10, 3), (3, 8, 8)),
    "resnet20": (lambda: build("resnet20", 10, 3), (3, 8, 8)),
    "width 64": (lambda: nn.Sequential(BasicBlock(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                       nn.Linear(64, 3)), (64, 8, 8)),
}


@pytest.mark.parametrize("bits, activation_bits", [(8, 8), (4, 4)])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, bits, activation_bits):
    model, x = seeded(NETWORKS[name][0]), normal(3, *NETWORKS[name][1])
    quick = check(model, compressed(model, x, bits, activation_bits), x)
    assert quick.unsupported or (quick.slow_nodes == [] and quick.backend == "int8")


def test_the_tiny_network(tiny):
    model, x = tiny.model(), normal(5, 3, 8, 8)
    parts = compressed(model, x)
    quick = check(model, parts, x)
    assert torch.equal(torch.cat([quick(one[None]) for one in x]), quick(x))
    assert torch.equal(quick(x.contiguous(memory_format=torch.channels_last)), quick(x))


def test_batches_too_large_for_one_piece(monkeypatch):
    monkeypatch.setattr(bytecodes, "CHUNK", 64 * 8 * 8 * 2)
    model, x = seeded(NETWORKS["width 64"][0]), normal(5, 64, 8, 8)
    check(model, compressed(model, x), x, reference=False)


@pytest.mark.parametrize("name", ["conv1", "layer1.0.conv2", "fc"])
def test_layers_in_float(name):
    model, x = seeded(NETWORKS["resnet20"][0]), normal(3, 3, 8, 8)
    quick = check(model, compressed(model, x), x, (name,), reference=False)
    assert name in quick.float_nodes and (quick.unsupported or name in quick.slow_nodes)


LAYERS = {
    "3x3": lambda: nn.Conv2d(16, 24, 3, padding=1), "no padding": lambda: nn.Conv2d(16, 24, 3),
    "stride": lambda: nn.Conv2d(16, 24, 3, 2, padding=1), "1x1": lambda: nn.Conv2d(16, 24, 1, 2),
    "5x5": lambda: nn.Conv2d(16, 50, 5), "dilated": lambda: nn.Conv2d(16, 24, 3, padding=2, dilation=2),
    "grouped": lambda: nn.Conv2d(16, 24, 3, padding=1, groups=4), "depthwise": lambda: nn.Conv2d(16, 16, 3, groups=16),
    "same": lambda: nn.Conv2d(16, 24, 3, padding="same"), "uneven": lambda: nn.Conv2d(16, 24, (2, 2), padding="same"),
    "oblong": lambda: nn.Conv2d(16, 24, (1, 3), (2, 1), (0, 1)), "linear": lambda: nn.Linear(400, 24),
}
INPUTS = {"unsigned": ActivationQuantizer(1.0), "zero point": ActivationQuantizer(1.0, 77),
          "signed": ActivationQuantizer(1.0, 0, 8, True), "signed zero point": ActivationQuantizer(1.0, -3, 6, True),
          "4 bits": ActivationQuantizer(1.0, 2, 4), "wide": ActivationQuantizer(1.0, 40, 12)}


def near_ties(count, seed=0):
    """Float32 factors around 2^-k / odd, k near 9: at them, and one unit in the last place beside them."""
    generator = torch.Generator().manual_seed(seed)
    factors = 2.0 ** -torch.randint(6, 10, (count,), generator=generator) / (
        2 * torch.randint(0, 30, (count,), generator=generator) + 1)
    toward = torch.tensor([0.0, 1.0])[torch.randint(0, 2, (count,), generator=generator)]
    return torch.where(torch.rand(count, generator=generator) < 0.3, factors, torch.nextafter(factors, toward))


def one_layer(make, source, integers=None, target=None):
    """A layer and a linear that reads its codes; factors m are the weight scales, offsets multiples of 1/2."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, 400) if isinstance(make(), nn.Linear) else (3, 16, 8, 8)
    x = source.decode(torch.randint(*source.code_range, shape, generator=generator))
    x[0], x[1] = (source.decode(torch.tensor(code)) for code in source.code_range)
    model = chain(make, x=x)
    if integers is None:
        integers = torch.randint(-128, 128, model[0].weight.shape, generator=generator)
        integers[0], integers[1], integers[2] = 127, -128, 0
    model[0].bias.data = torch.randint(-99, 99, model[0].bias.shape, generator=generator) / 2
    grid = Affine(near_ties(len(integers)), torch.zeros(len(integers), dtype=torch.int32))
    last = model[2].weight
    weights = {"0": CompressedTensor.of(integers, grid, 8), "2": quantize(last, fit_symmetric(last, 8), 8)}
    return model, assemble(model, weights, activations={"0": source, "2": target or INPUTS["zero point"]}), x


@pytest.mark.parametrize("source", INPUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_hard_roundings(layer, source):
    quick = check(*one_layer(LAYERS[layer], INPUTS[source]))
    assert quick.unsupported or ("0" in quick.slow_nodes) == (source == "wide" or layer == "uneven")


@pytest.mark.parametrize("target", INPUTS)
def test_targets(target):
    quick = check(*one_layer(LAYERS["3x3"], INPUTS["zero point"], target=INPUTS[target]))
    assert quick.unsupported or "0" not in quick.slow_nodes


@pytest.mark.parametrize("layer", ["3x3", "linear"])
@pytest.mark.parametrize("value", [127, -128, 0])
def test_all_weights_alike(layer, value):
    integers = torch.full(LAYERS[layer]().weight.shape, value)
    check(*one_layer(LAYERS[layer], INPUTS["unsigned"], integers))


@pytest.mark.parametrize("layer", ["3x3", "grouped", "linear"])
def test_tables_of_16_bits(layer):
    model, parts, x = one_layer(LAYERS[layer], INPUTS["zero point"])
    values = torch.tensor([0, 1.0, -1.0, 0.002, -0.0005, 0.3])
    codes = torch.randint(0, 6, parts.weights["0"].codes.shape, generator=torch.Generator().manual_seed(4))
    parts = dataclasses.replace(parts, weights={**parts.weights, "0": CompressedTensor.of(codes, Codebook(values), 3)})
    quick = check(model, parts, x)
    assert quick.layers["0"].weight.width == 16 and (quick.unsupported or "0" not in quick.slow_nodes)


class Shortcut(nn.Module):
    """conv(x) + x, both read again later in the ways that `again` names."""

    def __init__(self, again=""):
        super().__init__()
        self.stem, self.conv, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.pool, self.fc, self.again = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2), again

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.conv(x) + x
        if self.again == "add":
            y = y + x
        if self.again == "conv":
            y = y + self.other(x)
        if self.again == "twice":
            y = y + y
        return self.fc(torch.flatten(self.pool(y), 1))


@pytest.mark.parametrize("signed, bits", [(False, 8), (False, 5), (True, 8)])
@pytest.mark.parametrize("factor", [1.0, 1.5, 95 / 256, 0.5 + 2**-24, 1.5 + 2**-23, 1 / 3])
def test_adds(factor, signed, bits, monkeypatch):
    """The scale of the residual over that of the sum; the convs have factors near 2^-k / odd."""
    calls, add_to = [], onednn.Int8Layer.add_to
    monkeypatch.setattr(onednn.Int8Layer, "add_to", lambda *given: calls.append(given) or add_to(*given))
    model, x = seeded(lambda: Shortcut("")), normal(4, 3, 16, 16)
    parts = compressed(model, x)
    target = ActivationQuantizer(2.0**-5, 0 if signed else 12, bits, signed)
    scale = float(torch.tensor(target.scale * factor, dtype=torch.float32))
    source = ActivationQuantizer(scale, 3, 8, signed)
    ranges = {**parts.activations, "add:1": source, "conv": source, "pool": target}
    grid = Affine(near_ties(8), torch.zeros(8, dtype=torch.int32))
    weights = {**parts.weights, "conv": CompressedTensor.of(parts.weights["conv"].codes, grid, 8)}
    quick = check(model, dataclasses.replace(parts, activations=ranges, weights=weights), x)
    assert quick.unsupported or quick.slow_nodes == []
    assert quick.unsupported or bool(calls) == (not signed)


def test_verify_counts_what_differs(monkeypatch):
    model, x = seeded(lambda: Shortcut("")), normal(5, 3, 8, 8)
    quick = FastNetwork(compressed(model, x), model)
    batches = [(x[:2], None), (x[2:], None)]
    verdict = verify(quick, batches, 4, 3)
    places = 4 * (8 * 64) + 8 + 2 + 3 * 64  # stem, relu, conv and add on 8 x 8; pool, fc and the input
    assert (verdict.inputs, verdict.reference_inputs, verdict.wrong + verdict.wrong_outputs) == (4, 3, 0)
    assert verdict.reference_wrong == 0 and 3 * verdict.codes == 4 * verdict.reference_codes <= 12 * places
    if not quick.unsupported:
        kernel, step = quick.steps["fc"], quick.exact._multiplied
        monkeypatch.setitem(quick.steps, "fc", lambda inputs: {f: v + (f == "real") for f, v in kernel(inputs).items()})
        assert verify(quick, batches, 4).wrong_outputs == verify(quick, batches, 4).wrong == 8
        monkeypatch.setattr(quick.exact, "_multiplied", lambda node, inputs: dataclasses.replace(
            step(node, inputs), shift=step(node, inputs).shift + (node.name == "fc")))
        assert verify(quick, batches, 4, 4).reference_wrong == 8
    partly = FastNetwork(compressed(model, x), model, ("conv",))
    verdict = verify(partly, batches, 4, 3)
    assert partly.float_nodes and verdict.reference_codes > 0 == verdict.wrong == verdict.reference_wrong


@pytest.mark.parametrize("again", ["", "add", "conv", "twice"])
@pytest.mark.parametrize("other", [False, True])
def test_values_read_more_than_once(again, other, monkeypatch):
    """In place or not, under one quantizer or several."""
    monkeypatch.setattr(onednn, "exact_product", lambda factor: factor == 1.0)
    model, x = seeded(lambda: Shortcut(again)), normal(3, 3, 8, 8)
    parts = compressed(model, x)
    ranges = dict.fromkeys(parts.activations, ActivationQuantizer(0.03)) | {"stem": parts.activations["stem"]}
    if other:
        ranges["conv"] = ActivationQuantizer(0.05, 1, 7)
    check(model, dataclasses.replace(parts, activations=ranges), x)


def test_sums_in_place():
    x = normal(3, 3, 8, 8)
    model = chain(lambda: nn.Conv2d(3, 8, 1), nn.ReLU, *[lambda: BasicBlock(8, 8, 1)] * 2, x=x)
    parts = compressed(model, x)
    ranges = dict.fromkeys(parts.activations, ActivationQuantizer(0.03)) | {"0": parts.activations["0"]}
    check(model, dataclasses.replace(parts, activations=ranges), x)


@pytest.mark.parametrize("pool", [
    lambda: nn.MaxPool2d(3, 2, padding=1), lambda: nn.MaxPool2d((2, 3), (1, 2)), lambda: nn.MaxPool2d(2, dilation=2),
    lambda: nn.MaxPool2d(3, 2, ceil_mode=True), lambda: nn.AvgPool2d(2), lambda: nn.AdaptiveAvgPool2d(10)])
@pytest.mark.parametrize("quantizer", [ActivationQuantizer(0.02, 60), ActivationQuantizer(0.05, -2, 6, True),
                                       ActivationQuantizer(0.001, 900, 12)])
def test_pools(pool, quantizer):
    x = normal(2, 3, 20, 20)
    model = chain(lambda: nn.Conv2d(3, 8, 1), pool, lambda: nn.Conv2d(8, 4, 1), nn.ReLU, x=x)
    parts = compressed(model, x)
    ranges = {edge: quantizer if edge in ("1", "2") else q for edge, q in parts.activations.items()}
    check(model, dataclasses.replace(parts, activations=ranges), x, reference=False)


@pytest.mark.parametrize("option, paired", [("5opt", True), ("3opt", False)])
def test_windows(option, paired):
    model, x = seeded(lambda: build("resnet18w16", 10, 3)), normal(3, 3, 8, 8)  # down to 1 x 1
    parts = compressed(model, x)
    windows = {name: find_window(option, paired=paired) for name in weight_layers(model) if name not in ("conv1", "fc")}
    quick = check(model, dataclasses.replace(parts, windows=windows), x)
    assert quick.unsupported or quick.slow_nodes == []


def test_windows_over_odd_channels():
    x = normal(2, 3, 8, 8)
    model = chain(lambda: nn.Conv2d(3, 5, 3), nn.ReLU, lambda: nn.Conv2d(5, 4, 3, padding=1), x=x)
    quick = check(model, dataclasses.replace(compressed(model, x), windows={"2": find_window("5opt")}), x)
    assert quick.unsupported or quick.slow_nodes == ["2"]


def test_odd_inputs(tiny):
    model, x = tiny.model(), normal(4, 3, 8, 8)
    exact, quick = (network(compressed(model, x), model) for network in (IntegerNetwork, FastNetwork))
    for given in (x[:0], x.double(), x * 1e30, x.where(x != x.max(), float("inf")), x.where(x != x.max(), math.nan)):
        before = given.clone()
        assert torch.equal(quick(given).nan_to_num(7), exact(given).nan_to_num(7))
        assert torch.equal(given.nan_to_num(7), before.nan_to_num(7))


def test_a_cpu_without_exact_kernels(tiny, monkeypatch):
    monkeypatch.setattr(fast.onednn, "unsupported", lambda: "the sums saturate")
    model, x = tiny.model(), normal(4, 3, 8, 8)
    quick = check(model, compressed(model, x), x)
    assert quick.backend == "float: the sums saturate" and quick.steps == {}
